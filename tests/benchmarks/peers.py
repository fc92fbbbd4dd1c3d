"""Run one trainer in its own process, which computes when a line on stdin says so.

  python tests/benchmarks/peers.py flaxlm char        # then lines with numbers of steps

Answers each line with the seconds that these steps took, and the line `memory` with the
peak bytes in use on a GPU. The time of the first step comes first, without a request.
`train_speed.py` starts several that take turns; `gpu_speed.py` starts one after the
other. Peers run as their users run them, untuned: the documented optimizer, gradients
clipped at 1; float32 on a CPU, float32 weights with bfloat16 products on a GPU. flaxlm
itself imports none of their code.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from flaxlm import machine


class Size(NamedTuple):
  """A GPT-2 model, or a Llama model if `kv_heads` is given."""

  layers: int
  heads: int
  width: int
  length: int
  batch: int
  vocabulary: int
  kv_heads: int = 0
  mlp: int = 0  # 0 means four times the width
  gpu: bool = False  # measured on a GPU, with bfloat16 products


SIZES = {
  "char": Size(4, 4, 128, 64, 12, 65),
  "baby": Size(6, 6, 384, 256, 8, 65),
  "gpt2_124m": Size(12, 12, 768, 512, 1, 50257),
}
# All trainers pad GPT-2's vocabulary as nanoGPT's does.
GPU_SIZES = {
  "gpt2_124m_1k": Size(12, 12, 768, 1024, 32, 50304, gpu=True),
  "gpt2_124m_8k": Size(12, 12, 768, 8192, 4, 50304, gpu=True),
  "gpt2_1_5b": Size(48, 25, 1600, 1024, 8, 50304, gpu=True),
  "llama_1b": Size(16, 32, 2048, 4096, 2, 128256, 8, 8192, gpu=True),
  "llama_3b": Size(28, 24, 3072, 4096, 2, 128256, 8, 8192, gpu=True),
}
TINY_SIZES = {  # small enough for a CPU, to check that everything runs
  "gpt2_tiny": Size(2, 2, 64, 64, 2, 128, gpu=True),
  "llama_tiny": Size(2, 2, 64, 64, 2, 128, 1, 176, gpu=True),
}
ALL_SIZES = SIZES | GPU_SIZES | TINY_SIZES
# For the row that shows the effect of flaxlm's allocator setting on nanoGPT.
KEEP_MEMORY = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
  "MALLOC_TOP_PAD_": str(64 << 20),
  "MALLOC_ARENA_MAX": "1",
}


def matrix_of(size: str) -> int:
  """Returns the size of the square matrices whose product is the limit."""
  return 8192 if size in GPU_SIZES else 2048 if size in SIZES else 512


def config_of(size: str):
  """Returns flaxlm's config of that size, without dropout and biases."""
  import common  # noqa: F401  makes this clone importable

  from flaxlm.config import base

  at = ALL_SIZES[size]
  config = base.get_config()
  config.tokenizer.vocab_size = at.vocabulary
  config.data.seq_len = at.length
  config.data.batch_size = at.batch
  config.data.loader = "synthetic"
  model = config.model
  model.num_layers = at.layers
  model.num_heads, model.num_kv_heads = at.heads, at.kv_heads or at.heads
  model.embed_dim = at.width
  model.head_dim = at.width // at.heads
  model.mlp_dim = at.mlp or 4 * at.width
  model.dtype = "bfloat16" if at.gpu else "float32"
  model.unroll = 1 if at.gpu else at.layers
  if not at.kv_heads:
    model.positions, model.norm = "learned", "layernorm"
    model.gated_mlp, model.activation = False, "gelu_tanh"
  return config


def flaxlm(size: str, path: str, **knobs) -> Callable:
  """Returns the step that `flaxlm.train` runs; `knobs` change config.model."""

  machine.keep_freed_memory()  # as the trainer does, before large allocations
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # as launch/ does
  import jax

  from flaxlm.data.batches.synthetic import SyntheticBatches
  from flaxlm.parallel.mesh import one_device
  from flaxlm.runs.program import build_program, use_config_mesh

  at, config = ALL_SIZES[size], config_of(size)
  config.model.update(knobs)
  mesh = one_device()
  program = build_program(config, mesh)
  with use_config_mesh(config, mesh):
    state = program.init(jax.random.key(0))
  batch = SyntheticBatches(at.length, at.batch, 0, at.vocabulary)[0]
  batch = jax.device_put(batch)

  def run(steps: int) -> None:
    nonlocal state
    with use_config_mesh(config, mesh):
      for _ in range(steps):
        state, _ = program.train_step(state, batch, None)
    jax.block_until_ready(state)

  return run


def flaxlm_unrolled(size: str, path: str) -> Callable:
  return flaxlm(size, path, unroll=ALL_SIZES[size].layers)


def flaxlm_fp8(size: str, path: str) -> Callable:
  return flaxlm(size, path, quantize="fp8")


def flaxlm_remat(size: str, path: str) -> Callable:
  return flaxlm(size, path, remat="dots")


def jax_matmul(size: str, path: str) -> Callable:
  import jax
  import jax.numpy as jnp

  n, dtype = matrix_of(size), jnp.bfloat16 if ALL_SIZES[size].gpu else jnp.float32
  x = jax.random.normal(jax.random.key(0), (n, n), dtype)  # zeros would multiply faster
  product = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x))

  def run(steps: int) -> None:
    for _ in range(steps):
      y = product(x)
    y.block_until_ready()

  return run


