"""What a chip holds during a step, counted from shapes where nothing can be compiled.

Weights and optimizer state are exact. Activations are what JAX keeps for the backward
pass, found by tracing it. What XLA then shares or pads is not known here.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.config.rules import attention_case
from flaxlm.kernels.attention.choice import FUSED, kernel_of, why_not
from flaxlm.kernels.cross_entropy import chunk_tokens
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.sharding import bytes_per_device
from flaxlm.planning.operations import itemsize, layer_parameters, share


class Memory(NamedTuple):
  """Bytes per chip."""

  parameters: float  # and their average, if one is kept
  optimizer: float  # on the device; offloaded state is not
  gradients: float
  gathered: float  # whole weights of the running layer and of the next
  activations: float
  logits: float

  @property
  def total(self) -> float:
    return sum(self)


def expected_memory(
  config, target, sizes: dict[str, int], fused: bool = False
) -> Memory:
  """Counts the memory of a training step.

  Args:
    target: the abstract TrainState, with shardings (program.Program.target).
    sizes: of the mesh axes.
    fused: attention is a kernel that keeps no scores.
  """
  parameters = bytes_per_device(target.model)
  part, step = share(config, sizes), config.step
  # Accumulation holds the sum of the gradients, and those of the current pass.
  gradients = parameters * (2 if step.accumulation_steps > 1 else 1)
  layer, experts, _ = layer_parameters(config)
  held = (layer + experts / sizes["expert"]) / config.model.num_layers / sizes["tensor"]
  split = sizes["fsdp"] * sizes["context"] * sizes["expert"] > 1
  return Memory(
    parameters + bytes_per_device(target.ema),
    on_device(target.opt_state),
    gradients,
    2 * held * itemsize(config) * split,
    _activation_bytes(config, sizes, fused),
    _logit_bytes(config, sizes, part.tokens),
  )


def on_device(tree) -> float:
  """Returns the bytes on each device of what is not offloaded to the host."""
  leaves = jax.tree.leaves(tree)
  return bytes_per_device(
    [x for x in leaves if x.sharding.memory_kind != "pinned_host"]
  )


def _logit_bytes(config, sizes: dict[str, int], tokens: float) -> float:
  """Returns the bytes of the logits of one chunk of tokens, and of their gradient.

  The gradient has the type of the activations. If there are several chunks, the
  gradient of the output matrix is added up in float32.
  """
  model = config.model
  if model.head not in ("lm", "mlm"):
    return 0.0
  vocab = model.vocab_size / (sizes["tensor"] if config.mesh.rules.vocab else 1)
  chunk = chunk_tokens(math.ceil(tokens), math.ceil(vocab))
  total = 4.0 * model.embed_dim * vocab if chunk < tokens else 0.0
  return min(chunk, tokens) * vocab * (4 + itemsize(config)) + total


def _activation_bytes(config, sizes: dict[str, int], fused: bool) -> float:
  """Returns the bytes kept for the backward pass, and those of the running layer."""
  model = dict(config.model)
  # Offloaded tensors are in the host's memory: here they count as not kept.
  model = TransformerConfig(**(model | {"offload": ()}))
  length, part = config.data.seq_len, share(config, sizes)
  traced = min(length, 2048)  # without scores, the bytes are linear in the length
  case = attention_case(config)._replace(L=traced, M=traced)
  stand_in = FUSED["tpu"]  # of all fused kernels: it can be traced anywhere
  if fused and why_not(stand_in, case) is None:
    model = dataclasses.replace(model, attention=stand_in)
  else:
    traced = length
    backend = "xla" if model.attention == "auto" else model.attention
    backend = kernel_of(backend, chunks_pay=False)
    model = dataclasses.replace(model, attention=backend)
  split = sizes["context"] * (sizes["tensor"] if config.mesh.rules.stream else 1)
  rows = part.rows / split * length / traced

  def kept(model):
    # Experts that drop no tokens have room for all tokens of their group of devices.
    room = sizes["expert"] if model.moe.capacity_factor == 0 else 1
    return kept_bytes(model, traced) + (room - 1) * _expert_bytes(model, traced)

  waiting = rows * kept(model) / sizes["stage"]
  if sizes["stage"] > 1:  # each tick of the pipeline keeps its own activations
    waiting *= part.ticks / config.mesh.stage_repeats
  if model.remat == "none":
    return waiting
  everything = kept(dataclasses.replace(model, remat="none", keep=()))
  return waiting + rows * everything / model.num_layers


def _expert_bytes(model: TransformerConfig, length: int) -> float:
  """Returns the part of `kept_bytes` that is due to the tokens of experts.

  It is what one more expert per token would add, times the experts per token.
  """
  moe = model.moe
  if not moe.num_experts:
    return 0.0
  one_more = dataclasses.replace(moe, experts_per_token=moe.experts_per_token + 1)
  more = kept_bytes(dataclasses.replace(model, moe=one_more), length)
  return moe.experts_per_token * (more - kept_bytes(model, length))


@functools.lru_cache(maxsize=64)
def kept_bytes(model: TransformerConfig, length: int) -> float:
  """Returns the bytes that one row adds to what all layers keep for backward."""

  def residuals(rows: int) -> int:
    one = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def backward(network, tokens, positions, segments):
      def features(network):
        return network(tokens, positions, segments).features

      return jax.vjp(features, network)[1]

    network = jax.eval_shape(lambda key: Transformer(model, nnx.Rngs(key)), key)
    kept = jax.eval_shape(backward, network, one, one, one)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kept))

  key = jax.random.key(0)
  # Weights are kept as well, whatever the rows: the difference leaves them out.
  return float(residuals(2) - residuals(1))
