"""A ring of any size equals the reference on the whole sequence, with half the work."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from flaxlm.kernels.attention.attention import attention
from flaxlm.kernels.attention.ring import ring_attention, zigzag

B, L, N, K, H = 2, 32, 4, 2, 8
AXES = ("data", "context", "tensor")
HEADS, ROWS = PartitionSpec(*AXES), PartitionSpec("data", "context")
ONES, NONE = np.ones((B, L), np.int32), np.zeros((B, L), np.int32)
# No document ends where a shard does; the rows differ; 0 is padding.
PACKED = np.array(
  [[1] * 5 + [2] * 14 + [3] * 7 + [0] * 6, [1] * 9 + [2] * 23], np.int32
)
PREFIX = (np.arange(L)[None, :] < np.array([[3], [21]])).astype(np.int32)
MASKS = {
  "plain": {},
  "packed": {"segments": PACKED},
  "window": {"window": 7},
  "packed window": {"segments": PACKED, "window": 6},
  "prefix": {"prefix": PREFIX},
  "packed prefix": {"segments": PACKED, "prefix": PREFIX},
}


def make_mesh(data, context, tensor):
  grid = np.array(jax.devices()[: data * context * tensor])
  return jax.sharding.Mesh(
    grid.reshape(data, context, tensor), AXES, axis_types=(AxisType.Auto,) * 3
  )


def inputs(num_kv_heads=K, dtype=jnp.float32, length=L):
  """Returns weights of the loss, queries, keys and values."""
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (N, N, num_kv_heads, num_kv_heads)
  return [
    jax.random.normal(key, (B, length, n, H), dtype)
    for key, n in zip(keys, heads, strict=True)
  ]


def loss_and_gradients(function):
  def loss(w, q, k, v, *masks):
    out = function(q, k, v, *masks)
    return jnp.sum(w.astype(jnp.float32) * out.astype(jnp.float32)), out

  return jax.jit(jax.value_and_grad(loss, (1, 2, 3), has_aux=True))


@functools.cache
def whole(**static):
  """The reference: (w, q, k, v, q and k segments, prefix, window) -> loss, out, …"""

  def function(q, k, v, q_segments, k_segments, prefix, window):
    return attention(
      q, k, v, q_segment_ids_BL=q_segments, k_segment_ids_BM=k_segments,
      k_prefix_BM=prefix, window=window, backend="reference", **static,
    )  # fmt: skip

  return loss_and_gradients(function)


def dealt(C, **static):
  """Returns `function(q, k, v, masks)` of whole sequences, on a ring of C devices."""

  def shard(q, k, v, q_segments, k_segments, prefix, window):
    return ring_attention(
      q, k, v, q_segment_ids_Bl=q_segments, k_segment_ids_Bm=k_segments,
      k_prefix_Bm=prefix, window=window, axis_name="context", **static,
    )  # fmt: skip

  def function(*arrays):
    *arrays, window = arrays
    order = zigzag(arrays[0].shape[1], C)
    arrays = [None if x is None else x[:, order] for x in arrays]
    ring = jax.shard_map(
      shard,
      mesh=make_mesh(1, C, 1),
      in_specs=(HEADS,) * 3 + (ROWS,) * 3 + (PartitionSpec(),),
      out_specs=HEADS,
      check_vma=False,
    )
    return ring(*arrays, window)[:, np.argsort(zigzag(arrays[0].shape[1], C))]

  return function


@functools.cache
def ring(C, block_size=4, **static):
  return loss_and_gradients(dealt(C, block_size=block_size, **static))


def masks(segments=ONES, prefix=NONE, window=0, causal=True):
  return segments, segments, prefix if causal else None, jnp.int32(window)


def assert_equal(given, expected, atol=2e-5):
  for x, y in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
  "C",
  [2, 8, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4))],
)
def test_a_ring_equals_the_whole(C, causal):
  for name, mask in MASKS.items():
    if causal or "prefix" not in name:
      arguments = (*inputs(), *masks(causal=causal, **mask))
      expected = whole(causal=causal)(*arguments)
      assert_equal(ring(C, causal=causal)(*arguments), expected)


@pytest.mark.parametrize(
  "static",
  [
    {"num_kv_heads": 4},
    {"num_kv_heads": 1, "block_size": 3},  # half a shard is 8 keys: blocks of 2
    {"softcap": 0.7, "scale": 0.9, "window": 5},
  ],
  ids=lambda static: "-".join(static),
)
def test_what_is_static_equals_the_whole(static):
  static = dict(static)
  num_kv_heads, window = static.pop("num_kv_heads", K), static.pop("window", 0)
  ours = loss_and_gradients(lambda *x: dealt(2, **static)(*x, None, None, None, window))
  static.pop("block_size", None)
  arguments = inputs(num_kv_heads)
  expected = whole(**static)(*arguments, None, None, None, jnp.int32(window))
  assert_equal(ours(*arguments), expected)


def test_bfloat16_stays_near_float32():
  arguments = inputs(dtype=jnp.bfloat16)
  (_, out), gradients = ring(4, causal=True)(*arguments, *masks(PACKED))
  exact = [x.astype(jnp.float32) for x in arguments]
  (_, expected), slopes = whole(causal=True)(*exact, *masks(PACKED))
  for x, y in zip((out, *gradients), (expected, *slopes), strict=True):
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0.02, atol=0.03)


def test_no_query_sees_the_future_or_another_document():
  w, *qkv = inputs()
  for position in range(0, L, 3):
    one_hot = jnp.zeros_like(w).at[0, position].set(w[0, position])
    _, (_, *slopes) = ring(4, causal=True)(one_hot, *qkv, *masks(PACKED))
    expected = (np.arange(L) <= position) & (PACKED[0] == PACKED[0, position])
    for slope_k_or_v in slopes:
      touched = np.abs(slope_k_or_v).sum((2, 3)) > 0
      assert not touched[0, ~expected].any() and not touched[1].any()
    np.testing.assert_array_equal(touched[0], expected)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
  arguments = [*inputs(), *masks(PACKED)]
  q_segments = PACKED.copy()
  q_segments[0, 8:20] = 7
  arguments[4] = q_segments
  (_, out), gradients = ring(2, causal=True)(*arguments)
  assert not np.any(out[0, 8:20]) and not np.any(gradients[0][0, 8:20])
  arguments[0] = arguments[0].at[0, 8:20].set(0.0)
  (_, expected), slopes = whole(causal=True)(*arguments)
  expected = expected.at[0, 8:20].set(0.0)
  assert_equal((out, gradients), (expected, slopes))


@pytest.mark.parametrize("name", MASKS)
def test_what_nobody_sees_is_not_computed_and_the_work_is_even(name):
  C, mask = 4, {"window": 0, "segments": ONES, "prefix": NONE} | MASKS[name]
  slots = np.arange(L)
  seen = (slots <= slots[:, None])[None] | (mask["prefix"][:, None] > 0)
  near = np.abs(slots - slots[:, None]) < (mask["window"] or L)
  seen &= near[None] & (mask["segments"][:, None] == mask["segments"][:, :, None])
  expected = seen.reshape(B, 2 * C, L // (2 * C), 2 * C, -1).any((0, 2, 4))
  # Anything computed with a NaN is NaN, even at weight 0.
  computed = np.zeros((2, 2 * C, 2 * C), bool)
  w, q, k, v = inputs()
  for chunk, slots in enumerate(np.arange(L).reshape(2 * C, -1)):
    poisoned = v.at[:, slots].set(jnp.nan)
    (_, out), (dq, _, _) = ring(C, causal=True)(w, q, k, poisoned, *masks(**mask))
    for way, x in enumerate((out, dq)):
      computed[way, :, chunk] = np.isnan(x).reshape(B, 2 * C, -1).any((0, 2))
  np.testing.assert_array_equal(computed, np.stack([expected] * 2))
  if name == "plain":
    chunks = expected.sum(1)
    np.testing.assert_array_equal(chunks[:C] + chunks[: -C - 1 : -1], [2 * C + 1] * C)


def test_layers_of_a_scan_over_a_mesh_of_three_axes():
  D, windows = 16, jnp.array([0, 9])
  keys = jax.random.split(jax.random.key(1), 3)
  x = jax.random.normal(keys[0], (B, L, D))
  weights = (
    0.3 * jax.random.normal(keys[1], (2, D, 2, N, H)),
    0.3 * jax.random.normal(keys[2], (2, N, H, D)),
  )
  order, places = zigzag(L, 2), np.argsort(zigzag(L, 2))

  def ours(q, k, v, segments, window):
    def shard(q, k, v, segments):
      ids = {"q_segment_ids_Bl": segments, "k_segment_ids_Bm": segments}
      return ring_attention(q, k, v, axis_name="context", window=window, **ids)

    return jax.shard_map(
      shard, in_specs=(HEADS,) * 3 + (ROWS,), out_specs=HEADS, check_vma=False
    )(q, k, v, segments)

  def reference(q, k, v, segments, window):
    ids = {"q_segment_ids_BL": segments, "k_segment_ids_BM": segments}
    return attention(q, k, v, window=window, backend="reference", **ids)

  def loss(weights, x, segments, attend):
    @jax.checkpoint
    def layer(x, layer):
      (w_in, w_out), window = layer
      q, k = jnp.moveaxis(jnp.einsum("BLD,DPNH->BLPNH", x, w_in), 2, 0)
      return x + jnp.einsum(
        "BLNH,NHD->BLD", attend(q, k, jnp.sin(k), segments, window), w_out
      ), None

    x, _ = jax.lax.scan(layer, x, (weights, windows))
    return jnp.sum(jnp.cos(x)), x

  step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=3)
  (_, expected), slopes = step(weights, x, PACKED, reference)
  with jax.set_mesh(make_mesh(2, 2, 2)):
    (_, out), gradients = step(weights, x[:, order], PACKED[:, order], ours)
  assert_equal(out[:, places], expected)
  assert_equal(gradients[0], slopes[0], atol=1e-4)
  assert_equal(gradients[1][:, places], slopes[1])


def test_scores_of_more_than_a_block_never_exist():
  length, C, block_size = 4096, 4, 128
  arguments = [*inputs(length=length), None, None, None, 0]
  step = loss_and_gradients(dealt(C, block_size=block_size))
  shapes = re.findall(r"\w+\[([\d,]+)\]", str(jax.make_jaxpr(step)(*arguments)))
  largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
  assert largest == B * N * length // (2 * C) * block_size


@pytest.mark.parametrize("C", [1, 2, 5])
def test_zigzag_deals_out_a_first_and_a_last_chunk(C):
  order = zigzag(6 * C, C)
  for c, shard in enumerate(order.reshape(C, 2, 3)):
    np.testing.assert_array_equal(shard[:, 0], [3 * c, 3 * (2 * C - 1 - c)])
    np.testing.assert_array_equal(shard - shard[:, :1], [[0, 1, 2]] * 2)
  np.testing.assert_array_equal(np.sort(order), np.arange(6 * C))


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r"data.seq_len=20 mesh.context=4\n.* 8"):
    zigzag(20, 4)
  _, q, k, v = inputs()
  with pytest.raises(ValueError, match="an even number"):
    ring_attention(q[:, :5], k[:, :5], v[:, :5], axis_name="context")
  with pytest.raises(ValueError, match="16 keys"):
    ring_attention(q, k[:, :16], v[:, :16], axis_name="context")
  with pytest.raises(ValueError, match="shapes do not fit"):
    ring_attention(q, k[..., :4], v, axis_name="context")
  with pytest.raises(ValueError, match="or for neither"):
    ring_attention(q, k, v, q_segment_ids_Bl=ONES, axis_name="context")
  with pytest.raises(ValueError, match="causal attention only"):
    ring_attention(q, k, v, k_prefix_Bm=ONES, causal=False, axis_name="context")
