"""How the training step scales, and what the surrounding loop costs.

  python tests/benchmarks/scaling.py              # 30 minutes on 2 cores
  python tests/benchmarks/scaling.py --quick      # fewer points, 1 minute

It times a step and its compilation against depth, length and vocabulary. Exponents are
least squares on logarithms, over all sizes and over the larger half, because small
sizes are mostly fixed costs. It also times the dispatch of a step and, in runs of
`flaxlm.train`, measures host memory, the wait for data and the cost of async saves.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import common  # makes this clone importable

from flaxlm import machine

machine.keep_freed_memory()  # before anything large is allocated

import jax
import numpy as np

from flaxlm.config import base
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.parallel.mesh import one_device
from flaxlm.runs.program import abstract_batch, build_program, use_config_mesh

SERIES = {
  "layers": [8, 16, 32, 64, 96],
  "length": [1024, 2048, 4096, 8192, 16384, 32768],
  "vocabulary": [1024, 4096, 16384, 65536, 262144],
}


def small(**changes):
  """Returns a config so small that the one changed dimension dominates the cost."""
  config = base.get_config()
  config.num_steps = 100_000
  config.data.loader = "synthetic"
  config.data.seq_len, config.data.batch_size = 128, 1
  config.tokenizer.vocab_size = 256
  model = config.model
  model.num_layers, model.embed_dim, model.mlp_dim = 2, 64, 192
  model.num_heads = model.num_kv_heads = 2
  model.head_dim = 32
  config.update_from_flattened_dict(changes)
  return config


def scaled(what: str, size: int):
  if what == "layers":
    return small(**{"model.num_layers": size})
  if what == "length":
    return small(**{"data.seq_len": size})
  return small(**{"tokenizer.vocab_size": size, "data.seq_len": 512})


class Step:
  """A compiled training step with its state; `run(n)` waits for n steps."""

  def __init__(self, config):
    self.config, self.mesh = config, one_device()
    program = build_program(config, self.mesh)
    with use_config_mesh(config, self.mesh):
      lowered = program.train_step.lower(
        program.target, abstract_batch(config, self.mesh), None
      )
      start = time.perf_counter()
      self.step = lowered.compile()
      self.compile_seconds = time.perf_counter() - start
      self.temporaries = self.step.memory_analysis().temp_size_in_bytes
      self.state = program.init(jax.random.key(0))
    data = config.data
    rows = SyntheticBatches(data.seq_len, data.batch_size, 0, config.model.vocab_size)
    self.batch = jax.device_put(rows[0])

  def run(self, steps: int) -> None:
    for _ in range(steps):
      self.state, _ = self.step(self.state, self.batch, None)
    jax.block_until_ready(self.state)

  def seconds(self, budget: float) -> float:
    """Returns the median over at least three steps and `budget` seconds."""
    self.run(1)
    times, end = [], time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
      start = time.perf_counter()
      self.run(1)
      times.append(time.perf_counter() - start)
    return statistics.median(times)


def exponent(x: list, y: list) -> float | None:
  return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else None


def grow(what: str, sizes: list[int], budget: float) -> list[dict]:
  rows = []
  for size in sizes:
    step = Step(scaled(what, size))
    rows.append({
      "against": what, "size": size, "step s": step.seconds(budget),
      "compile s": step.compile_seconds, "temporaries MB": step.temporaries / 1e6,
    })  # fmt: skip
  return rows


def fits(rows: list[dict]) -> list[dict]:
  found = []
  for what in dict.fromkeys(row["against"] for row in rows):
    mine = [row for row in rows if row["against"] == what]
    x, half = [row["size"] for row in mine], len(mine) // 2
    for key in ("step s", "compile s", "temporaries MB"):
      y = [row[key] for row in mine]
      found.append({
        "exponent of": key, "against": what, "all": exponent(x, y),
        "larger half": exponent(x[half:], y[half:]), "plot": plot(y),
      })  # fmt: skip
  return found


def plot(y: list[float]) -> str:
  """Returns bars on a logarithmic scale from the smallest to the largest value."""
  low, high = np.log(min(y)), np.log(max(y))
  return "".join("▁▂▃▄▅▆▇█"[int(7 * (np.log(v) - low) / (high - low or 1))] for v in y)


def dispatch_seconds(steps: int) -> float:
  """Returns the host's time per step, for a step with almost no computation."""
  step = Step(small(**{
    "model.num_layers": 1, "model.embed_dim": 8, "model.mlp_dim": 8,
    "model.head_dim": 4, "data.seq_len": 8, "tokenizer.vocab_size": 16,
  }))  # fmt: skip
  step.run(10)
  start = time.perf_counter()
  step.run(steps)
  return (time.perf_counter() - start) / steps


