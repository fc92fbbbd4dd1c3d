"""Scaled dot-product attention: one function, several backends, one definition.

The backend `reference` is the definition (Vaswani et al. 2017, eq. 1, with masks). The
others must equal it, and raise if they cannot honour a mask or a dtype. choice.py lists
what each one can compute.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention import choice
from flaxlm.kernels.attention.choice import Case, refuse_case
from flaxlm.kernels.attention.chunked import chunked_attention, chunks_pay
from flaxlm.kernels.attention.dense import dense_attention
from flaxlm.kernels.attention.masks import check_masks, check_shapes, visible
from flaxlm.kernels.attention.ring import ring_attention
from flaxlm.kernels.attention.splash import splash_attention


def choose_kernel(backend: str, case: Case, device_kind: str) -> str:
  """Returns the kernel that computes `case` on a device of this kind.

  Raises:
    UserError: `backend` cannot compute this. The platform is not checked: `plan` traces
      for machines that are not here.
  """
  if backend == "auto":
    measured = choice.load_measured(device_kind, jax.__version__)
    backend = choice.choose_backend(case, measured)
  refuse_case(backend, case._replace(platform=""))
  return choice.kernel_of(backend, chunks_pay(case.platform, case.L, case.M))


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
  sliding_window: int = 0,
  scale: float = 0.0,
  softcap: float = 0.0,
  backend: str = "xla",
  axis_name: str = "",
  interpret: bool = False,
) -> jax.Array:
  """Returns softmax(scale * q k^T) v as BLNH, in the dtype of `q_BLNH`.

  Query l has key slot `q_offset + l`. It sees slot m if all of these hold: m is at most
  its own slot, or `k_prefix_BM` is set there (causal); the two slots are less than
  `window` apart (window > 0); and their segment ids are equal (both given). N must be a
  multiple of K: query head n reads k/v head n // (N/K). A scale of 0 means H ** -0.5. A
  softcap c limits scores to c * tanh(scores / c) (Gemma 2, arXiv 2408.00118). A sink
  adds one score to each query, neither scaled nor capped, of a key whose value is 0
  (gpt-oss, arXiv 2508.10925; Xiao et al. 2023, arXiv 2309.17453).

  Args:
    q_offset: one for all rows; or one per row, B, where keys are not cut into chunks.
    sliding_window: the value of an array `window` where it is not 0; splash needs it.
    backend: a name in choice.BACKENDS. Call one that is `per_device` in `shard_map`.
    axis_name: the mesh axis that splits the rows, for a backend that `splits_rows`.
    interpret: runs splash's kernel in Pallas's interpreter, where there is no TPU.

  Raises:
    UserError: the backend cannot compute this, or the shapes do not fit.
  """
  check_shapes(q_BLNH, k_BMKH, v_BMKH)
  check_masks(q_segment_ids_BL, k_segment_ids_BM, k_prefix_BM, causal)
  L, H, M = *q_BLNH.shape[1::2], k_BMKH.shape[1]
  here = jax.default_backend()
  platform = "" if choice.find_backend(backend).traces_anywhere else here
  cached = not isinstance(q_offset, int) or q_offset != 0
  given = (k_prefix_BM is not None, sinks_N is not None, cached)
  refuse_case(backend, Case(platform, q_BLNH.dtype.name, L, M, H, softcap, *given))
  kernel = choice.kernel_of(backend, chunks_pay(here, L, M))
  scale = scale or H**-0.5
  rule = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
  arrays, ids = (q_BLNH, k_BMKH, v_BMKH), (q_segment_ids_BL, k_segment_ids_BM)
  if kernel == "splash":
    rule |= {"sliding_window": sliding_window, "interpret": interpret}
    return splash_attention(*arrays, sinks_N, *ids, **rule)
  if kernel == "ring":
    return ring_attention(
      *arrays, *ids, k_prefix_BM, sinks_N, axis_name=axis_name, **rule
    )
  masks = (*ids, k_prefix_BM, q_offset, causal, window)
  return _attend_here(kernel, (*arrays, sinks_N), masks, scale, softcap)


def _attend_here(kernel: str, arrays, masks, scale: float, softcap: float) -> jax.Array:
  """Calls a kernel that takes any mask that `visible` describes."""
  q_BLNH, k_BMKH, _, sinks_N = arrays
  q_segment_ids_BL, _, k_prefix_BM, q_offset, causal, window = masks
  L, M = q_BLNH.shape[1], k_BMKH.shape[1]
  at_start = isinstance(q_offset, int) and q_offset == 0
  square = at_start and L == M and k_prefix_BM is None
  if kernel == "reference":
    arrays = (x if x is None else x.astype(jnp.float32) for x in arrays)
    return _define(*arrays, visible(L, M, *masks), scale, softcap).astype(q_BLNH.dtype)
  elif kernel == "dense":
    mask_BLM = visible(L, M, *masks)
    if softcap or sinks_N is not None:
      return _define(*arrays, mask_BLM, scale, softcap)
    return dense_attention(*arrays[:3], mask_BLM, scale, only_before=causal and square)
  elif kernel == "chunked":
    return chunked_attention(*arrays, *masks, scale, softcap)
  elif kernel == "cudnn":
    # A purely causal mask need not exist as an array.
    plain = square and isinstance(window, int) and not window
    plain &= q_segment_ids_BL is None
    return jax.nn.dot_product_attention(
      *arrays[:3], mask=None if plain else visible(L, M, *masks)[:, None],
      scale=scale, is_causal=causal and plain, implementation="cudnn",
    )  # fmt: skip
  else:
    raise AssertionError(f"{kernel} has a row in choice.py but no branch here")


def _define(
  q_BLNH, k_BMKH, v_BMKH, sinks_N, mask_BLM, scale: float, softcap: float
) -> jax.Array:
  """The definition, with scores in float32. `mask_BLM`: where a query sees a key."""
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
