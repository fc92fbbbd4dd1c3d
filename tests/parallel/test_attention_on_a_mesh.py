"""Attention in a model on a mesh: sinks, and chunks that stay on their device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.kernels.attention import attention, chunked
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import KVCache, Transformer, describe_weights
from flaxlm.training.optim import decays
from tests.parallel.test_sharding import assert_same_gradient, gradient, mesh_of


@pytest.fixture
def config(tiny):
  model = tiny.model
  model.num_heads = model.num_kv_heads = 8
  model.head_dim, model.num_layers = 4, 4
  model.attention_sinks = True
  model.sliding_window, model.layer_pattern = 5, ("local", "global")
  return tiny


@pytest.mark.slow
@pytest.mark.parametrize(
  ("backend", "split"),
  [
    ("ring", {"context": 2, "tensor": 2, "data": 2}),
    pytest.param("xla", {"context": 2, "tensor": 2, "fsdp": 2}, marks=pytest.mark.slow),
    pytest.param("xla", {"stage": 2, "tensor": 2, "data": 2}, marks=pytest.mark.slow),
  ],
)
def test_sinks_and_chunks_on_a_mesh(config, backend, split, one_device, monkeypatch):
  expected = gradient(config, one_device)
  sinks = expected[1].blocks.attention.sinks[...]
  assert sinks.shape == (4, 8) and np.all(sinks != 0)
  monkeypatch.setattr(chunked, "LARGEST_BLOCK", 8)
  monkeypatch.setattr(attention, "chunks_pay", lambda *_: True)
  config.model.attention = backend
  model = expected[3]
  assert_same_gradient(gradient(config, one_device, model), expected)
  assert_same_gradient(gradient(*mesh_of(config, **split), model), expected)


def test_sinks_have_a_name_and_do_not_decay(config):
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(0))
  rows = [row for row in describe_weights(model) if "sinks" in row[0]]
  assert rows == [("blocks/attention/sinks", (4, 8), ("heads",))]
  assert not jax.tree.leaves(decays(model).blocks.attention.sinks)[0]


def test_a_cache_sees_the_sinks(config):
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(0))
  sinks = model.blocks.attention.sinks
  sinks[...] = jnp.linspace(-2.0, 2.0, 32).reshape(4, 8)
  row = SyntheticBatches(32, 1, 0, 64)[0]
  tokens, ones = jnp.asarray(row["tokens"]), jnp.ones((1, 32), jnp.int32)
  places = jnp.arange(32)[None]
  run = jax.jit(lambda model, *inputs, cache=None: model(*inputs, cache=cache))
  whole = run(model, tokens, places, ones).features
  cache, parts = KVCache.empty(model.config, 1, 32), []
  for span in (slice(0, 20), slice(20, 21), slice(21, 32)):
    out = run(model, tokens[:, span], places[:, span], ones[:, span], cache=cache)
    parts, cache = [*parts, out.features], out.cache
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
  sinks[...] = jnp.full((4, 8), -1e9)
  assert np.abs(run(model, tokens, places, ones).features - whole).max() > 1e-3