def train(workdir: pathlib.Path, config_file: pathlib.Path, **knobs) -> list[dict]:
  """Runs the trainer as a user does; returns its lines of metrics."""
  command = [
    sys.executable, "-m", "flaxlm.train", f"--config={config_file}",
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in knobs.items()),
  ]  # fmt: skip
  done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(done.stderr[-2000:])
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def around_the_step(quick: bool) -> list[dict]:
  """Measures what the loop adds: memory, the wait for data, asynchronous saves."""
  steps, every = (400, 50) if quick else (10_000, 1000)
  with tempfile.TemporaryDirectory() as directory:
    folder = pathlib.Path(directory)
    store = prepare(folder)
    knobs = {
      "data.store": store, "data.seq_len": 32, "num_steps": steps, "eval.every": steps,
      "checkpoint.every": steps, "log.every": every, "log.tensorboard": False,
      "model.num_layers": 1, "model.unroll": 1, "model.embed_dim": 16,
      "model.mlp_dim": 16,
    }  # fmt: skip
    quickstart = common.ROOT / "configs/quickstart.py"
    lines = train(folder / "tiny", quickstart, **knobs)
    memory = [x["host_memory_gib"] for x in lines if "host_memory_gib" in x]
    # The first fifth fills pools and caches; after that, memory must not grow.
    after = memory[len(memory) // 5 :]
    rows = [{
      "of": f"host memory, {steps:,} steps of a tiny model", "unit": "GiB",
      "value": memory[-1], "growth": (after[-1] - after[0]) / after[0], "limit": 0.02,
    }]  # fmt: skip
    # The quickstart's model saved often, against the same saved only at the end.
    steps, often = (60, 20) if quick else (300, 50)
    knobs = {"data.store": store, "num_steps": steps, "log.every": 5,
             "eval.every": steps, "log.tensorboard": False}  # fmt: skip
    times = {steps: [], often: []}
    waits = []
    for turn in range(1 if quick else 3):
      for saved in times:
        workdir = folder / f"saved_{saved}_{turn}"
        lines = train(workdir, quickstart, **knobs, **{"checkpoint.every": saved})
        lines = [x for x in lines if "tokens_per_second" in x]
        # Means, because a save slows few steps; the first save is a warm-up, left out.
        late = [1 / x["tokens_per_second"] for x in lines if x["step"] > often + 5]
        times[saved].append(statistics.mean(late))
        waits += [x["data_wait"] for x in lines[2:]]
  slower = [a / b - 1 for a, b in zip(times[often], times[steps], strict=True)]
  return [
    *rows,
    {"of": "wait for data, quickstart", "unit": "of the step",
     "value": statistics.median(waits), "limit": 0.01},
    {"of": f"a save every {often} steps, quickstart", "unit": "slower",
     "value": statistics.median(slower), "limit": 0.05},
  ]  # fmt: skip


def prepare(folder: pathlib.Path) -> pathlib.Path:
  """Returns the quickstart's token store; if there is none, makes a smaller one."""
  existing = common.ROOT / "data/stdlib"
  if existing.exists():
    return existing
  store = folder / "store"
  command = [
    sys.executable, "-m", "flaxlm.prepare", "--config=configs/quickstart.py",
    f"--config.data.store={store}", "--config.data.sources.main.max_documents=200",
  ]  # fmt: skip
  done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(done.stderr[-2000:])
  return store


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--series", nargs="*", default=list(SERIES), choices=list(SERIES))
  parser.add_argument("--no-runs", action="store_true", help="no runs of flaxlm.train")
  parser.add_argument("--quick", action="store_true", help="fewer points and steps")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  rows = []
  for what in args.series:
    sizes = SERIES[what][:2] if args.quick else SERIES[what]
    rows += grow(what, sizes, 0.2 if args.quick else 3.0)
  fitted = fits(rows)
  around = [{
    "of": "dispatch of a step", "unit": "ms",
    "value": 1e3 * dispatch_seconds(300 if args.quick else 3000),
  }]  # fmt: skip
  if not args.no_runs:
    around += around_the_step(args.quick)
  common.report("how the step scales", rows, args.json, fits=fitted, around=around)
  print()
  common.print_table(fitted)
  print()
  common.print_table(around)


if __name__ == "__main__":
  sys.exit(main())