def torch_matmul(size: str, path: str) -> Callable:
  import torch

  x = torch.randn(matrix_of(size), matrix_of(size), device=torch_device(size))
  x = x.bfloat16() if ALL_SIZES[size].gpu else x
  return waiting(size, lambda: x @ x)


def torch_device(size: str) -> str:
  import torch

  return "cuda" if ALL_SIZES[size].gpu and torch.cuda.is_available() else "cpu"


def waiting(size: str, step: Callable) -> Callable:
  """Returns a function that runs some steps and waits until the device is done."""
  import torch

  def run(steps: int) -> None:
    for _ in range(steps):
      step()
    if torch_device(size) == "cuda":
      torch.cuda.synchronize()

  return run


def torch_steps(size: str, optimizer, parameters, loss_of: Callable) -> Callable:
  """Returns the step of both PyTorch trainers: loss, backward, clip, update."""
  import torch

  at, device = ALL_SIZES[size], torch_device(size)
  torch.backends.cuda.matmul.allow_tf32 = True  # as nanoGPT does
  tokens = torch.randint(at.vocabulary, (at.batch, at.length + 1), device=device)
  parameters = list(parameters)

  def step() -> None:
    with torch.autocast(device, torch.bfloat16, enabled=at.gpu):
      loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  return waiting(size, step)


def nanogpt(size: str, path: str, compiled: bool = False) -> Callable:
  import torch

  sys.path.insert(0, path)
  from model import GPT, GPTConfig

  at, device = ALL_SIZES[size], torch_device(size)
  if at.kv_heads:
    raise ValueError(f"nanoGPT has no Llama model, but {size} is one")
  shape = at.length, at.vocabulary, at.layers, at.heads, at.width
  model = GPT(GPTConfig(*shape, 0.0, False)).to(device)
  optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
  called = torch.compile(model) if compiled else model
  return torch_steps(size, optimizer, model.parameters(), lambda x, y: called(x, y)[1])


def nanogpt_compiled(size: str, path: str) -> Callable:
  return nanogpt(size, path, compiled=True)


def hugging_face(
  size: str, path: str, attention: str = "sdpa", compiled: bool = False
) -> Callable:
  """Trains a causal transformers model with the fused AdamW that its Trainer uses."""
  import torch
  import transformers

  at = ALL_SIZES[size]
  if at.kv_heads:
    config = transformers.LlamaConfig(
      vocab_size=at.vocabulary, max_position_embeddings=at.length,
      hidden_size=at.width, num_hidden_layers=at.layers, intermediate_size=at.mlp,
      num_attention_heads=at.heads, num_key_value_heads=at.kv_heads,
      tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
  else:
    config = transformers.GPT2Config(
      vocab_size=at.vocabulary, n_positions=at.length, n_embd=at.width,
      n_layer=at.layers, n_head=at.heads, resid_pdrop=0.0, embd_pdrop=0.0,
      attn_pdrop=0.0, attn_implementation=attention,
    )  # fmt: skip
  kinds = transformers.GPT2LMHeadModel, transformers.LlamaForCausalLM
  model = kinds[at.kv_heads > 0](config).to(torch_device(size)).train()
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
  called = torch.compile(model) if compiled else model

  def loss_of(x, y):  # it shifts labels itself
    return called(input_ids=x, labels=x, use_cache=False).loss

  return torch_steps(size, optimizer, model.parameters(), loss_of)


def hugging_face_eager(size: str, path: str) -> Callable:
  return hugging_face(size, path, "eager")


def hugging_face_compiled(size: str, path: str) -> Callable:
  return hugging_face(size, path, compiled=True)


def most_memory(program: str) -> int:
  """Returns the peak bytes in use on this process's GPU; 0 without one."""
  if program.startswith("flaxlm"):
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", 0)
  import torch

  return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


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
GPU_PROGRAMS = {
  "flaxlm": flaxlm,
  "flaxlm unrolled": flaxlm_unrolled,
  "flaxlm fp8": flaxlm_fp8,
  "flaxlm remat": flaxlm_remat,
  "nanoGPT compiled": nanogpt_compiled,
  "transformers compiled": hugging_face_compiled,
  "matmul jax": jax_matmul,
  "matmul torch": torch_matmul,
}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("program", choices=list(PROGRAMS | GPU_PROGRAMS))
  parser.add_argument("size", choices=list(ALL_SIZES))
  parser.add_argument("--path", default="", help="the clone of nanoGPT")
  args = parser.parse_args()
  # Libraries print to stdout, but only answers may reach the driver.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  if not ALL_SIZES[args.size].gpu:  # PyTorch's trainers use the CPU then too
    os.environ["JAX_PLATFORMS"] = "cpu"
  start = time.perf_counter()
  run = (PROGRAMS | GPU_PROGRAMS)[args.program](args.size, args.path)
  run(1)
  answers.write(f"{time.perf_counter() - start}\n")
  for line in sys.stdin:
    if line == "memory\n":
      answers.write(f"{most_memory(args.program)}\n")
      continue
    start = time.perf_counter()
    run(int(line))
    answers.write(f"{time.perf_counter() - start}\n")


if __name__ == "__main__":
  main()
