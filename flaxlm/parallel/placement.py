"""Places rows of a batch on the devices of all processes."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from flaxlm.parallel.sharding import spec


def batch_sharding(config, mesh: jax.sharding.Mesh) -> NamedSharding:
  """Where the arrays of a batch live, (rows, places in a row)."""
  return NamedSharding(mesh, spec(("batch", "length"), config.mesh.rules.to_dict()))


def local_rows(
  sharding: jax.sharding.NamedSharding, batch_size: int
) -> tuple[int, int]:
  """The range [first, last) of a batch's rows that this host's devices hold."""
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  slices = [index[0].indices(batch_size) for index in indices]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def to_global(
  rows: dict[str, np.ndarray], first_row: int, batch_size: int, sharding
) -> dict[str, jax.Array]:
  """Assembles arrays of the whole batch from each host's rows, from `first_row` on."""

  def place(local: np.ndarray) -> jax.Array:
    shape = (batch_size, *local.shape[1:])

    def part(index):
      start, stop, _ = index[0].indices(batch_size)
      return local[start - first_row : stop - first_row, *index[1:]]

    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(local) for name, local in rows.items()}
