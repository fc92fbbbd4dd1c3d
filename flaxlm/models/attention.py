"""Multi-head attention as a module, and the cache that decoding keeps of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention import attention
from flaxlm.kernels.ring_attention import ring_attention
from flaxlm.kernels.splash_attention import can_splash, splash_attention
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
from flaxlm.parallel.sharding import (
  constrain,
  join_rows,
  layout,
  part_rows,
  shard_map,
)


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

    def heads(weight, bias):
      y_TNH = add_bias(project(x_TD, weight), bias)
      y_BLNH = part_rows(y_TNH, view.segment_ids_BL.shape[0])
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

    if cache is None:
      out_BLNH = attend(self.config, q_BLNH, k_BMKH, v_BMKH, view, window)
    else:
      backend = self.config.attention
      in_cache = "auto" if backend in ("ring", "splash") else backend
      out_BLNH = attention(
        q_BLNH, k_BMKH, v_BMKH, q_segment_ids_BL=view.segment_ids_BL,
        k_segment_ids_BM=k_segment_ids_BM, k_prefix_BM=k_prefix_BM, q_offset=offset,
        window=window, backend=in_cache, **mask_and_scale(self.config),
      )  # fmt: skip
    out_BLNH = constrain(out_BLNH, "batch", "length", "heads", None)
    out_TNH = join_rows(checkpoint_name(out_BLNH, "attention"))
    return add_bias(project(out_TNH, self.out, 2), self.out_bias), cache


def mask_and_scale(config: TransformerConfig) -> dict:
  return {
    "causal": config.causal,
    "scale": config.attention_scale,
    "softcap": config.attention_softcap,
  }


def attend(config: TransformerConfig, q_BLNH, k_BMKH, v_BMKH, view: View, window):
  """Attention within the rows of a batch, by the backend and the mesh of the config.

  Where the length is split and the backend is not a ring, each device gets whole rows
  of some heads: XLA exchanges them all-to-all, before and after (Ulysses, Jacobs et al.
  2023, arXiv 2309.14509).
  """
  now, backend = layout(), config.attention
  split = now is not None and now.ways("length") > 1
  if backend == "ring":
    if split:
      return ring(config, q_BLNH, k_BMKH, v_BMKH, view, window)
    backend = "auto"
  if backend == "auto" and on_tpu(now):
    L, H = q_BLNH.shape[1], q_BLNH.shape[3]
    backend = "splash" if can_splash(L, L, H, view.prefix_BL) else "xla"
  dims = ("batch", None, "all_heads" if split else "heads", None)
  ids_BL, prefix_BL = view.segment_ids_BL, view.prefix_BL
  if split:
    q_BLNH, k_BMKH, v_BMKH = (constrain(x, *dims) for x in (q_BLNH, k_BMKH, v_BMKH))
    ids_BL = constrain(ids_BL, "batch", None)
  if backend == "splash":
    if prefix_BL is not None:
      raise ValueError(
        "attention=splash cannot let a prefix be seen from both sides\n"
        "  needed: config.model.attention = auto, xla or ring"
      )
    # A kernel is a black box to the compiler: each device calls it on its own part.
    traced = () if isinstance(window, int) else (window,)

    def local(q, k, v, ids, *traced):
      return splash_attention(
        q, k, v, ids, window=traced[0] if traced else window,
        sliding_window=config.sliding_window, **mask_and_scale(config),
      )  # fmt: skip

    arrays = (q_BLNH, k_BMKH, v_BMKH, ids_BL, *traced)
    if now is None:
      return local(*arrays)
    in_dims = [dims, dims, dims, ("batch", None), *((),) * len(traced)]
    return shard_map(local, in_dims, dims)(*arrays)
  out_BLNH = attention(
    q_BLNH, k_BMKH, v_BMKH, q_segment_ids_BL=ids_BL, k_segment_ids_BM=ids_BL,
    k_prefix_BM=prefix_BL, window=window, backend=backend, **mask_and_scale(config),
  )  # fmt: skip
  return constrain(out_BLNH, *dims) if split else out_BLNH


def on_tpu(now) -> bool:
  """Of the mesh, which may be that of a machine that is not here."""
  if now is None:
    return jax.default_backend() == "tpu"
  return now.mesh.devices.flat[0].platform == "tpu"


def ring(config: TransformerConfig, q_BLNH, k_BMKH, v_BMKH, view: View, window):
  """Attention where the length is split in zig-zag: keys and values go round."""
  (axis,) = layout().axes("length")
  rows, heads = ("batch", "length"), ("batch", "length", "heads", None)
  arrays = [q_BLNH, k_BMKH, v_BMKH, view.segment_ids_BL]
  dims = [heads, heads, heads, rows]
  if has_prefix := view.prefix_BL is not None:
    arrays, dims = [*arrays, view.prefix_BL], [*dims, rows]
  if not isinstance(window, int):
    arrays, dims = [*arrays, window], [*dims, ()]

  def local(q, k, v, segment_ids, *rest):
    return ring_attention(
      q, k, v, axis_name=axis, q_segment_ids_Bl=segment_ids,
      k_segment_ids_Bm=segment_ids, k_prefix_Bm=rest[0] if has_prefix else None,
      window=window if isinstance(window, int) else rest[-1],
      **mask_and_scale(config),
    )  # fmt: skip

  return shard_map(local, dims, heads)(*arrays)


def head_norm(config: TransformerConfig, num_heads: int) -> Norm | None:
  """The RMSNorm of queries or keys: of each head, or of all heads together."""
  if config.qk_norm == "none":
    return None
  if config.qk_norm == "head":
    return Norm((config.head_dim,), config, ("norm",), rms=True)
  return Norm((num_heads, config.head_dim), config, ("heads", None), rms=True)
