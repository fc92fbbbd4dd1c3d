"""The key-value cache of decoding."""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.models.config import TransformerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
  """Keys and values of the tokens seen so far: for each layer, arrays KHM and KMH.

  Each group of rows has one pair, with B in front if it is not 1 and without K if it is
  1: XLA:CPU would copy other arrays for each token. It also computes the product of one
  group on one core, so there is a group for each core. Slots from `length` on are
  empty; their segment id is -1, which no query has. `length` is one for all rows, or
  one per row, B.
  """

  k: tuple[tuple[jax.Array, ...], ...]
  v: tuple[tuple[jax.Array, ...], ...]
  segment_ids_BM: jax.Array
  length: jax.Array

  @classmethod
  def empty(cls, config: TransformerConfig, batch_size: int, max_len: int) -> "KVCache":
    """Returns a cache without tokens, with room for `max_len` per row."""
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

  def mark(self, segment_ids_BL: jax.Array) -> "KVCache":
    """Returns the cache with the segment ids of tokens that come next."""
    ids_BM = _write(self.segment_ids_BM, segment_ids_BL, self.length, 1)
    return dataclasses.replace(self, segment_ids_BM=ids_BM)

  def append(self, layer: int, k_BLKH, v_BLKH):
    """Appends L tokens: returns (cache, [(rows, k BMKH, v BMKH) of each group])."""
    L, K, H = k_BLKH.shape[1:]
    M = self.segment_ids_BM.shape[1]
    k, v, groups, first = [], [], [], 0
    for k_KHM, v_KMH in zip(self.k[layer], self.v[layer], strict=True):
      rows = slice(first, first + k_KHM.size // (K * H * M))
      first = rows.stop
      length = self.length[rows] if self.length.ndim else self.length
      new = k_BLKH[rows].transpose(0, 2, 3, 1).reshape(*k_KHM.shape[:-1], L)
      k.append(_write(k_KHM, new, length, k_KHM.ndim - 1))
      new = v_BLKH[rows].transpose(0, 2, 1, 3).reshape(*v_KMH.shape[:-2], L, H)
      v.append(_write(v_KMH, new, length, v_KMH.ndim - 2))
      k_BMKH = k[-1].reshape(-1, K, H, M).transpose(0, 3, 1, 2)
      groups.append((rows, k_BMKH, v[-1].reshape(-1, K, M, H).transpose(0, 2, 1, 3)))

    def replaced(layers, new):
      return (*layers[:layer], tuple(new), *layers[layer + 1 :])

    k, v = replaced(self.k, k), replaced(self.v, v)
    return dataclasses.replace(self, k=k, v=v), groups

  def read_row(self, row: jax.Array, length: jax.Array, spare: int = 0) -> "KVCache":
    """Returns a cache of one row of this one, with its first `length` tokens.

    Args:
      spare: places that it has besides those of this cache.
    """

    def read(axis, groups):
      sizes = self._rows_of(groups)
      found, first = None, 0
      for x, size in zip(groups, sizes, strict=True):
        at = jnp.clip(row - first, 0, size - 1)
        one = x if size == 1 else jax.lax.dynamic_index_in_dim(x, at, 0, False)
        found = one if found is None else jnp.where(row >= first, one, found)
        first += size
      widths = [(0, 0)] * found.ndim
      widths[axis] = (0, spare)
      return (jnp.pad(found, widths),)

    ids_1M = jax.lax.dynamic_slice_in_dim(self.segment_ids_BM, row, 1)
    ids_1M = jnp.where(jnp.arange(ids_1M.shape[1]) < length, ids_1M, -1)
    ids_1M = jnp.pad(ids_1M, [(0, 0), (0, spare)], constant_values=-1)
    k = tuple(read(-1, groups) for groups in self.k)
    return KVCache(k, tuple(read(-2, groups) for groups in self.v), ids_1M, length)

  def write_row(self, row: jax.Array, other: "KVCache") -> "KVCache":
    """Returns this cache, of a length per row, with another as its `row`.

    Args:
      other: a cache of one row. Its places that are too many here are left out.
    """

    def write(axis, groups, new):
      M = self.segment_ids_BM.shape[1]
      new = jax.lax.slice_in_dim(new[0], 0, M, axis=axis % new[0].ndim)
      written, first = [], 0
      for x, size in zip(groups, self._rows_of(groups), strict=True):
        at = jnp.clip(row - first, 0, size - 1)
        old = x if size == 1 else jax.lax.dynamic_index_in_dim(x, at, 0, False)
        one = jnp.where((row >= first) & (row < first + size), new, old)
        if size > 1:
          one = jax.lax.dynamic_update_index_in_dim(x, one, at, 0)
        written.append(one)
        first += size
      return tuple(written)

    ids_M = other.segment_ids_BM[0, : self.segment_ids_BM.shape[1]]
    return KVCache(
      tuple(write(-1, *pair) for pair in zip(self.k, other.k, strict=True)),
      tuple(write(-2, *pair) for pair in zip(self.v, other.v, strict=True)),
      self.segment_ids_BM.at[row].set(ids_M),
      self.length.at[row].set(other.length),
    )

  def _rows_of(self, groups: tuple[jax.Array, ...]) -> list[int]:
    """Returns how many rows each group has."""
    most = max(x.ndim for x in groups)
    if len(groups) == self.segment_ids_BM.shape[0]:
      return [1] * len(groups)
    return [x.shape[0] if x.ndim == most else 1 for x in groups]


def _write(x, new, length, axis: int):
  """Returns `x` with `new` from `length` on along `axis`; a length may be per row."""
  if not length.ndim or length.size == 1:
    return jax.lax.dynamic_update_slice_in_dim(x, new, length.reshape(()), axis)
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
  return jax.vmap(write)(x, new, length)
