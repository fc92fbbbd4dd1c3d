"""Multi-head attention as a module, and the cache that decoding keeps of it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.kernels.attention import attention
from flaxlm.models.layers import (
  Norm,
  TransformerConfig,
  bias,
  project,
  residual_scale,
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


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023); K = N is the ordinary kind."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    D, H = config.embed_dim, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    self.query = weight(rngs, (D, N, H), ("embed", "heads", None))
    self.key = weight(rngs, (D, K, H), ("embed", "heads", None))
    self.value = weight(rngs, (D, K, H), ("embed", "heads", None))
    self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), residual_scale(config))
    use_bias = config.use_bias
    self.query_bias = bias((N, H), ("heads", None)) if use_bias else None
    self.key_bias = bias((K, H), ("heads", None)) if use_bias else None
    self.value_bias = bias((K, H), ("heads", None)) if use_bias else None
    self.out_bias = bias((D,), ("norm",)) if use_bias else None
    self.query_norm = Norm(H, config, False, False) if config.qk_norm else None
    self.key_norm = Norm(H, config, False, False) if config.qk_norm else None
    self.backend = config.attention
    self.window = config.sliding_window

  def __call__(self, x_TD, segment_ids_BL, angles, cache: KVCache | None, layer):
    """Returns (output TD, cache with this layer's keys and values written)."""
    B, L = segment_ids_BL.shape

    def heads(weight, bias):
      y_TNH = project(x_TD, weight, "TD,DNH->TNH")
      if bias is not None:
        y_TNH += bias[...].astype(x_TD.dtype)[None]
      y_BLNH = y_TNH.reshape(B, L, *y_TNH.shape[1:])
      return constrain(y_BLNH, "batch", None, "heads", None)

    q_BLNH = heads(self.query, self.query_bias)
    k_BMKH = heads(self.key, self.key_bias)
    v_BMKH = heads(self.value, self.value_bias)
    if self.query_norm is not None:
      q_BLNH, k_BMKH = self.query_norm(q_BLNH), self.key_norm(k_BMKH)
    if angles is not None:
      q_BLNH, k_BMKH = rotate(q_BLNH, angles), rotate(k_BMKH, angles)

    k_segment_ids_BM, offset = segment_ids_BL, 0
    if cache is not None:
      offset, k_segment_ids_BM = cache.length, cache.segment_ids_BM
      at = (layer, 0, offset, 0, 0)
      cache = dataclasses.replace(
        cache,
        k_SBMKH=jax.lax.dynamic_update_slice(cache.k_SBMKH, k_BMKH[None], at),
        v_SBMKH=jax.lax.dynamic_update_slice(cache.v_SBMKH, v_BMKH[None], at),
      )
      k_BMKH, v_BMKH = cache.k_SBMKH[layer], cache.v_SBMKH[layer]

    out_BLNH = attention(
      q_BLNH,
      k_BMKH,
      v_BMKH,
      q_segment_ids_BL=segment_ids_BL,
      k_segment_ids_BM=k_segment_ids_BM,
      q_offset=offset,
      window=self.window,
      backend=self.backend,
    )
    out_TD = project(
      out_BLNH.reshape(B * L, *out_BLNH.shape[2:]), self.out, "TNH,NHD->TD"
    )
    if self.out_bias is not None:
      out_TD += self.out_bias[...].astype(x_TD.dtype)[None, :]
    return out_TD, cache
