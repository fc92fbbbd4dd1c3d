"""Multi-head attention as a module, and the cache that decoding keeps of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.kernels.attention import attention
from flaxlm.models.layers import (
  Norm,
  TransformerConfig,
  add_bias,
  bias,
  project,
  residual_scale,
  rotary_angles,
  rotate,
  weight,
)
from flaxlm.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
  """Keys and values of the tokens seen so far, for all layers.

  Slots from `length` on are empty; their segment id is -1, which no query has.
  """

  k_SBMKH: jax.Array
  v_SBMKH: jax.Array
  segment_ids_BM: jax.Array
  length: jax.Array

  @classmethod
  def empty(cls, config: TransformerConfig, batch_size: int, max_len: int) -> "KVCache":
    S, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    shape = (S, batch_size, max_len, K, H)
    return cls(
      jnp.zeros(shape, config.dtype),
      jnp.zeros(shape, config.dtype),
      jnp.full((batch_size, max_len), -1, jnp.int32),
      jnp.zeros((), jnp.int32),
    )


class View(NamedTuple):
  """What decides which tokens see each other, and how far apart they are."""

  segment_ids_BL: jax.Array
  prefix_BL: jax.Array | None  # 1: all of its segment see this token (prefix LM)
  angles: tuple | None  # rotary, of global layers
  local_angles: tuple | None  # rotary, of local layers, where these differ

  @classmethod
  def of(cls, config: TransformerConfig, positions_BL, segment_ids_BL, prefix_BL):
    angles = local_angles = None
    if config.positions == "rope":
      angles = rotary_angles(positions_BL, config.rope, config.head_dim)
      if config.rope.local_theta and config.sliding_window:
        local_angles = rotary_angles(positions_BL, config.rope, config.head_dim, True)
    return cls(segment_ids_BL, prefix_BL, angles, local_angles)

  def angles_of(self, window):
    """The rotary angles of a layer that sees `window` tokens, a number or an array."""
    if self.local_angles is None:
      return self.angles
    return jax.tree.map(
      lambda own, other: jnp.where(window > 0, own, other),
      self.local_angles,
      self.angles,
    )


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023); K = N is the ordinary kind."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    D, H = config.embed_dim, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    self.query = weight(rngs, (D, N, H), ("embed", "heads", None))
    self.key = weight(rngs, (D, K, H), ("embed", "heads", None))
    self.value = weight(rngs, (D, K, H), ("embed", "heads", None))
    self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), residual_scale(config))
    qkv_bias = config.use_bias or config.qkv_bias
    self.query_bias = bias((N, H), ("heads", None)) if qkv_bias else None
    self.key_bias = bias((K, H), ("heads", None)) if qkv_bias else None
    self.value_bias = bias((K, H), ("heads", None)) if qkv_bias else None
    self.out_bias = bias((D,), ("norm",)) if config.use_bias else None
    self.query_norm = head_norm(config, N)
    self.key_norm = head_norm(config, K)
    self.config = config

  def __call__(self, x_TD, view: View, window, cache: KVCache | None, layer):
    """Returns (output TD, cache with this layer's keys and values written)."""
    B, L = view.segment_ids_BL.shape

    def heads(weight, bias):
      y_TNH = add_bias(project(x_TD, weight, "TD,DNH->TNH"), bias)
      y_BLNH = y_TNH.reshape(B, L, *y_TNH.shape[1:])
      return constrain(y_BLNH, "batch", None, "heads", None)

    q_BLNH = heads(self.query, self.query_bias)
    k_BMKH = heads(self.key, self.key_bias)
    v_BMKH = heads(self.value, self.value_bias)
    if self.query_norm is not None:
      q_BLNH, k_BMKH = self.query_norm(q_BLNH), self.key_norm(k_BMKH)
    angles = view.angles_of(window)
    if angles is not None:
      q_BLNH, k_BMKH = rotate(q_BLNH, angles), rotate(k_BMKH, angles)

    k_segment_ids_BM, k_prefix_BM, offset = view.segment_ids_BL, view.prefix_BL, 0
    if cache is not None:
      offset, k_segment_ids_BM = cache.length, cache.segment_ids_BM
      at = (layer, 0, offset, 0, 0)
      cache = dataclasses.replace(
        cache,
        k_SBMKH=jax.lax.dynamic_update_slice(cache.k_SBMKH, k_BMKH[None], at),
        v_SBMKH=jax.lax.dynamic_update_slice(cache.v_SBMKH, v_BMKH[None], at),
      )
      k_BMKH, v_BMKH = cache.k_SBMKH[layer], cache.v_SBMKH[layer]
      if k_prefix_BM is not None:  # tokens of the cache come before: seen anyway
        none_BM = jnp.zeros_like(cache.segment_ids_BM)
        k_prefix_BM = jax.lax.dynamic_update_slice(none_BM, k_prefix_BM, (0, offset))

    out_BLNH = attention(
      q_BLNH,
      k_BMKH,
      v_BMKH,
      q_segment_ids_BL=view.segment_ids_BL,
      k_segment_ids_BM=k_segment_ids_BM,
      k_prefix_BM=k_prefix_BM,
      q_offset=offset,
      causal=self.config.causal,
      window=window,
      scale=self.config.attention_scale,
      softcap=self.config.attention_softcap,
      backend=self.config.attention,
    )
    out_TNH = out_BLNH.reshape(B * L, *out_BLNH.shape[2:])
    return add_bias(project(out_TNH, self.out, "TNH,NHD->TD"), self.out_bias), cache


def head_norm(config: TransformerConfig, num_heads: int) -> Norm | None:
  """The RMSNorm of queries or keys: of each head, or of all heads together."""
  if config.qk_norm == "none":
    return None
  if config.qk_norm == "head":
    return Norm((config.head_dim,), config, ("norm",), rms=True)
  return Norm((num_heads, config.head_dim), config, ("heads", None), rms=True)
