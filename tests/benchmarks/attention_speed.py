"""Speed of attention, forward and backward: our variants and PyTorch's, in turns.

  python tests/benchmarks/attention_speed.py [--lengths 256 512 1024] [--blocks 64 128]

Causal attention with the heads of GPT-2 124M (12 of size 64) on 4,096 tokens in one row
or more; a GPU takes four times as many, in bfloat16. Medians of interleaved turns;
"faster" is relative to `dense`. TFLOP/s count the products of visible scores, 2 forward
and 5 backward (Dao 2023, arXiv 2307.08691). Variants that cannot run here are left out.
`flaxlm/kernels/attention/chunked.py` is tuned by these results.
"""

import argparse
import functools
import importlib.util
import statistics
import time

import common  # makes this clone importable
import jax

from flaxlm import machine
from flaxlm.kernels.attention import chunked
from flaxlm.kernels.attention.choice import why_not
from flaxlm.kernels.attention.conformance import Inputs, Mask, case_of, kernels, pull

HEADS, HEAD_DIM = 12, 64


def program(backend: str, given: Inputs):
  kernel = functools.partial(kernels(backend), mask=Mask())
  return jax.jit(functools.partial(pull, kernel)).lower(given).compile()


def programs_here(given: Inputs, blocks: list[int], platform: str) -> dict:
  """Returns compiled programs for attention and its gradients, by name."""
  programs = {"dense": program("dense", given)}
  for chunked.LARGEST_BLOCK in blocks:
    programs[f"blocks of {chunked.LARGEST_BLOCK}"] = program("chunked", given)
  at = given.q_BLNH
  if not why_not("cudnn", case_of(Mask(), at.dtype.name, at.shape[1], platform)):
    programs["cudnn"] = program("cudnn", given)
  return programs


def pytorch(shape: tuple, platform: str):
  """Returns a function that repeats PyTorch's attention on random inputs."""
  import torch
  from torch.nn.functional import scaled_dot_product_attention as sdpa

  device, dtype = "cpu", torch.float32
  if platform == "gpu":
    if not torch.cuda.is_available():
      return None
    device, dtype = "cuda", torch.bfloat16
  arrays = torch.randn(4, *shape, device=device, dtype=dtype).transpose(2, 3)
  *inputs, dout = (x.detach().requires_grad_() for x in arrays)

  def run(times: int) -> None:
    for _ in range(times):
      out = sdpa(*inputs, is_causal=True)
      torch.autograd.grad(out, inputs, dout)
    if device == "cuda":
      torch.cuda.synchronize()

  return run


def repeated(compiled, given: Inputs):
  def run(times: int) -> None:
    for _ in range(times):
      out = compiled(given)
    jax.block_until_ready(out)

  return run


def seconds_of(runs: dict, turns: int, portion: float) -> dict[str, float]:
  """Returns median seconds per call; a turn repeats calls for `portion` seconds."""
  seconds = {name: [] for name in runs}
  number = {}
  for name, run in runs.items():
    run(1)
    start = time.perf_counter()
    run(1)
    number[name] = max(int(portion / (time.perf_counter() - start)), 1)
  for _ in range(turns):
    for name, run in runs.items():
      start = time.perf_counter()
      run(number[name])
      seconds[name].append((time.perf_counter() - start) / number[name])
  return {name: statistics.median(times) for name, times in seconds.items()}


def measure(L: int, args, platform: str) -> list[dict]:
  tokens = 16384 if platform == "gpu" else 4096
  dtype = "bfloat16" if platform == "gpu" else "float32"
  B = args.rows or max(tokens // L, 1)
  shape = (B, L, HEADS, HEAD_DIM)
  q, k, v, dout = jax.random.normal(jax.random.key(0), (4, *shape), dtype)
  given = Inputs(q, k, v, None, dout, None, None)
  programs = programs_here(given, args.blocks, platform)
  runs = {name: repeated(run, given) for name, run in programs.items()}
  if importlib.util.find_spec("torch") and (torch := pytorch(shape, platform)):
    runs["PyTorch's sdpa"] = torch
  took = seconds_of(runs, args.turns, args.seconds)
  flops = 7 * 2 * B * HEADS * HEAD_DIM * L * L / 2
  temporary = {
    name: run.memory_analysis().temp_size_in_bytes / 2**20
    for name, run in programs.items()
  }
  return [
    {
      "length": L, "rows": B, "scores": name, "ms": 1e3 * took[name],
      "faster": took["dense"] / took[name], "TFLOP/s": flops / took[name] / 1e12,
      "temporary MiB": temporary.get(name),
    }
    for name in runs
  ]  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  lengths = [128, 256, 512, 1024, 2048, 4096]
  parser.add_argument("--lengths", type=int, nargs="+", help="128 to 4096, GPU 8192")
  parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128, 256])
  parser.add_argument("--rows", type=int, default=0, help="0: to fill the tokens")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=0.2, help="per turn of one")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  machine.keep_freed_memory()
  platform = jax.devices()[0].platform
  lengths += [8192] if platform == "gpu" else []
  rows = [row for L in args.lengths or lengths for row in measure(L, args, platform)]
  common.report("attention: forward and backward", rows, args.json)


if __name__ == "__main__":
  main()
