"""Chunks need memory for one block of scores and skip blocks that no query sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.kernels.attention import chunked
from flaxlm.kernels.attention.attention import attention
from flaxlm.kernels.attention.conformance import Inputs, Mask, kernels, pull

B, L, N, K, H = 2, 96, 4, 2, 8
SEGMENTS = np.array([[1] * 20 + [2] * 50 + [3] * 14 + [0] * 12, [1] * 96], np.int32)
PREFIX = (np.arange(L)[None] < np.array([[7], [40]])).astype(np.int32)


@pytest.fixture(autouse=True)
def blocks_of_sixteen(monkeypatch):
  monkeypatch.setattr(chunked, "LARGEST_BLOCK", 16)


def inputs(length=L):
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, dout = (
    jax.random.normal(key, (B, length, heads, H))
    for key, heads in zip(keys, (N, K, K, N), strict=True)
  )
  return Inputs(q, k, v, None, dout, None, None)


CAUSAL = Mask()


def program(given, mask=CAUSAL, backend="chunked"):
  kernel = functools.partial(kernels(backend), mask=mask)
  return jax.jit(functools.partial(pull, kernel)).lower(given).compile()


def temporaries(length, backend):
  given = jax.eval_shape(functools.partial(inputs, length))
  return program(given, backend=backend).memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
  short, long = (temporaries(length, "chunked") for length in (1024, 4096))
  assert long <= 4.2 * short
  short, long = (temporaries(length, "dense") for length in (1024, 4096))
  assert long > 8 * short


@pytest.mark.parametrize(
  "mask",
  [
    Mask(),
    Mask(window=20),
    Mask(causal=False, window=20),
    Mask(packed=True),
    Mask(packed=True, prefix=True),
  ],
  ids=str,
)
def test_blocks_that_nobody_sees_are_not_computed(mask):
  given = inputs()
  if mask.packed:
    given = given._replace(segments_BL=SEGMENTS)
  if mask.prefix:
    given = given._replace(prefix_BL=PREFIX)
  i, j = np.arange(L)[:, None], np.arange(L)[None, :]
  seen = np.broadcast_to(j <= i if mask.causal else True, (B, L, L))
  if mask.prefix:
    seen = seen | (PREFIX[:, None] > 0)
  seen = seen & (abs(i - j) < (mask.window or L))[None]
  if mask.packed:
    seen = seen & (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])
  expected = seen.reshape(B, 6, 16, 6, 16).any((0, 2, 4))
  for row in expected:  # from the first visible to the last
    first, last = np.flatnonzero(row)[[0, -1]]
    row[first : last + 1] = True
  # Anything computed with a NaN is NaN, even at weight 0.
  run, computed = program(given, mask), np.zeros((2, 6, 6), bool)
  for block, slots in enumerate(np.arange(L).reshape(6, 16)):
    poisoned = given._replace(v_BMKH=given.v_BMKH.at[:, slots].set(jnp.nan))
    out, dq, _, _ = run(poisoned)
    for way, x in enumerate((out, dq)):
      computed[way, :, block] = np.isnan(x).reshape(B, 6, -1).any((0, 2))
  np.testing.assert_array_equal(computed, np.stack([expected] * 2))


@pytest.mark.parametrize("backend", ["reference", "dense", "chunked"])
def test_an_offset_and_a_window_may_be_unknown_until_it_runs(backend):
  q, k, v = inputs()[:3]
  sinks = jnp.array([0.5, -1.0, 2.0, 0.0])
  whole = attention(q, k, v, sinks_N=sinks, window=30, backend="reference")
  tail = jax.jit(
    lambda offset, window: attention(
      q[:, 48:], k, v, sinks_N=sinks, q_offset=offset, window=window, backend=backend
    )
  )(jnp.int32(48), jnp.int32(30))
  np.testing.assert_allclose(tail, whole[:, 48:], atol=1e-6)


def test_layers_of_a_scan_keep_no_scores_and_no_masks():
  length, layers = 1024, 4
  x = jax.ShapeDtypeStruct((1, length, N, H), jnp.float32)
  windows = jnp.array([0, 64, 0, 64])

  def loss(x):
    def layer(x, window):
      return x + attention(x, x, x, window=window, backend="chunked"), None

    return jnp.sum(jax.lax.scan(layer, x, windows)[0])

  memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
  # The mask of a single layer would be length ** 2 bytes.
  inputs = layers * length * N * H * 4
  assert memory.temp_size_in_bytes < 8 * inputs + length**2 / 2


def test_a_shape_decides():
  assert chunked.block_size(96) == 16 and chunked.block_size(97) == 1
  assert chunked.chunks_pay("cpu", 2048, 2048) and not chunked.chunks_pay(
    "cpu", 1024, 1024
  )
  assert not chunked.chunks_pay("cpu", 1, 4096)  # decoding
  assert not chunked.chunks_pay("cpu", 509, 509)  # a prime number has no blocks
  assert chunked.chunks_pay("gpu", 8192, 8192) and not chunked.chunks_pay(
    "gpu", 1024, 1024
  )
