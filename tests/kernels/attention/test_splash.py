"""The TPU kernel, in interpret mode, equals the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.config.check import check_config
from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.attention import attention
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.runs import program as programs

B, L, N, K, H = 1, 256, 4, 2, 64
SEGMENTS = jnp.repeat(jnp.array([[1, 2, 3, 3]]), L // 4, axis=1)
IDS = {"q_segment_ids_BL": SEGMENTS, "k_segment_ids_BM": SEGMENTS}
splash = functools.partial(attention, **IDS, backend="splash", interpret=True)


def inputs(seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v, cotangent = (
    jax.random.normal(key, (B, L, heads, H))
    for key, heads in zip(keys, (N, K, K, N), strict=True)
  )
  return (q, k, v), cotangent


@pytest.mark.parametrize(
  "options",
  [
    {"causal": True, "softcap": 5.0},
    {"causal": True, "window": 100},
    {"causal": False, "window": 70, "scale": 0.3},
  ],
  ids=str,
)
def test_it_equals_the_reference_in_values_and_gradients(options):
  arrays, cotangent = inputs()

  def pull(function):
    out, back = jax.vjp(function, *arrays)
    return out, *back(cotangent)

  got = pull(lambda *x: splash(*x, **options))
  expected = pull(lambda *x: attention(*x, backend="reference", **IDS, **options))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


def test_layers_of_a_scan_choose_their_window():
  arrays, _ = inputs()

  def run(window):
    return splash(*arrays, window=window, sliding_window=100)

  for window in (0, 100):
    np.testing.assert_array_equal(jax.jit(run)(jnp.int32(window)), run(window))


def test_shapes_that_it_cannot_compute_are_refused():
  (q, k, v), _ = inputs()
  with pytest.raises(ValueError, match="attention=auto"):
    attention(q[:, :100], k[:, :100], v[:, :100], backend="splash")


def test_a_prefix_or_another_machine_is_refused(tiny, one_device):
  tiny.model.attention = "splash"
  with pytest.raises(ConfigError, match="a TPU, and this is a cpu"):
    programs.build_program(tiny, one_device)
  model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(0))
  ids = jnp.ones((1, 8), jnp.int32)
  with pytest.raises(ValueError, match="no prefix that"):
    model(ids, ids, ids, prefix_BL=ids)
  tiny.objective.kind = "prefix"
  with pytest.raises(ConfigError, match="no prefix that"):
    check_config(tiny)
