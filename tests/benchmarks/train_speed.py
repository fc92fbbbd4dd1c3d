"""Training speed against this machine's limit; data_speed.py has the loader's.

  bash launch/bench.sh                      all sizes, about 2 minutes on 2 cores
  bash launch/bench.sh --sizes char --json=speed.json

Each size is timed in turns with a plain matrix product, so that both see the same
machine; medians are shown. FLOPs a token = 6 * matrix weights + 12 * layers * width *
length: the full attention square, as the published figures count it.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time

from flaxlm.parallel import hosts

ALLOCATOR = hosts.keep_freed_memory()  # before anything large is allocated

import jax
import jax.numpy as jnp

from configs import base
from flaxlm.data.batches import SyntheticBatches
from flaxlm.models.layers import TransformerConfig
from flaxlm.training.optim import make_optimizer
from flaxlm.training.state import init_state, make_train_step

# name: layers, heads, width, length, batch, vocabulary, steps a turn
SIZES = {
  "char": (4, 4, 128, 64, 12, 65, 40),
  "baby": (6, 6, 384, 256, 8, 65, 2),
  "gpt2_124m": (12, 12, 768, 512, 1, 50257, 1),
}
MATRIX = 2048


def matmul_gflops(product, x) -> float:
  start = time.perf_counter()
  product(x).block_until_ready()
  return 2 * MATRIX**3 / (time.perf_counter() - start) / 1e9


def gpt2_like(layers, heads, width, length, batch, vocabulary):
  """nanoGPT's model of that size, without dropout and biases."""
  config = base.get_config()
  config.tokenizer.vocab_size = vocabulary
  config.data.seq_len = length
  config.data.batch_size = batch
  model = config.model
  model.num_layers = model.unroll = layers
  model.num_heads = model.num_kv_heads = heads
  model.embed_dim = width
  model.head_dim = width // heads
  model.mlp_dim = 4 * width
  model.positions, model.norm = "learned", "layernorm"
  model.gated_mlp, model.activation = False, "gelu_tanh"
  return config


def measure(name: str, turns: int) -> dict:
  *shape, steps = SIZES[name]
  layers, _, width, length, batch_size, vocabulary = shape
  config = gpt2_like(*shape)
  tx, rate = make_optimizer(1000, **config.optim)
  init = functools.partial(
    init_state, model_config=TransformerConfig(**config.model), tx=tx, ema_decay=0.0
  )
  state = jax.jit(init)(jax.random.key(0))
  step = jax.jit(make_train_step(tx, rate, **config.step), donate_argnums=0)
  batch = jax.device_put(SyntheticBatches(length, batch_size, 0, vocabulary)[0])
  start = time.perf_counter()
  state, _ = jax.block_until_ready(step(state, batch))
  compile_seconds = time.perf_counter() - start
  x, product = (
    jnp.ones((MATRIX, MATRIX)),
    jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x)),
  )
  matmul_gflops(product, x)
  rates, limits = [], []
  for _ in range(turns):
    limits.append(max(matmul_gflops(product, x) for _ in range(3)))
    start = time.perf_counter()
    for _ in range(steps):
      state, _ = step(state, batch)
    jax.block_until_ready(state)
    rates.append(steps * batch_size * length / (time.perf_counter() - start))
  flops = (
    6 * (12 * layers * width**2 + vocabulary * width) + 12 * layers * width * length
  )
  tokens, limit = statistics.median(rates), statistics.median(limits)
  return {
    "size": name,
    "tokens_per_second": tokens,
    "gflops": tokens * flops / 1e9,
    "matmul_gflops": limit,
    "share_of_matmul": tokens * flops / 1e9 / limit,
    "first_step_seconds": compile_seconds,
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  about = {
    "python": platform.python_version(),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "machine": platform.machine(),
    "allocator": ALLOCATOR,
  }
  print("  ".join(f"{key} {value}" for key, value in about.items()))
  print(
    f"{'size':<12}{'tokens/s':>10}{'GFLOP/s':>10}"
    f"{'matmul':>10}{'share':>8}{'first step':>12}"
  )
  rows = []
  for name in args.sizes:
    row = measure(name, args.turns)
    rows.append(row)
    print(
      f"{name:<12}{row['tokens_per_second']:>10,.0f}{row['gflops']:>10.0f}"
      f"{row['matmul_gflops']:>10.0f}{row['share_of_matmul']:>8.0%}"
      f"{row['first_step_seconds']:>11.1f}s",
      flush=True,
    )
  if args.json:
    with open(args.json, "w") as file:
      json.dump({"about": about, "sizes": rows}, file, indent=2)


if __name__ == "__main__":
  sys.exit(main())
