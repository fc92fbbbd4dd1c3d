"""Every shipped family at a small size: visibility by gradients, and decoding."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.config.load import load_config
from flaxlm.models.cache import KVCache
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer

ROOT = pathlib.Path(__file__).parents[2]
FAMILIES = [
  "gpt3_125m", "llama3_1_8b", "qwen3_0_6b", "mistral_7b", "gemma2_2b", "gemma3_1b",
  "olmo2_1b", "mixtral_8x7b", "deepseek_moe_16b", "bert_tiny", "modernbert_base",
]  # fmt: skip
# Their layers are made of the same parts.
SIBLINGS = [
  "gpt2_124m", "llama2_7b", "qwen2_5_0_5b", "smollm2_135m", "qwen3_30b_a3b",
  "olmoe_1b_7b",
]  # fmt: skip
LENGTH = 20


def shrink(name: str) -> TransformerConfig:
  """Returns the family's structure at small sizes; windows of 4 within 20 tokens."""
  config = load_config(str(ROOT / f"configs/{name}.py"))
  model = config.model
  grouped = model.num_kv_heads < model.num_heads
  model.vocab_size, model.max_len, model.num_layers = 64, 32, 3
  model.layer_pattern = model.layer_pattern[-3:]  # Gemma 3 has six
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 32, 4, 8, 48
  model.num_kv_heads = 2 if grouped else 4
  model.sliding_window = min(model.sliding_window, 4)
  model.dtype, model.remat, model.unroll = "float32", "none", 1
  if model.moe.num_experts:
    model.moe.num_experts, model.moe.expert_dim = 6, 16
    model.moe.experts_per_token = min(model.moe.experts_per_token, 3)
    model.moe.shared_dim = min(model.moe.shared_dim, 16)
  return TransformerConfig(**model)


@pytest.fixture(
  scope="module",
  params=[*FAMILIES, *(pytest.param(x, marks=pytest.mark.slow) for x in SIBLINGS)],
)
def model(request):
  """A model whose norms and biases are not at their neutral initial values."""
  model = Transformer(shrink(request.param), nnx.Rngs(0))
  noise = iter(jax.random.split(jax.random.key(9), 99))
  return jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), model
  )


def reach(config) -> np.ndarray:
  """Returns the matrix [j, i]: whether position j sees i through all layers."""
  distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None, :]
  seen = np.eye(LENGTH, dtype=bool)
  for window in config.windows:
    near = np.abs(distance) < window if window else np.ones_like(seen)
    near &= (distance >= 0) | (not config.causal)
    seen = (near.astype(int) @ seen.astype(int)) > 0
  return seen


def test_no_position_sees_what_it_must_not(model):
  first = np.arange(LENGTH) < 12  # two documents in a row
  segments = jnp.asarray(np.where(first, 1, 2))[None]
  positions = jnp.arange(LENGTH)[None] - 12 * (segments - 1)

  def feature(embed, position):
    changed = jax.tree.map(lambda x: x, model)
    changed.embed = nnx.Param(embed, axes=("vocab", "embed"))
    # Token i is row i of the table, so its gradient shows whether it was seen.
    out = changed(jnp.arange(LENGTH)[None], positions, segments)
    return jnp.sum(jnp.sin(out.features[0, position]))

  gradient = jax.jit(jax.grad(feature))
  allowed = reach(model.config)
  allowed[:12, 12:] = allowed[12:, :12] = False
  for position in range(LENGTH):
    seen = np.abs(gradient(model.embed[...], position)).sum(1)[:LENGTH] > 0
    np.testing.assert_array_equal(seen, allowed[position])


def test_cached_decoding_equals_the_whole_sequence(model):
  if not model.config.causal:
    pytest.skip("an encoder does not decode")
  tokens = np.random.default_rng(0).integers(1, 64, LENGTH)
  positions, ones = np.arange(LENGTH), np.ones((1, LENGTH), int)
  whole = jax.jit(lambda model: model(tokens[None], positions[None], ones).features)
  expected = whole(model)
  cache = KVCache.empty(model.config, 1, 32)
  run = jax.jit(lambda model, cache, *batch: model(*batch, cache=cache)[:2])
  for i in range(LENGTH):
    at = np.s_[None, i : i + 1]
    out, cache = run(model, cache, tokens[at], positions[at], ones[:, :1])
    np.testing.assert_allclose(out, expected[:, i : i + 1], atol=3e-5)
