"""Where scores in chunks overtake scores as a whole: forward and backward, in turns.

  python tests/benchmarks/attention_speed.py [--lengths 256 512 1024] [--blocks 64 128]

Causal attention with the heads of GPT-2 124M (12 of 64), 4,096 tokens or one row of
them, on this device. Medians of interleaved turns; "faster" is against `dense`.
`kernels/chunked_attention.py` goes by what this printed.
"""

import argparse
import functools
import statistics
import time

import common  # makes this clone importable
import jax

from flaxlm.kernels import chunked_attention as chunked
from flaxlm.kernels.conformance import Inputs, Mask, kernels, pull
from flaxlm.parallel import hosts


def program(backend: str, given: Inputs):
  kernel = functools.partial(kernels(backend), mask=Mask())
  return jax.jit(functools.partial(pull, kernel)).lower(given).compile()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  lengths = [128, 256, 512, 1024, 2048, 4096]
  parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
  parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128, 256])
  parser.add_argument("--rows", type=int, default=0, help="0: 4,096 tokens a batch")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  hosts.keep_freed_memory()
  rows = []
  for L in args.lengths:
    B = args.rows or max(4096 // L, 1)
    q, k, v, dout = jax.random.normal(jax.random.key(0), (4, B, L, 12, 64))
    given = Inputs(q, k, v, None, dout, None, None)
    programs = {"dense": program("dense", given)}
    for chunked.BLOCK in args.blocks:
      programs[f"blocks of {chunked.BLOCK}"] = program("chunked", given)
    seconds = {name: [] for name in programs}
    for _ in range(args.turns):
      for name, run in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(run(given))
        seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(times) for name, times in seconds.items()}
    for name, run in programs.items():
      rows.append({
        "length": L, "rows": B, "scores": name, "ms": 1e3 * took[name],
        "faster": took["dense"] / took[name],
        "temporary MiB": run.memory_analysis().temp_size_in_bytes / 2**20,
      })  # fmt: skip
  common.report("attention: forward and backward", rows, args.json)


if __name__ == "__main__":
  main()
