"""Which query sees which key, and whether their shapes fit: what all kernels share."""

import jax
import jax.numpy as jnp

from flaxlm.errors import UserError


def check_shapes(q_BLNH, k_BMKH, v_BMKH) -> None:
  B, _, N, H = q_BLNH.shape
  K = k_BMKH.shape[2]
  if N % K or v_BMKH.shape != k_BMKH.shape or k_BMKH.shape[::3] != (B, H):
    raise UserError(
      f"shapes do not fit: q {q_BLNH.shape} k {k_BMKH.shape} v {v_BMKH.shape}"
    )


def check_masks(q_segment_ids_BL, k_segment_ids_BM, k_prefix_BM, causal: bool) -> None:
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
