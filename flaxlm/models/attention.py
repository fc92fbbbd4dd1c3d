"""Multi-head attention as a module: projections, positions, and the kernel to call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.attention import attention, choose_kernel
from flaxlm.kernels.attention.choice import (
  BACKENDS,
  CONTEXT_PARALLEL,
  Case,
  backend_with_cache,
)
from flaxlm.models.cache import KVCache
from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import Norm, add_bias, bias, project, residual_scale, weight
from flaxlm.models.rope import rotary_angles, rotate
from flaxlm.parallel.sharding import (
  constrain,
  current_layout,
  join_rows,
  shard_map,
  split_rows,
)


class View(NamedTuple):
  """What decides which tokens see each other, and how far apart they are."""

  segment_ids_BL: jax.Array
  prefix_BL: jax.Array | None  # 1: its whole segment sees this token (prefix LM)
  angles: tuple | None  # rotary angles of global layers
  local_angles: tuple | None  # of local layers, if they differ

  @classmethod
  def of(cls, config: TransformerConfig, positions_BL, segment_ids_BL, prefix_BL):
    angles = local_angles = None
    if config.positions == "rope":
      angles = rotary_angles(positions_BL, config.rope, config.head_dim)
      if config.rope.local_theta and config.sliding_window:
        local_angles = rotary_angles(positions_BL, config.rope, config.head_dim, True)
    return cls(segment_ids_BL, prefix_BL, angles, local_angles)

  def angles_of(self, window):
    """Returns the rotary angles of a layer with this window, a number or an array."""
    if self.local_angles is None:
      return self.angles
    return jax.tree.map(
      lambda own, other: jnp.where(window > 0, own, other),
      self.local_angles,
      self.angles,
    )


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023); ordinary attention if K = N."""

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
    self.query_norm = _make_head_norm(config, N)
    self.key_norm = _make_head_norm(config, K)
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
      out_BLNH = _attend(
        self.config, q_BLNH, k_BMKH, v_BMKH, _array_or_none(self.sinks), view, window
      )
    else:
      offset = cache.length
      cache, groups = cache.append(layer, k_BMKH, v_BMKH)
      k_prefix_BM = None
      if view.prefix_BL is not None:  # cached tokens come earlier: seen anyway
        none_BM = jnp.zeros_like(cache.segment_ids_BM)
        k_prefix_BM = jax.lax.dynamic_update_slice(none_BM, view.prefix_BL, (0, offset))
      outs = [
        attention(
          q_BLNH[rows], k_BMKH, v_BMKH, q_segment_ids_BL=view.segment_ids_BL[rows],
          k_segment_ids_BM=cache.segment_ids_BM[rows],
          k_prefix_BM=None if k_prefix_BM is None else k_prefix_BM[rows],
          q_offset=offset[rows] if offset.ndim else offset,
          sinks_N=_array_or_none(self.sinks), window=window,
          backend=backend_with_cache(self.config.attention),
          **_mask_and_scale(self.config),
        )
        for rows, k_BMKH, v_BMKH in groups
      ]  # fmt: skip
      out_BLNH = jnp.concatenate(outs)
    out_BLNH = constrain(out_BLNH, "batch", "length", "heads", None)
    out_TD = project(join_rows(out_BLNH), self.out, 2, self.config.quantize)
    return add_bias(out_TD, self.out_bias), cache


def _make_head_norm(config: TransformerConfig, num_heads: int) -> Norm | None:
  """Returns the RMSNorm of queries or keys: over each head, or over all heads."""
  if config.qk_norm == "none":
    return None
  elif config.qk_norm == "head":
    return Norm((config.head_dim,), config, ("norm",), rms=True)
  elif config.qk_norm == "full":
    return Norm((num_heads, config.head_dim), config, ("heads", None), rms=True)
  else:
    raise ConfigError("config.model.qk_norm", config.qk_norm, "none, head or full")


def _mask_and_scale(config: TransformerConfig) -> dict:
  """Returns the arguments of `attention` that the model's config decides."""
  return {
    "causal": config.causal,
    "sliding_window": config.sliding_window,
    "scale": config.attention_scale,
    "softcap": config.attention_softcap,
  }


def _attend(config: TransformerConfig, q_BLNH, k_BMKH, v_BMKH, sinks_N, view, window):
  """Computes attention within the rows of a batch, with the config's backend.

  If the mesh splits rows and the backend does not, each device gets whole rows of some
  heads: XLA exchanges them all-to-all, before and after (Ulysses, Jacobs et al. 2023,
  arXiv 2309.14509).
  """
  now = current_layout()
  split = now is not None and now.ways("length") > 1
  backend = _kernel_for_rows(config, view, q_BLNH.shape[1], split)
  row = BACKENDS[backend]
  exchanged = split and not row.splits_rows
  rows = ("batch", "length") if row.splits_rows else ("batch", None)
  heads = "all_heads" if exchanged else "heads"
  dims = (*rows, heads, None)
  ids_BL = view.segment_ids_BL
  if exchanged:
    q_BLNH, k_BMKH, v_BMKH = (constrain(x, *dims) for x in (q_BLNH, k_BMKH, v_BMKH))
    ids_BL = constrain(ids_BL, *rows)

  def local(q, k, v, ids, prefix, sinks, traced):
    (axis_name,) = now.axes("length") if row.splits_rows else ("",)
    return attention(
      q, k, v, q_segment_ids_BL=ids, k_segment_ids_BM=ids, k_prefix_BM=prefix,
      sinks_N=sinks, window=window if traced is None else traced, backend=backend,
      axis_name=axis_name, **_mask_and_scale(config),
    )  # fmt: skip

  # In a scan over layers, the window is an array: unknown when the scan is traced.
  traced = None if isinstance(window, int) else window
  arrays = (q_BLNH, k_BMKH, v_BMKH, ids_BL, view.prefix_BL, sinks_N, traced)
  if now is None or not row.per_device:
    out_BLNH = local(*arrays)
    return constrain(out_BLNH, *dims) if exchanged else out_BLNH
  return shard_map(local, [dims, dims, dims, rows, rows, (heads,), ()], dims)(*arrays)


def _kernel_for_rows(config: TransformerConfig, view: View, L: int, split: bool) -> str:
  """Returns the kernel for whole rows, from config, device and shape.

  Raises:
    UserError: the config names a backend that cannot compute this.
  """
  now, backend = current_layout(), config.attention
  if backend == CONTEXT_PARALLEL and not split:  # as in decoding
    backend = "auto"
  # A device of the mesh, which may belong to a machine that is not here.
  device = jax.devices()[0] if now is None else now.mesh.devices.flat[0]
  case = Case(
    device.platform, config.dtype, L, L, config.head_dim, config.attention_softcap,
    view.prefix_BL is not None, config.attention_sinks,
  )  # fmt: skip
  return choose_kernel(backend, case, device.device_kind)


def _array_or_none(weight: nnx.Param | None) -> jax.Array | None:
  return None if weight is None else weight[...]
