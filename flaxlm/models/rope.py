"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.models.config import RopeConfig


def _rotary_frequencies(rope: RopeConfig, head_dim: int, local: bool) -> tuple:
  """Returns (radians per position of the H/2 pairs, float32; factor of sin and cos).

  Scaling: linear (Chen et al. 2023), llama3 (Llama 3.1, by wavelength), yarn (Peng et
  al. 2023, eq. 22 and 23). Local layers with their own theta are not scaled: their
  window has the same length as in training.
  """
  own = local and rope.local_theta
  pairs = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  plain = 1.0 / np.float32(rope.local_theta if own else rope.theta) ** pairs
  scaled = plain / np.float32(rope.factor)
  if own or rope.scaling == "none":
    return plain, 1.0
  elif rope.scaling == "linear":
    return scaled, 1.0
  elif rope.scaling == "llama3":
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    turns = rope.original_max_len * plain / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (keep * plain + (1 - keep) * scaled).astype(np.float32), 1.0
  elif rope.scaling == "yarn":
    drop = _yarn_ramp(rope, head_dim)
    factor = rope.attention_factor or 0.1 * math.log(max(rope.factor, 1)) + 1
    return (drop * scaled + (1 - drop) * plain).astype(np.float32), factor
  else:
    needed = "none, linear, llama3 or yarn"
    raise ConfigError("config.model.rope.scaling", rope.scaling, needed)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Returns how far each pair is scaled: 0 for fast pairs, 1 for slow ones."""

  def pair_of(turns: float) -> float:  # the pair that turns this often in that length
    length = rope.original_max_len
    return head_dim * math.log(length / (turns * 2 * math.pi)) / (
      2 * math.log(rope.theta)
    )  # fmt: skip

  first = max(math.floor(pair_of(rope.beta_fast)), 0)
  last = min(math.ceil(pair_of(rope.beta_slow)), head_dim - 1)
  pair = np.arange(head_dim // 2, dtype=np.float32)
  return np.clip((pair - first) / max(last - first, 1e-3), 0, 1)


def rotary_angles(
  positions_BL: jax.Array, rope: RopeConfig, head_dim: int, local: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Returns (sin, cos) of each position's H/2 angles, as BLH."""
  frequencies, factor = _rotary_frequencies(rope, head_dim, local)
  angles = positions_BL[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
  return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x_BLNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (i, i + H/2) of each head by the angles of their position."""
  sin, cos = (a[:, :, None, :].astype(x_BLNH.dtype) for a in angles)
  left, right = jnp.split(x_BLNH, 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
