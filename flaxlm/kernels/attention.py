"""Scaled dot-product attention: one function, several backends, one truth.

`reference` defines the result (Vaswani et al. 2017, eq. 1, with masks). The others must
equal it; one that cannot honour a mask or a type raises and computes nothing else.
"""

import jax
import jax.numpy as jnp

BACKENDS = ("reference", "xla", "cudnn")


def attention(
  q_BLNH: jax.Array,
  k_BMKH: jax.Array,
  v_BMKH: jax.Array,
  *,
  q_segment_ids_BL: jax.Array | None = None,
  k_segment_ids_BM: jax.Array | None = None,
  q_offset: jax.Array | int = 0,
  causal: bool = True,
  window: int = 0,
  backend: str = "auto",
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(H)) v as BLNH, in the type of `q_BLNH`.

  Query l sits in key slot `q_offset + l`; it sees slot m if all of these hold:
  m <= its own slot (causal), its own slot - m < window (window > 0), and the segment
  ids are equal (both given). N must be a multiple of K: query head n reads k/v head
  n // (N/K).

  Raises:
    ValueError: the backend cannot compute this, or the shapes do not fit.
  """
  B, L, N, H = q_BLNH.shape
  M, K = k_BMKH.shape[1:3]
  if N % K or v_BMKH.shape != k_BMKH.shape or k_BMKH.shape[::3] != (B, H):
    raise ValueError(
      f"shapes do not fit: q {q_BLNH.shape} k {k_BMKH.shape} v {v_BMKH.shape}"
    )
  if window and not causal:
    raise ValueError("a sliding window is defined for causal attention only")
  if (q_segment_ids_BL is None) != (k_segment_ids_BM is None):
    raise ValueError("segment ids are needed for queries and keys, or for neither")
  if backend == "auto":  # cudnn, once its masks have been tested on a GPU
    backend = "xla"
  if backend not in BACKENDS:
    raise ValueError(f"attention={backend} is not one of {BACKENDS}")
  # A mask that is causal alone need not exist as an array.
  plain = (
    q_segment_ids_BL is None and isinstance(q_offset, int) and q_offset == 0 and L == M
  )
  mask_BLM = None
  if backend == "reference" or not plain:
    mask_BLM = visible(
      L, M, q_segment_ids_BL, k_segment_ids_BM, q_offset, causal, window
    )
  if backend == "reference":
    return reference(q_BLNH, k_BMKH, v_BMKH, mask_BLM)
  if backend == "cudnn":
    check_cudnn(q_BLNH)
  return jax.nn.dot_product_attention(
    q_BLNH,
    k_BMKH,
    v_BMKH,
    mask=None if mask_BLM is None else mask_BLM[:, None],
    is_causal=causal and plain,
    local_window_size=(window - 1, 0) if window and plain else None,
    implementation=backend,
  )


def reference(q_BLNH, k_BMKH, v_BMKH, mask_BLM) -> jax.Array:
  """The definition, in float32. `mask_BLM` is True where a query sees a key."""
  B, L, N, H = q_BLNH.shape
  K = k_BMKH.shape[2]
  q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H).astype(jnp.float32)
  scores = (
    jnp.einsum("BLKGH,BMKH->BKGLM", q_BLKGH, k_BMKH.astype(jnp.float32)) * H**-0.5
  )
  weights = jax.nn.softmax(jnp.where(mask_BLM[:, None, None], scores, -1e30))
  out_BLKGH = jnp.einsum("BKGLM,BMKH->BLKGH", weights, v_BMKH.astype(jnp.float32))
  return out_BLKGH.reshape(B, L, N, H).astype(q_BLNH.dtype)


def visible(L, M, q_segment_ids_BL, k_segment_ids_BM, q_offset, causal, window):
  """The mask as booleans, BLM (B is 1 without segment ids)."""
  q_slot = (q_offset + jnp.arange(L))[None, :, None]
  k_slot = jnp.arange(M)[None, None, :]
  mask = jnp.ones((1, L, M), bool)
  if causal:
    mask &= k_slot <= q_slot
  if window:
    mask &= q_slot - k_slot < window
  if q_segment_ids_BL is not None:
    mask = mask & (q_segment_ids_BL[:, :, None] == k_segment_ids_BM[:, None, :])
  return mask


def check_cudnn(q_BLNH: jax.Array) -> None:
  if jax.default_backend() != "gpu":
    raise ValueError(
      "attention=cudnn needs an NVIDIA GPU\n"
      f"  given:  {jax.default_backend()}\n"
      "  needed: config.model.attention = auto, xla or reference"
    )
  if q_BLNH.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      "attention=cudnn computes in 16 bits only\n"
      f"  given:  {q_BLNH.dtype}\n"
      "  needed: config.model.dtype = bfloat16, or config.model.attention = xla"
    )
