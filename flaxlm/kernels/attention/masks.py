"""Which query sees which key, and whether shapes fit: shared by all kernels."""

import jax
import jax.numpy as jnp

from flaxlm.errors import UserError


def check_shapes(q_BLNH, k_BMKH, v_BMKH) -> None:
  """Raises UserError if the shapes of queries, keys and values do not fit."""
  B, _, N, H = q_BLNH.shape
  K = k_BMKH.shape[2]
  if N % K or v_BMKH.shape != k_BMKH.shape or k_BMKH.shape[::3] != (B, H):
    raise UserError(
      "attention: the shapes do not fit",
      f"q {q_BLNH.shape} k {k_BMKH.shape} v {v_BMKH.shape}",
      "k and v of one shape, the same batch and head size, and N a multiple of K",
    )


def check_masks(q_segment_ids_BL, k_segment_ids_BM, k_prefix_BM, causal: bool) -> None:
  """Raises UserError if the masks contradict each other."""
  if (q_segment_ids_BL is None) != (k_segment_ids_BM is None):
    raise UserError("segment ids are needed for queries and keys, or for neither")
  if k_prefix_BM is not None and not causal:
    raise UserError("a prefix is defined for causal attention only")


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
  """Returns where a query sees a key, as booleans BLM; B is 1 if all rows agree."""
  q_slot = jnp.asarray(q_offset).reshape(-1, 1, 1) + jnp.arange(L)[None, :, None]
  k_slot = jnp.arange(M)[None, None, :]
  mask = jnp.ones((1, L, M), bool)
  if causal:
    mask = k_slot <= q_slot
    if k_prefix_BM is not None:
      mask = mask | (k_prefix_BM[:, None, :] > 0)
  if not isinstance(window, int):  # layers in a scan may have different windows
    mask = mask & ((window == 0) | (jnp.abs(q_slot - k_slot) < window))
  elif window:
    mask = mask & (jnp.abs(q_slot - k_slot) < window)
  if q_segment_ids_BL is not None:
    mask = mask & (q_segment_ids_BL[:, :, None] == k_segment_ids_BM[:, None, :])
  return mask
