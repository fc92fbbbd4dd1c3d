"""Multi-head attention as a module, and the cache that decoding keeps of it."""

import dataclasses
import itertools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention import attention, refuse
from flaxlm.kernels.backends import Case, choose, load_measured
from flaxlm.kernels.chunked_attention import pays
from flaxlm.kernels.ring_attention import ring_attention
from flaxlm.kernels.splash_attention import splash_attention
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
  """Keys and values of the tokens seen so far: for each layer arrays KHM and KMH.

  There is a pair of them for each group of rows, with B in front if it is not 1, and
  K is left out if it is 1: of other arrays XLA:CPU makes a copy for each token. It
  computes the product of one group on one core. Slots from `length` on are empty;
  their segment id is -1, which no query has.
  """

  k: tuple[tuple[jax.Array, ...], ...]
  v: tuple[tuple[jax.Array, ...], ...]
  segment_ids_BM: jax.Array
  length: jax.Array

  @classmethod
  def empty(cls, config: TransformerConfig, batch_size: int, max_len: int) -> "KVCache":
    cores = os.cpu_count() if jax.default_backend() == "cpu" else 1
    bounds = np.linspace(0, batch_size, min(batch_size, cores) + 1).astype(int).tolist()

    def zeros(*dims):
      shapes = [
        (*(n for n in (end - start, config.num_kv_heads) if n > 1), *dims)
        for start, end in itertools.pairwise(bounds)
      ]
      return tuple(
        tuple(jnp.zeros(shape, config.dtype) for shape in shapes) for _ in config.layers
      )

    segment_ids_BM = jnp.full((batch_size, max_len), -1, jnp.int32)
    k, v = zeros(config.head_dim, max_len), zeros(max_len, config.head_dim)
    return cls(k, v, segment_ids_BM, jnp.zeros((), jnp.int32))

  def append(self, layer: int, k_BLKH, v_BLKH):
    """Returns (the cache with these at its end; rows, k and v of each group, BMKH)."""
    L, K, H = k_BLKH.shape[1:]
    M = self.segment_ids_BM.shape[1]
    k, v, groups, first = [], [], [], 0
    for k_KHM, v_KMH in zip(self.k[layer], self.v[layer], strict=True):
      rows = slice(first, first + k_KHM.size // (K * H * M))
      first = rows.stop
      new = k_BLKH[rows].transpose(0, 2, 3, 1).reshape(*k_KHM.shape[:-1], L)
      at = (0,) * (k_KHM.ndim - 1) + (self.length,)
      k.append(jax.lax.dynamic_update_slice(k_KHM, new, at))
      new = v_BLKH[rows].transpose(0, 2, 1, 3).reshape(*v_KMH.shape[:-2], L, H)
      at = (0,) * (v_KMH.ndim - 2) + (self.length, 0)
      v.append(jax.lax.dynamic_update_slice(v_KMH, new, at))
      k_BMKH = k[-1].reshape(-1, K, H, M).transpose(0, 3, 1, 2)
      groups.append((rows, k_BMKH, v[-1].reshape(-1, K, M, H).transpose(0, 2, 1, 3)))

    def replaced(layers, new):
      return (*layers[:layer], tuple(new), *layers[layer + 1 :])

    k, v = replaced(self.k, k), replaced(self.v, v)
    return dataclasses.replace(self, k=k, v=v), groups


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
    self.sinks = bias((N,), ("heads",)) if config.attention_sinks else None
    self.config = config

  def __call__(self, x_TD, view: View, window, cache: KVCache | None, layer):
    """Returns (output TD, cache with this layer's keys and values written)."""

    def heads(weight, bias):
      y_TNH = add_bias(project(x_TD, weight, quantize=self.config.quantize), bias)
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


def mask_and_scale(config: TransformerConfig) -> dict:
  return {
    "causal": config.causal,
    "scale": config.attention_scale,
    "softcap": config.attention_softcap,
  }


def attend(config: TransformerConfig, q_BLNH, k_BMKH, v_BMKH, sinks_N, view, window):
  """Attention within the rows of a batch, by the backend and the mesh of the config.

  Where the length is split and the backend is not a ring, each device gets whole rows
  of some heads: XLA exchanges them all-to-all, before and after (Ulysses, Jacobs et al.
  2023, arXiv 2309.14509).
  """
  now = layout()
  split = now is not None and now.ways("length") > 1
  backend = form_of(config, view, q_BLNH.shape[1], split)
  rows, heads = ("batch", None), "all_heads" if split else "heads"
  if backend == "ring":
    rows, heads = ("batch", "length"), "heads"
  dims = (*rows, heads, None)
  ids_BL = view.segment_ids_BL
  if split and backend != "ring":
    q_BLNH, k_BMKH, v_BMKH = (constrain(x, *dims) for x in (q_BLNH, k_BMKH, v_BMKH))
    ids_BL = constrain(ids_BL, *rows)

  def local(q, k, v, ids, prefix, sinks, traced):
    options = mask_and_scale(config) | {"sinks_N": sinks}
    options["window"] = window if traced is None else traced
    if backend == "splash":
      width = config.sliding_window
      return splash_attention(q, k, v, ids, sliding_window=width, **options)
    if backend == "ring":
      (axis,) = now.axes("length")
      return ring_attention(
        q, k, v, axis_name=axis, q_segment_ids_Bl=ids, k_segment_ids_Bm=ids,
        k_prefix_Bm=prefix, **options,
      )  # fmt: skip
    return attention(
      q, k, v, q_segment_ids_BL=ids, k_segment_ids_BM=ids, k_prefix_BM=prefix,
      backend=backend, **options,
    )  # fmt: skip

  # The layers of a scan have windows that are not known when it is traced.
  traced = None if isinstance(window, int) else window
  arrays = (q_BLNH, k_BMKH, v_BMKH, ids_BL, view.prefix_BL, sinks_N, traced)
  if now is None or backend not in ("splash", "ring", "chunked"):
    out_BLNH = local(*arrays)
    return constrain(out_BLNH, *dims) if split else out_BLNH
  # Kernels and loops are black boxes to the compiler: each device runs its own part.
  return shard_map(local, [dims, dims, dims, rows, rows, (heads,), ()], dims)(*arrays)


def form_of(config: TransformerConfig, view: View, L: int, split: bool) -> str:
  """The backend of whole rows, by config, device and shape.

  Raises:
    ValueError: the config names one that cannot compute this.
  """
  now, backend = layout(), config.attention
  if backend == "ring" and split:
    return backend
  # Of the mesh, which may be that of a machine that is not here.
  device = jax.devices()[0] if now is None else now.mesh.devices.flat[0]
  case = Case(
    device.platform, config.dtype, L, L, config.head_dim, config.attention_softcap,
    view.prefix_BL is not None, config.attention_sinks,
  )  # fmt: skip
  if backend in ("auto", "ring"):
    backend = choose(case, load_measured(device.device_kind, jax.__version__))
  # Whether the device suits was checked by program.build; plan traces for others.
  refuse(backend, case._replace(platform=""))
  if backend == "xla":
    return "chunked" if pays(device.platform, L, L) else "dense"
  return backend


def value_of(weight: nnx.Param | None) -> jax.Array | None:
  return None if weight is None else weight[...]


def head_norm(config: TransformerConfig, num_heads: int) -> Norm | None:
  """The RMSNorm of queries or keys: of each head, or of all heads together."""
  if config.qk_norm == "none":
    return None
  if config.qk_norm == "head":
    return Norm((config.head_dim,), config, ("norm",), rms=True)
  return Norm((num_heads, config.head_dim), config, ("heads", None), rms=True)
