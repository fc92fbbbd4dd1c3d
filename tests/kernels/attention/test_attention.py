"""Every backend equals the definition; no mask leaks in values or gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.kernels.attention.attention import attention

B, L, N, H = 2, 12, 4, 8
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)


def inputs(num_kv_heads=N, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (B, L, N, H), dtype)
  k, v = (jax.random.normal(key, (B, L, num_kv_heads, H), dtype) for key in keys[1:])
  return q, k, v


PREFIX = np.array([[1, 1, 1, 0, 0] + [1, 1, 0, 0] + [0] * 3, [1] * 6 + [0] * 6])


def sees(i, j, causal=True, window=0, segments=None, prefix=None) -> bool:
  """Returns whether slot i sees slot j; `segments` and `prefix` are of one row."""
  past = not causal or j <= i or (prefix is not None and prefix[j] > 0)
  near = not window or abs(i - j) < window
  return past and near and (segments is None or segments[i] == segments[j])


def by_hand(q, k, v, scale=H**-0.5, softcap=0.0, segments=None, prefix=None, **mask):
  """The definition in float64 with Python loops; shares no code with the package."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b, n, i in itertools.product(range(B), range(N), range(L)):
    kv = n // (N // k.shape[2])
    rows = {name: x[b] for name, x in (("segments", segments), ("prefix", prefix))
            if x is not None}  # fmt: skip
    seen = [j for j in range(L) if sees(i, j, **mask, **rows)]
    scores = scale * (k[b, seen, kv] @ q[b, i, n])
    if softcap:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    out[b, i, n] = weights / weights.sum() @ v[b, seen, kv]
  return out


MASKS = [
  {"causal": True},
  {"causal": True, "segments": SEGMENTS},
  {"causal": True, "window": 4},
  {"causal": True, "window": 4, "segments": SEGMENTS},
  {"causal": False},
  {"causal": False, "segments": SEGMENTS},
  {"causal": False, "window": 3},
  {"causal": False, "window": 3, "segments": SEGMENTS},
  {"causal": True, "segments": SEGMENTS, "prefix": PREFIX},
  {"causal": True, "softcap": 0.7, "scale": 0.9, "segments": SEGMENTS},
]


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "-".join(mask))
def test_backend_equals_the_definition(backend, num_kv_heads, mask):
  inputs_ = inputs(num_kv_heads)
  arguments = dict(mask)
  segments, prefix = arguments.pop("segments", None), arguments.pop("prefix", None)
  arguments |= {"q_segment_ids_BL": segments, "k_segment_ids_BM": segments}
  arguments |= {"k_prefix_BM": prefix, "backend": backend}
  expected = by_hand(*inputs_, **mask)
  out = attention(*inputs_, **arguments)
  np.testing.assert_allclose(out, expected, atol=2e-6, rtol=1e-5)
  if "window" not in mask:
    arguments["window"] = 0
  # In a scan over layers, the window is unknown when the scan is traced.
  traced = jax.jit(lambda window: attention(*inputs_, **arguments | {"window": window}))
  out = traced(jnp.int32(arguments["window"]))
  np.testing.assert_allclose(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_an_offset_continues_a_sequence(backend):
  q, k, v = inputs()
  whole = attention(q, k, v, backend=backend, window=5)
  tail = attention(q[:, 7:], k, v, q_offset=jnp.int32(7), window=5, backend=backend)
  np.testing.assert_allclose(tail, whole[:, 7:], atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(
  "mask",
  [mask for mask in MASKS if "segments" in mask],
  ids=lambda mask: "-".join(mask),
)
def test_no_query_sees_the_future_or_another_document(backend, mask):
  q, k, v = inputs(2)
  arguments = {name: x for name, x in mask.items() if name != "segments"}
  prefix = arguments.pop("prefix", None)
  arguments |= {"q_segment_ids_BL": SEGMENTS, "k_segment_ids_BM": SEGMENTS}
  rules = {name: mask[name] for name in ("causal", "window") if name in mask}
  rules["prefix"] = None if prefix is None else prefix[0]

  def out_at(k, v, position):
    out = attention(q, k, v, k_prefix_BM=prefix, backend=backend, **arguments)
    return jnp.sum(out[0, position])

  for position in range(L):
    grad_k, grad_v = jax.grad(out_at, (0, 1))(k, v, position)
    touched = np.abs(grad_v[0]).sum((1, 2)) > 0
    expected = [sees(position, j, segments=SEGMENTS[0], **rules) for j in range(L)]
    np.testing.assert_array_equal(touched, expected)
    assert not np.any(grad_k[0, ~touched]) and not np.any(grad_v[1])


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_disturbing_one_document_leaves_the_other_bit_equal(backend):
  q, k, v = inputs()
  segments = {"q_segment_ids_BL": SEGMENTS, "k_segment_ids_BM": SEGMENTS}

  def gradients(k, v):
    def loss(q, k, v):
      out = attention(q, k, v, backend=backend, **segments)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  (_, out), grads = gradients(k, v)
  (_, out2), grads2 = gradients(k.at[0, :5].multiply(-3.0), v.at[0, :5].add(1e4))
  np.testing.assert_array_equal(out[0, 5:9], out2[0, 5:9])
  for grad, grad2 in zip(grads, grads2, strict=True):
    np.testing.assert_array_equal(grad[0, 5:9], grad2[0, 5:9])
  assert not np.array_equal(out[0, :5], out2[0, :5])


def test_bfloat16_stays_near_float32():
  q, k, v = inputs(dtype=jnp.bfloat16)
  exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), backend="reference")
  out = attention(q, k, v, backend="xla")
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_what_a_backend_cannot_do_is_refused():
  q, k, v = inputs()
  with pytest.raises(ValueError, match="needed: an NVIDIA GPU"):
    attention(q, k, v, backend="cudnn")
  with pytest.raises(ValueError, match="does not exist"):
    attention(q, k, v, backend="flash")
  with pytest.raises(ValueError, match="causal attention only"):
    attention(q, k, v, causal=False, k_prefix_BM=PREFIX)
  with pytest.raises(ValueError, match="for neither"):
    attention(q, k, v, q_segment_ids_BL=SEGMENTS)
  with pytest.raises(ValueError, match="do not fit"):
    attention(q, k[:, :, :3], v[:, :, :3])
