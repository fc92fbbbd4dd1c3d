"""One trainer in a process of its own, which computes when a line on stdin asks it to.

  python tests/benchmarks/peers.py flaxlm char        # then lines: numbers of steps

Answers each line with the seconds that these steps took; the first answer, unasked, is
the time of the first step. `train_speed.py` starts several and gives them turns. Peers
run as their users run them: the documented optimizer, gradients clipped at 1, float32,
and nothing tuned. Nothing of theirs is imported by flaxlm.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

# name: layers, heads, width, length, batch, vocabulary
SIZES = {
  "char": (4, 4, 128, 64, 12, 65),
  "baby": (6, 6, 384, 256, 8, 65),
  "gpt2_124m": (12, 12, 768, 512, 1, 50257),
}
MATRIX = 2048  # of the product that is the limit
# For the one row that shows what flaxlm's allocator setting does for others.
KEEP_MEMORY = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
  "MALLOC_TOP_PAD_": str(64 << 20),
  "MALLOC_ARENA_MAX": "1",
}


def gpt2_like(layers, heads, width, length, batch, vocabulary):
  """nanoGPT's model of that size, without dropout and biases, as a flaxlm config."""
  import common  # noqa: F401  makes this clone importable

  from configs import base

  config = base.get_config()
  config.tokenizer.vocab_size = vocabulary
  config.data.seq_len = length
  config.data.batch_size = batch
  config.data.loader = "synthetic"
  model = config.model
  model.num_layers = model.unroll = layers
  model.num_heads = model.num_kv_heads = heads
  model.embed_dim = width
  model.head_dim = width // heads
  model.mlp_dim = 4 * width
  model.positions, model.norm = "learned", "layernorm"
  model.gated_mlp, model.activation = False, "gelu_tanh"
  return config


def flaxlm(size: str, path: str) -> Callable:
  """The step that `flaxlm.train` runs."""
  from flaxlm.parallel import hosts

  hosts.keep_freed_memory()  # before anything large is allocated, as the trainer does
  import jax

  from flaxlm.data.batches import SyntheticBatches
  from flaxlm.parallel.mesh import one_device
  from flaxlm.program import build, use_config_mesh

  config = gpt2_like(*SIZES[size])
  mesh = one_device()
  program = build(config, mesh)
  _, _, _, length, batch_size, vocabulary = SIZES[size]
  with use_config_mesh(config, mesh):
    state = program.init(jax.random.key(0))
  batch = jax.device_put(SyntheticBatches(length, batch_size, 0, vocabulary)[0])

  def run(steps: int) -> None:
    nonlocal state
    with use_config_mesh(config, mesh):
      for _ in range(steps):
        state, _ = program.train_step(state, batch, None)
    jax.block_until_ready(state)

  return run


def jax_matmul(size: str, path: str) -> Callable:
  import jax
  import jax.numpy as jnp

  x = jnp.ones((MATRIX, MATRIX))
  product = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x))
  return lambda steps: [product(x).block_until_ready() for _ in range(steps)]


def torch_matmul(size: str, path: str) -> Callable:
  import torch

  x = torch.ones(MATRIX, MATRIX)
  return lambda steps: [x @ x for _ in range(steps)]


def torch_steps(size: str, optimizer, parameters, loss_of: Callable) -> Callable:
  """Both PyTorch trainers' loop: loss, backward, clip, update."""
  import torch

  _, _, _, length, batch_size, vocabulary = SIZES[size]
  tokens = torch.randint(vocabulary, (batch_size, length + 1))
  parameters = list(parameters)

  def run(steps: int) -> None:
    for _ in range(steps):
      loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
      loss.backward()
      torch.nn.utils.clip_grad_norm_(parameters, 1.0)
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)

  return run


def nanogpt(size: str, path: str, compiled: bool = False) -> Callable:
  import torch

  sys.path.insert(0, path)
  from model import GPT, GPTConfig

  layers, heads, width, length, _, vocabulary = SIZES[size]
  config = GPTConfig(length, vocabulary, layers, heads, width, 0.0, False)
  model = GPT(config)
  optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
  called = torch.compile(model) if compiled else model
  return torch_steps(size, optimizer, model.parameters(), lambda x, y: called(x, y)[1])


def nanogpt_compiled(size: str, path: str) -> Callable:
  return nanogpt(size, path, compiled=True)


def hugging_face(size: str, path: str, attention: str = "sdpa") -> Callable:
  """GPT2LMHeadModel with the fused AdamW that transformers' Trainer uses."""
  import torch
  import transformers

  layers, heads, width, length, _, vocabulary = SIZES[size]
  config = transformers.GPT2Config(
    vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers,
    n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    attn_implementation=attention,
  )  # fmt: skip
  model = transformers.GPT2LMHeadModel(config).train()
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

  def loss_of(x, y):  # it shifts labels itself
    return model(input_ids=x, labels=x, use_cache=False).loss

  return torch_steps(size, optimizer, model.parameters(), loss_of)


def hugging_face_eager(size: str, path: str) -> Callable:
  return hugging_face(size, path, "eager")


PROGRAMS = {
  "flaxlm": flaxlm,
  "nanoGPT": nanogpt,
  "nanoGPT compiled": nanogpt_compiled,
  "nanoGPT, our allocator setting": nanogpt,
  "transformers eager": hugging_face_eager,
  "transformers sdpa": hugging_face,
  "matmul jax": jax_matmul,
  "matmul torch": torch_matmul,
}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("program", choices=list(PROGRAMS))
  parser.add_argument("size", choices=list(SIZES))
  parser.add_argument("--path", default="", help="the clone of nanoGPT")
  args = parser.parse_args()
  # Libraries print; only answers may reach the driver.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  start = time.perf_counter()
  run = PROGRAMS[args.program](args.size, args.path)
  run(1)
  answers.write(f"{time.perf_counter() - start}\n")
  for line in sys.stdin:
    start = time.perf_counter()
    run(int(line))
    answers.write(f"{time.perf_counter() - start}\n")


if __name__ == "__main__":
  main()
