"""The memory that `plan` predicts for a step on this machine, against the measured.

  python tests/benchmarks/plan_memory.py [--sizes baby gpt2_124m]

Each size has its own process. Predicted: what XLA assigns in the compiled step, as
`plan --hardware=this` reports it. Measured: the peak growth of the process from before
the state was made to after three steps (Linux). The measured value also includes the
buffers into which the matrix library packs its operands.
"""

import argparse
import ctypes
import json
import os
import pathlib
import subprocess
import sys

from flaxlm import machine

sys.path[:0] = [
  str(pathlib.Path(__file__).parents[2]),
  str(pathlib.Path(__file__).parent),
]

import peers  # makes this clone importable

machine.keep_freed_memory()  # before anything large is allocated

import jax
import jax.numpy as jnp

from flaxlm.parallel.hardware import CHIPS, Calibration, Hardware
from flaxlm.parallel.mesh import one_device
from flaxlm.planning.compile import compile_step
from flaxlm.runs import program

# name: (a size of peers.py, changes to it)
SIZES = {
  "baby": ("baby", {}),
  "baby, batch 32": ("baby", {"data.batch_size": 32}),
  "baby, batch 32, remat": (
    "baby",
    {"data.batch_size": 32, "model.remat": "full", "model.unroll": 1},
  ),
  "gpt2_124m": ("gpt2_124m", {}),
  "gpt2_124m, batch 4": ("gpt2_124m", {"data.batch_size": 4}),
  "gpt2_124m, batch 4, remat": (
    "gpt2_124m",
    {"data.batch_size": 4, "model.remat": "dots", "model.unroll": 1},
  ),
}


def status(key: str) -> float:
  """Returns this process's memory in bytes: VmRSS is current, VmHWM the peak."""
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024.0 * int(text.split(f"{key}:")[1].split()[0])


def measure(name: str) -> dict[str, float]:
  size, changes = SIZES[name]
  config = peers.config_of(size)
  for key, value in changes.items():
    room, knob = key.split(".")
    config[room][knob] = value
  # The calibration makes the step compile for this machine; the chip is not used.
  here = Hardware(CHIPS["h100"], 1, 1, "", Calibration({}, 0.0))
  predicted = compile_step(config, here).peak
  mesh = one_device()
  built, batch = (
    program.build_program(config, mesh),
    program.abstract_batch(config, mesh),
  )
  with program.use_config_mesh(config, mesh):
    step = built.train_step.lower(built.target, batch, None).compile()
    init = built.init.lower(jax.random.key(0)).compile()
    key = jax.block_until_ready(jax.random.key(0))
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # do not reuse what compiling left
    before = status("VmRSS")
    state = jax.block_until_ready(init(key))
    tokens = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batch)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(3):
      state, metrics = step(state, tokens, None)
    jax.block_until_ready((state, metrics))
  return {"predicted": predicted, "measured": status("VmHWM") - before}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(args.one)))
    return 0
  print(f"{'size':<28}{'predicted':>12}{'measured':>12}{'ratio':>7}")
  worst = 0.0
  for name in args.sizes:
    child = [sys.executable, __file__, "--one", name]
    text = subprocess.run(
      child, stdout=subprocess.PIPE, check=True, env=os.environ
    ).stdout
    found = json.loads(text.splitlines()[-1])
    ratio = found["predicted"] / found["measured"]
    worst = max(worst, abs(ratio - 1))
    print(
      f"{name:<28}{found['predicted'] / 2**20:>8,.0f} MiB"
      f"{found['measured'] / 2**20:>8,.0f} MiB{ratio:>7.2f}",
      flush=True,
    )
  print(f"worst error {worst:.0%}")
  return int(worst > 0.1)


if __name__ == "__main__":
  sys.exit(main())
