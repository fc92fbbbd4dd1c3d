"""Where a training step's time goes: kinds of operations, and the longest ones.

  python tests/benchmarks/profile_step.py baby [--steps 20] [--set unroll=1]

Sizes are those of peers.py; it runs on a CPU or a GPU. Milliseconds per step are from
JAX's profiler. Operations that run at the same time on several cores or streams all
count, so the sum can exceed the step. `--set` changes keys of config.model.
"""

import argparse
import ast
import collections
import pathlib
import re
import tempfile
import time

import common
import jax
import peers


def durations(directory: str) -> collections.Counter:
  """Returns the nanoseconds of each operation of the program, over all steps."""
  (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
  found = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name:
          found[name] += event.duration_ns
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("size", choices=list(peers.ALL_SIZES))
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--longest", type=int, default=20)
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  knobs = {}
  for text in args.set:
    key, _, value = text.partition("=")
    knobs[key] = ast.literal_eval(value) if re.match(r"[-\d(]", value) else value
  run = peers.flaxlm(args.size, "", **knobs)
  run(3)
  start = time.perf_counter()
  run(args.steps)
  step = 1e3 * (time.perf_counter() - start) / args.steps
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      run(args.steps)
    found = durations(directory)
  kinds, number = collections.Counter(), collections.Counter()
  for name, nanoseconds in found.items():
    kind = re.sub(r"[.\d]+$", "", name)
    kinds[kind] += nanoseconds
    number[kind] += 1
  per_step = 1e6 * args.steps
  rows = [
    {"kind": kind, "operations": number[kind], "ms": ns / per_step,
     "of the step": ns / per_step / step}
    for kind, ns in kinds.most_common()
  ]  # fmt: skip
  title = f"{args.size}: {step:.3g} ms per step"
  common.report(title, rows, args.json, step_ms=step)
  print()
  longest = [
    {"longest": name, "ms": ns / per_step}
    for name, ns in found.most_common(args.longest)
  ]
  common.print_table(longest)


if __name__ == "__main__":
  main()
