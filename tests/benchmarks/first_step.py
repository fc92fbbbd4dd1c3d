"""Time from the command to the first step: cold, warm and without a cache.

  python tests/benchmarks/first_step.py [--sizes char gpt2_124m] [--turns 3]
                                        [--json=first_step.json]

Each start is a process of `python -m flaxlm.train` on random tokens, which prints the
seconds. A cold start has an empty cache; a warm one is the same again.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import common

CONFIG = """
import sys
sys.path.insert(0, {benchmarks!r})
import peers

def get_config():
  config = peers.config_of({size!r})
  config.num_steps = config.log.every = config.optim.warmup_steps = 1
  config.data.loader = "synthetic"
  config.log.tensorboard = False
  return config
"""
KINDS = ("no cache", "cold", "warm")


def first_step(config: pathlib.Path, home: pathlib.Path, kind: str) -> tuple:
  """Returns (seconds, programs found in the cache, programs requested)."""
  changes = {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(common.ROOT)}
  if kind == "no cache":
    changes["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  with tempfile.TemporaryDirectory() as workdir:
    done = subprocess.run(
      [sys.executable, "-m", "flaxlm.train", f"--config={config}",
       f"--workdir={workdir}"],
      env=os.environ | changes, capture_output=True, text=True,
    )  # fmt: skip
  if done.returncode:
    sys.exit(done.stderr)
  line = re.search(r"first step ([\d.]+) s after the command; (.*)", done.stdout)
  found = re.findall(r"\d+", line.group(2)) or ["0", "0"]
  return float(line.group(1)), *map(int, found)


def measure(size: str, turns: int) -> dict:
  seconds = {kind: [] for kind in KINDS}
  with tempfile.TemporaryDirectory() as place:
    config = pathlib.Path(place) / "config.py"
    benchmarks = str(pathlib.Path(__file__).parent)
    config.write_text(CONFIG.format(benchmarks=benchmarks, size=size))
    for turn in range(turns):
      for kind in KINDS:
        spent, found, asked = first_step(config, pathlib.Path(place) / f"{turn}", kind)
        seconds[kind].append(spent)
        if kind == "warm" and not found:
          sys.exit(f"{size}: nothing came from the cache")
  row = {"size": size}
  row |= {f"{kind} s": statistics.median(seconds[kind]) for kind in KINDS}
  return row | {"programs": asked, "found warm": found}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes = ("char", "gpt2_124m")
  parser.add_argument("--sizes", nargs="*", default=sizes, choices=(*sizes, "baby"))
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  rows = [measure(size, args.turns) for size in args.sizes]
  common.report("from the command to the first step", rows, args.json)


if __name__ == "__main__":
  main()
