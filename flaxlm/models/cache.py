"""The key-value cache of decoding."""

import dataclasses
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
  empty; their segment id is -1, which no query has.
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

  def append(self, layer: int, k_BLKH, v_BLKH):
    """Appends L tokens: returns (cache, [(rows, k BMKH, v BMKH) of each group])."""
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
