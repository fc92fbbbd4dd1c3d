"""All ways to compute one decoder give the same result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.config.load import load_config
from flaxlm.errors import UserError
from flaxlm.models.attention import View
from flaxlm.models.cache import KVCache
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer, describe_weights

GPT2 = {
  "positions": "learned",
  "norm": "layernorm",
  "gated_mlp": False,
  "activation": "gelu_tanh",
  "use_bias": True,
  "num_kv_heads": 4,
}
LLAMA = {
  "positions": "rope",
  "norm": "rmsnorm",
  "qk_norm": "head",
  "tie_embeddings": False,
  "sliding_window": 5,
}


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def config(request, tiny):
  return TransformerConfig(**{**tiny.model, **request.param})


def make(config, key=0):
  """A model whose norms and biases are not at their neutral initial values."""
  model = Transformer(config, nnx.Rngs(key))
  noise = iter(jax.random.split(jax.random.key(9), 99))
  return jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), model
  )


def row(tokens, start=0):
  """Returns one document as a batch of one row."""
  tokens = jnp.asarray(tokens, jnp.int32)[None]
  positions = jnp.arange(start, start + tokens.shape[1])[None]
  return tokens, positions, jnp.ones_like(tokens)


def features(model, *batch):
  return jax.jit(lambda model, *batch: model(*batch)[0])(model, *batch)


TOKENS = np.random.default_rng(0).integers(1, 64, 24)


def test_packed_rows_equal_separate_documents(config):
  model = make(config)
  first, second = TOKENS[:9], TOKENS[9:20]
  packed = jnp.concatenate([first, second, jnp.zeros(4, int)])[None]
  positions = jnp.concatenate([jnp.arange(9), jnp.arange(11), jnp.zeros(4, int)])[None]
  segments = jnp.array([1] * 9 + [2] * 11 + [0] * 4)[None]
  x_BLD = features(model, packed, positions, segments)
  np.testing.assert_allclose(x_BLD[:, :9], features(model, *row(first)), atol=2e-5)
  np.testing.assert_allclose(x_BLD[:, 9:20], features(model, *row(second)), atol=2e-5)


def test_no_position_sees_a_later_one(config):
  model = make(config)
  _, positions, segments = row(TOKENS)

  def feature(embed, position):
    changed = jax.tree.map(lambda x: x, model)
    changed.embed = nnx.Param(embed, axes=("vocab", "embed"))
    x_BLD = changed(jnp.arange(24)[None], positions, segments).features
    return jnp.sum(x_BLD[0, position] ** 2)

  for position in (0, 7, 23):
    # Token i is row i of the embedding, so its gradient shows whether it was seen.
    grads = jax.grad(feature)(model.embed[...], position)
    seen = np.abs(grads[:24]).sum(1) > 0
    window = config.sliding_window * config.num_layers
    first = max(0, position - window + config.num_layers) if window else 0
    assert not seen[position + 1 :].any()
    assert seen[first : position + 1].all() and not seen[:first].any()


@pytest.mark.parametrize(
  ("remat", "unroll"),
  [
    ("none", 1),
    ("full", 1),
    ("dots", 2),
    pytest.param("none", 2, marks=pytest.mark.slow),
    pytest.param("full", 2, marks=pytest.mark.slow),
    pytest.param("dots", 1, marks=pytest.mark.slow),
  ],
)
def test_scan_remat_and_a_plain_loop_agree(config, remat, unroll):
  model = make(config)

  def loss(model):
    x_BLD = model(*row(TOKENS)).features
    return jnp.sum(jnp.sin(model.logits(x_BLD)))

  def by_loop(model):
    """The same network with a Python loop over the layers."""
    one = dataclasses.replace(config, num_layers=1, unroll=1)
    tokens, positions, segments = row(TOKENS)
    x_BLD = model.embed[...][tokens]
    if model.positions is not None:
      x_BLD += model.positions[...][positions]
    view, x_TD = View.of(one, positions, segments, None), x_BLD[0]
    for number in range(config.num_layers):
      block = jax.tree.map(lambda stacked, n=number: stacked[n], model.blocks)
      x_TD, _, _ = block(x_TD, view, one.windows[0], None, number, None)
    return jnp.sum(jnp.sin(model.logits(model.final_norm(x_TD)[None])))

  variant = Transformer(
    dataclasses.replace(config, remat=remat, unroll=unroll), nnx.Rngs(0)
  )
  nnx.update(variant, nnx.state(model))
  expected = jax.jit(jax.value_and_grad(by_loop))(model)
  got = jax.jit(jax.value_and_grad(loss))(variant)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-4, rtol=1e-3)


def test_layers_differ(config):
  model = Transformer(config, nnx.Rngs(0))
  up_SDF = model.blocks.mlp.up[...]
  assert not np.allclose(up_SDF[0], up_SDF[1])
  scale = np.std(model.blocks.mlp.down[...]) * np.sqrt(2 * config.num_layers)
  assert scale == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("split", [1, 10, 23])
def test_cached_decoding_equals_the_whole_sequence(config, split):
  model = make(config)
  whole = features(model, *row(TOKENS))
  cache = KVCache.empty(config, 1, 32)
  run = jax.jit(lambda model, cache, *inputs: model(*inputs, cache=cache)[:2])
  x_BLD, cache = run(model, cache, *row(TOKENS[:split]))
  np.testing.assert_allclose(x_BLD, whole[:, :split], atol=2e-5)
  for i in range(split, 24):
    x_BLD, cache = run(model, cache, *row(TOKENS[i : i + 1], start=i))
    np.testing.assert_allclose(x_BLD[:, 0], whole[:, i], atol=2e-5)
  assert int(cache.length) == 24


def test_bfloat16_computes_in_bfloat16_with_float32_weights(config):
  model = make(dataclasses.replace(config, dtype="bfloat16"))
  exact = make(config)
  x_BLD = features(model, *row(TOKENS))
  assert x_BLD.dtype == jnp.bfloat16 and model.embed[...].dtype == jnp.float32
  assert model.logits(x_BLD).dtype == jnp.float32
  np.testing.assert_allclose(
    x_BLD.astype(jnp.float32), features(exact, *row(TOKENS)), atol=0.15
  )


@pytest.mark.parametrize(
  ("file", "parameters"),
  [("gpt2_124m", 124_439_808), ("llama3_8b", 8_030_261_248)],
)
def test_published_parameter_counts(file, parameters):
  config = TransformerConfig(**load_config(f"configs/{file}.py").model)
  model = jax.eval_shape(
    lambda key: Transformer(config, nnx.Rngs(key)), jax.random.key(0)
  )
  assert sum(np.prod(shape) for _, shape, _ in describe_weights(model)) == parameters


CHOICES = (
  "activation attention dtype head layer_pattern norm norm_placement positions qk_norm "
  "quantize remat rope.scaling moe.router moe.balance"
)


@pytest.mark.parametrize("knob", CHOICES.split())
def test_an_unknown_choice_raises(tiny, knob):
  if knob.startswith("moe."):
    tiny.model.moe.update(num_experts=2, experts_per_token=1, expert_dim=8)
  *groups, name = knob.split(".")
  group = tiny.model[groups[0]] if groups else tiny.model
  group[name] = ("other",) if knob == "layer_pattern" else "other"
  config = TransformerConfig(**tiny.model)
  with pytest.raises((UserError, TypeError), match=f"other|{knob}"):
    jax.eval_shape(lambda: Transformer(config, nnx.Rngs(0))(*row(TOKENS[:4])))
