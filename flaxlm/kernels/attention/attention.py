"""Scaled dot-product attention: one function, several backends, one truth.

`reference` defines the result (Vaswani et al. 2017, eq. 1, with masks). The others must
equal it; one that cannot honour a mask or a type raises and computes nothing else.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention.choice import FORMS, Case, why_not
from flaxlm.kernels.attention.chunked import chunked_attention, pays
from flaxlm.kernels.attention.dense import dense_attention
from flaxlm.kernels.attention.masks import check_masks, check_shapes, visible

# `xla` is by shape `dense`, whose scores exist as a whole, or `chunked`.
HERE = ("reference", "xla", "cudnn", *FORMS)


def attention(
  q_BLNH: jax.Array,
  k_BMKH: jax.Array,
  v_BMKH: jax.Array,
  *,
  q_segment_ids_BL: jax.Array | None = None,
  k_segment_ids_BM: jax.Array | None = None,
  k_prefix_BM: jax.Array | None = None,
  sinks_N: jax.Array | None = None,
  q_offset: jax.Array | int = 0,
  causal: bool = True,
  window: jax.Array | int = 0,
  scale: float = 0.0,
  softcap: float = 0.0,
  backend: str = "xla",
) -> jax.Array:
  """Returns softmax(scale * q k^T) v as BLNH, in the type of `q_BLNH`.

  Query l sits in key slot `q_offset + l`; it sees slot m if all of these hold:
  m <= its own slot or `k_prefix_BM` is set there (causal), its own slot and m are less
  than `window` apart (window > 0), and the segment ids are equal (both given). N must
  be a multiple of K: query head n reads k/v head n // (N/K). scale 0 is H ** -0.5; a
  softcap c bends scores to c * tanh(scores / c) (Gemma 2, arXiv 2408.00118). A sink is
  one more score of each query, neither scaled nor bent, of a key whose value is 0
  (gpt-oss, arXiv 2508.10925; Xiao et al. 2023, arXiv 2309.17453).

  Raises:
    ValueError: the backend cannot compute this, or the shapes do not fit.
  """
  if backend not in HERE:
    raise ValueError(f"attention={backend} is not one of {HERE}")
  check_shapes(q_BLNH, k_BMKH, v_BMKH)
  check_masks(q_segment_ids_BL, k_segment_ids_BM, k_prefix_BM, causal)
  L, H, M = *q_BLNH.shape[1::2], k_BMKH.shape[1]
  scale = scale or H**-0.5
  if backend == "xla":
    backend = "chunked" if pays(jax.default_backend(), L, M) else "dense"
  arrays = (q_BLNH, k_BMKH, v_BMKH, sinks_N)
  masks = (q_segment_ids_BL, k_segment_ids_BM, k_prefix_BM, q_offset, causal, window)
  if backend == "chunked":
    return chunked_attention(*arrays, *masks, scale, softcap)
  if backend == "cudnn":
    case = Case(jax.default_backend(), q_BLNH.dtype.name, L, M, H, softcap)
    refuse_case("cudnn", case._replace(sinks=sinks_N is not None))
  if backend == "reference":
    arrays = (x if x is None else x.astype(jnp.float32) for x in arrays)
    return define(*arrays, visible(L, M, *masks), scale, softcap).astype(q_BLNH.dtype)
  if backend == "dense" and (softcap or sinks_N is not None):
    return define(*arrays, visible(L, M, *masks), scale, softcap)
  at_home = isinstance(q_offset, int) and q_offset == 0
  square = at_home and L == M and k_prefix_BM is None
  if backend == "dense":
    arrays = (*arrays[:3], visible(L, M, *masks))
    return dense_attention(*arrays, scale, only_before=causal and square)
  # A mask that is causal alone need not exist as an array.
  plain = square and q_segment_ids_BL is None and isinstance(window, int) and not window
  return jax.nn.dot_product_attention(
    q_BLNH, k_BMKH, v_BMKH, mask=None if plain else visible(L, M, *masks)[:, None],
    scale=scale, is_causal=causal and plain, implementation="cudnn",
  )  # fmt: skip


def refuse_case(backend: str, case: Case) -> None:
  """Raises ValueError if the backend cannot compute this."""
  if reason := why_not(backend, case):
    raise ValueError(
      f"attention={backend} cannot compute this\n"
      f"  needed: {reason}\n"
      "  try:    config.model.attention=auto"
    )


def define(
  q_BLNH, k_BMKH, v_BMKH, sinks_N, mask_BLM, scale: float, softcap: float
) -> jax.Array:
  """The definition; scores in float32. `mask_BLM`: where a query sees a key."""
  B, L, N, H = q_BLNH.shape
  K = k_BMKH.shape[2]
  q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
  scores = scale * jnp.einsum(
    "BLKGH,BMKH->BKGLM", q_BLKGH, k_BMKH, preferred_element_type=jnp.float32
  )
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask_BLM[:, None, None], scores, -1e30)
  if sinks_N is None:
    weights = jax.nn.softmax(scores)
  else:
    sinks_KG11 = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.logaddexp(lse, sinks_KG11))
  out_BLKGH = jnp.einsum("BKGLM,BMKH->BLKGH", weights.astype(v_BMKH.dtype), v_BMKH)
  return checkpoint_name(out_BLKGH.reshape(B, L, N, H), "attention")
