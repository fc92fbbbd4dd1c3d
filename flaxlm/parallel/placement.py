"""Which rows of a batch each host reads, and how they become one global array."""

import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flaxlm.errors import ConfigError
from flaxlm.parallel.sharding import partition_spec


def batch_sharding(rules: dict, mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of a batch's arrays, whose dimensions are rows and tokens."""
  return NamedSharding(mesh, partition_spec(("batch", "length"), rules))


def check_batch_size(
  batch_size: int, accumulation_steps: int, mesh_knobs, mesh: jax.sharding.Mesh
) -> None:
  """Raises ConfigError if the mesh does not divide the rows of a batch evenly."""
  divisor = accumulation_steps
  divisor *= math.prod(mesh.shape[axis] for axis in mesh_knobs.rules.batch)
  if mesh.shape["stage"] > 1:
    divisor *= mesh_knobs.microbatches or mesh.shape["stage"]
  if batch_size % divisor:
    raise ConfigError(
      "config.data.batch_size",
      batch_size,
      f"a multiple of {divisor} = devices that split rows x accumulation_steps x "
      "microbatches of the pipeline",
      f"{-(-batch_size // divisor) * divisor}",
    )


def local_rows(
  sharding: jax.sharding.NamedSharding, batch_size: int
) -> tuple[int, int]:
  """Returns the range [first, last) of a batch's rows on this host's devices."""
  # The rows alone: JAX refuses a sharding with more dimensions than the array has.
  rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
  indices = rows.addressable_devices_indices_map((batch_size,)).values()
  slices = [index[0].indices(batch_size) for index in indices]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def to_global(
  rows: dict[str, np.ndarray], first_row: int, batch_size: int, sharding
) -> dict[str, jax.Array]:
  """Returns global arrays of a batch, made of the rows that each host has.

  Args:
    rows: arrays of this host's rows.
    first_row: the place in the batch of the first of them.
  """

  def place(local: np.ndarray) -> jax.Array:
    shape = (batch_size, *local.shape[1:])

    def part(index):
      start, stop, _ = index[0].indices(batch_size)
      return local[start - first_row : stop - first_row, *index[1:]]

    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(local) for name, local in rows.items()}
