"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.models.config import RopeConfig


def rotary_frequencies(rope: RopeConfig, head_dim: int, local: bool) -> tuple:
  """Returns (radians per position of the H/2 pairs, float32; factor of sin and cos).

  Scaling: linear (Chen et al. 2023), llama3 (Llama 3.1, by wavelength), yarn (Peng et
  al. 2023, eq. 22 and 23). Local layers with a theta of their own are not scaled: their
  window is as long as in training.
  """
  own = local and rope.local_theta
  pairs = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  plain = 1.0 / np.float32(rope.local_theta if own else rope.theta) ** pairs
  if own or rope.scaling == "none":
    return plain, 1.0
  scaled = plain / np.float32(rope.factor)
  if rope.scaling == "linear":
    return scaled, 1.0
  length = rope.original_max_len
  if rope.scaling == "llama3":
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    turns = length * plain / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (keep * plain + (1 - keep) * scaled).astype(np.float32), 1.0

  def pair_of(turns: float) -> float:  # the pair that turns so often in `length`
    return head_dim * math.log(length / (turns * 2 * math.pi)) / (
      2 * math.log(rope.theta)
    )  # fmt: skip

  first = max(math.floor(pair_of(rope.beta_fast)), 0)
  last = min(math.ceil(pair_of(rope.beta_slow)), head_dim - 1)
  pair = np.arange(head_dim // 2, dtype=np.float32)
  drop = np.clip((pair - first) / max(last - first, 1e-3), 0, 1)
  factor = rope.attention_factor or 0.1 * math.log(max(rope.factor, 1)) + 1
  return (drop * scaled + (1 - drop) * plain).astype(np.float32), factor


def rotary_angles(
  positions_BL: jax.Array, rope: RopeConfig, head_dim: int, local: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Returns (sin, cos) of each position's H/2 angles, as BLH (arXiv 2104.09864)."""
  frequencies, factor = rotary_frequencies(rope, head_dim, local)
  angles = positions_BL[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
  return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x_BLNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs (i, i + H/2) of each head by their position's angles."""
  sin, cos = (a[:, :, None, :].astype(x_BLNH.dtype) for a in angles)
  left, right = jnp.split(x_BLNH, 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
