"""Multi-head attention as a module, and the cache that decoding keeps of it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention.attention import attention
from flaxlm.models.attend import View, attend, mask_and_scale, value_of
from flaxlm.models.cache import KVCache
from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import Norm, add_bias, bias, project, residual_scale, weight
from flaxlm.models.rope import rotate
from flaxlm.parallel.sharding import constrain, join_rows, split_rows


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
    self.sinks = bias((N,), ("heads",)) if config.attention_sinks else None
    self.config = config

  def __call__(self, x_TD, view: View, window, cache: KVCache | None, layer):
    """Returns (output TD, cache with this layer's keys and values written)."""

    def heads(weight, bias):
      y_TNH = add_bias(project(x_TD, weight, quantize=self.config.quantize), bias)
      y_BLNH = split_rows(y_TNH, view.segment_ids_BL.shape[0])
      return constrain(y_BLNH, "batch", "length", "heads", None)

    q_BLNH = heads(self.query, self.query_bias)
    k_BMKH = heads(self.key, self.key_bias)
    v_BMKH = heads(self.value, self.value_bias)
    if self.query_norm is not None:
      q_BLNH, k_BMKH = self.query_norm(q_BLNH), self.key_norm(k_BMKH)
    angles = view.angles_of(window)
    if angles is not None:
      q_BLNH, k_BMKH = rotate(q_BLNH, angles), rotate(k_BMKH, angles)
    q_BLNH = checkpoint_name(q_BLNH, "query")
    k_BMKH, v_BMKH = checkpoint_name(k_BMKH, "key"), checkpoint_name(v_BMKH, "value")

    if cache is None:
      out_BLNH = attend(
        self.config, q_BLNH, k_BMKH, v_BMKH, value_of(self.sinks), view, window
      )
    else:
      offset = cache.length
      cache, groups = cache.append(layer, k_BMKH, v_BMKH)
      k_prefix_BM = None
      if view.prefix_BL is not None:  # tokens of the cache come before: seen anyway
        none_BM = jnp.zeros_like(cache.segment_ids_BM)
        k_prefix_BM = jax.lax.dynamic_update_slice(none_BM, view.prefix_BL, (0, offset))
      in_cache = "reference" if self.config.attention == "reference" else "xla"
      outs = [
        attention(
          q_BLNH[rows], k_BMKH, v_BMKH, q_segment_ids_BL=view.segment_ids_BL[rows],
          k_segment_ids_BM=cache.segment_ids_BM[rows],
          k_prefix_BM=None if k_prefix_BM is None else k_prefix_BM[rows],
          q_offset=offset, sinks_N=value_of(self.sinks), window=window,
          backend=in_cache, **mask_and_scale(self.config),
        )
        for rows, k_BMKH, v_BMKH in groups
      ]  # fmt: skip
      out_BLNH = jnp.concatenate(outs)
    out_BLNH = constrain(out_BLNH, "batch", "length", "heads", None)
    out_TD = project(join_rows(out_BLNH), self.out, 2, self.config.quantize)
    return add_bias(out_TD, self.out_bias), cache


def head_norm(config: TransformerConfig, num_heads: int) -> Norm | None:
  """The RMSNorm of queries or keys: of each head, or of all heads together."""
  if config.qk_norm == "none":
    return None
  if config.qk_norm == "head":
    return Norm((config.head_dim,), config, ("norm",), rms=True)
  return Norm((num_heads, config.head_dim), config, ("heads", None), rms=True)
