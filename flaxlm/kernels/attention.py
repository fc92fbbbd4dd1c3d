"""Scaled dot-product attention: one function, several backends, one truth.

`reference` defines the result (Vaswani et al. 2017, eq. 1, with masks). The others must
equal it; one that cannot honour a mask or a type raises and computes nothing else.
"""

import jax
import jax.numpy as jnp

from flaxlm.kernels.dense_attention import dense_attention

BACKENDS = ("reference", "xla", "cudnn")


def attention(
  q_BLNH: jax.Array,
  k_BMKH: jax.Array,
  v_BMKH: jax.Array,
  *,
  q_segment_ids_BL: jax.Array | None = None,
  k_segment_ids_BM: jax.Array | None = None,
  k_prefix_BM: jax.Array | None = None,
  q_offset: jax.Array | int = 0,
  causal: bool = True,
  window: jax.Array | int = 0,
  scale: float = 0.0,
  softcap: float = 0.0,
  backend: str = "auto",
) -> jax.Array:
  """Returns softmax(scale * q k^T) v as BLNH, in the type of `q_BLNH`.

  Query l sits in key slot `q_offset + l`; it sees slot m if all of these hold:
  m <= its own slot or `k_prefix_BM` is set there (causal), its own slot and m are less
  than `window` apart (window > 0), and the segment ids are equal (both given). N must
  be a multiple of K: query head n reads k/v head n // (N/K). scale 0 is H ** -0.5; a
  softcap c bends scores to c * tanh(scores / c) (Gemma 2, arXiv 2408.00118).

  Raises:
    ValueError: the backend cannot compute this, or the shapes do not fit.
  """
  if backend == "auto":  # cudnn, once its masks have been tested on a GPU
    backend = "xla"
  if backend not in BACKENDS:
    raise ValueError(f"attention={backend} is not one of {BACKENDS}")
  check_shapes(q_BLNH, k_BMKH, v_BMKH)
  if (q_segment_ids_BL is None) != (k_segment_ids_BM is None):
    raise ValueError("segment ids are needed for queries and keys, or for neither")
  if k_prefix_BM is not None and not causal:
    raise ValueError("a prefix is defined for causal attention only")
  L, H, M = *q_BLNH.shape[1::2], k_BMKH.shape[1]
  scale = scale or H**-0.5
  # A mask that is causal alone need not exist as an array.
  static = isinstance(q_offset, int) and isinstance(window, int)
  masks = q_segment_ids_BL is not None or k_prefix_BM is not None or window
  plain = static and not masks and q_offset == 0 and L == M
  mask_BLM = None
  if backend != "cudnn" or softcap or not plain:
    mask_BLM = visible(
      L, M, q_segment_ids_BL, k_segment_ids_BM, k_prefix_BM, q_offset, causal, window
    )
  if backend == "cudnn":
    check_cudnn(q_BLNH, softcap)
  if backend == "reference":
    q, k, v = (x.astype(jnp.float32) for x in (q_BLNH, k_BMKH, v_BMKH))
    return dense(q, k, v, mask_BLM, scale, softcap).astype(q_BLNH.dtype)
  if softcap:
    return dense(q_BLNH, k_BMKH, v_BMKH, mask_BLM, scale, softcap)
  if backend == "xla":
    only_before = causal and static and q_offset == 0 and L == M and k_prefix_BM is None
    return dense_attention(q_BLNH, k_BMKH, v_BMKH, mask_BLM, scale, only_before)
  return jax.nn.dot_product_attention(
    q_BLNH, k_BMKH, v_BMKH, mask=None if mask_BLM is None else mask_BLM[:, None],
    scale=scale, is_causal=causal and plain, implementation=backend,
  )  # fmt: skip


def check_shapes(q_BLNH, k_BMKH, v_BMKH) -> None:
  B, _, N, H = q_BLNH.shape
  K = k_BMKH.shape[2]
  if N % K or v_BMKH.shape != k_BMKH.shape or k_BMKH.shape[::3] != (B, H):
    raise ValueError(
      f"shapes do not fit: q {q_BLNH.shape} k {k_BMKH.shape} v {v_BMKH.shape}"
    )


def dense(q_BLNH, k_BMKH, v_BMKH, mask_BLM, scale: float, softcap: float) -> jax.Array:
  """The definition; scores in float32. `mask_BLM`: where a query sees a key."""
  B, L, N, H = q_BLNH.shape
  K = k_BMKH.shape[2]
  q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
  scores = scale * jnp.einsum(
    "BLKGH,BMKH->BKGLM", q_BLKGH, k_BMKH, preferred_element_type=jnp.float32
  )
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  weights = jax.nn.softmax(jnp.where(mask_BLM[:, None, None], scores, -1e30))
  out_BLKGH = jnp.einsum("BKGLM,BMKH->BLKGH", weights.astype(v_BMKH.dtype), v_BMKH)
  return out_BLKGH.reshape(B, L, N, H)


def visible(
  L: int,
  M: int,
  q_segment_ids_BL,
  k_segment_ids_BM,
  k_prefix_BM,
  q_offset,
  causal: bool,
  window,
) -> jax.Array:
  """The mask as booleans, BLM (B is 1 where no rows differ)."""
  q_slot = (q_offset + jnp.arange(L))[None, :, None]
  k_slot = jnp.arange(M)[None, None, :]
  mask = jnp.ones((1, L, M), bool)
  if causal:
    mask = k_slot <= q_slot
    if k_prefix_BM is not None:
      mask = mask | (k_prefix_BM[:, None, :] > 0)
  if not isinstance(window, int):  # the layers of a scan have different ones
    mask = mask & ((window == 0) | (jnp.abs(q_slot - k_slot) < window))
  elif window:
    mask = mask & (jnp.abs(q_slot - k_slot) < window)
  if q_segment_ids_BL is not None:
    mask = mask & (q_segment_ids_BL[:, :, None] == k_segment_ids_BM[:, None, :])
  return mask


def check_cudnn(q_BLNH: jax.Array, softcap: float) -> None:
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
  if softcap:
    raise ValueError(
      "attention=cudnn cannot soft-cap scores\n"
      f"  given:  config.model.attention_softcap = {softcap}\n"
      "  needed: config.model.attention = xla"
    )
