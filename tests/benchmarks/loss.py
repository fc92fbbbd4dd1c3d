"""Time and memory of the fused loss, against the plain one that JAX differentiates.

  python tests/benchmarks/loss.py [--sizes char gpt2_124m] [--json=loss.json]

Both are timed in turns, value and gradient together; medians are shown. "limit" is the
time of the three matrix products alone, at the rate of a large product in the same run.
"""

import argparse
import statistics
import time

import common  # makes this clone importable

from flaxlm import machine

machine.keep_freed_memory()  # before anything large is allocated

import jax
import jax.numpy as jnp

from flaxlm.kernels.cross_entropy import chunk_tokens, linear_cross_entropy

# name: tokens, width, vocabulary, calls per turn
SIZES = {
  "char": (768, 128, 65, 40),
  "baby": (2048, 384, 65, 10),
  "gpt2_124m": (512, 768, 50_257, 1),
  "gpt2_chunks": (8192, 768, 50_257, 1),  # 1.6 GB of logits: two chunks
  "llama3": (4096, 512, 128_256, 1),
}


def plain(x_TD, table_VD, targets_T, scale_T):
  logits_TV = jnp.einsum(
    "TD,VD->TV", x_TD, table_VD, preferred_element_type=jnp.float32
  )
  is_target_TV = jnp.arange(len(table_VD))[None, :] == targets_T[:, None]
  target_T = jnp.sum(jnp.where(is_target_TV, logits_TV, 0.0), axis=1)
  return jnp.sum(scale_T * (jax.nn.logsumexp(logits_TV, axis=1) - target_T))


def fused(x_TD, table_VD, targets_T, scale_T):
  return linear_cross_entropy(x_TD, table_VD.T, targets_T, scale_T)[0]


def seconds(function, arrays, calls: int = 1) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    out = function(*arrays)
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / calls


def measure(name: str, turns: int, dtype) -> dict:
  T, D, V, calls = SIZES[name]
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = (
    jax.random.normal(keys[0], (T, D)).astype(dtype),
    (0.02 * jax.random.normal(keys[1], (V, D))).astype(dtype),
    jax.random.randint(keys[2], (T,), 0, V),
    jnp.full(T, 1 / T),
  )
  matrix = jnp.ones((2048, 2048), dtype)
  product = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x))
  steps = {
    kind: jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arrays).compile()
    for kind, function in (("plain", plain), ("fused", fused))
  }
  times = {kind: [] for kind in steps}
  limits = []
  for turn in range(turns + 1):
    rate = 2 * 2048**3 / seconds(product, (matrix,), 2)
    limits.append(6 * T * D * V / rate)
    for kind, step in steps.items():
      times[kind].append(seconds(step, arrays, calls))
    if turn == 0:  # warm now
      times, limits = {kind: [] for kind in steps}, []
  row = {"size": name, "dtype": dtype.__name__}
  for kind, step in steps.items():
    row[f"{kind} ms"] = 1e3 * statistics.median(times[kind])
    row[f"{kind} MiB"] = step.memory_analysis().temp_size_in_bytes / 2**20
  pairs = zip(times["plain"], times["fused"], strict=True)
  row["speed-up"] = statistics.median(a / b for a, b in pairs)
  limit = 1e3 * statistics.median(limits)
  return row | {"limit ms": limit, "chunk tokens": chunk_tokens(T, V)}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
  parser.add_argument("--turns", type=int, default=9)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[args.dtype]
  rows = [measure(name, args.turns, dtype) for name in args.sizes]
  common.report("loss: value and gradients", rows, args.json)


if __name__ == "__main__":
  main()
