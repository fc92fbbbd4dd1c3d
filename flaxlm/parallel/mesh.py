"""The devices as a grid with named axes, from the slowest network to the fastest.

slice    replicas in groups that a slow network joins (TPU slices, GPU nodes)
stage    a pipeline over the layers
data     replicas
fsdp     weights are split, and gathered layer by layer
expert   experts are split; tokens travel to theirs
context  each sequence is split
tensor   heads, hidden units and the vocabulary are split
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from flaxlm.errors import ConfigError
from flaxlm.parallel import AXES


def axis_sizes(mesh_config) -> dict[str, int]:
  """Returns the size of each axis in `config.mesh`; data=-1 takes what remains."""
  return {axis: mesh_config[axis] for axis in AXES}


def make_mesh(
  devices=None,
  *,
  slice: int = 1,
  stage: int = 1,
  data: int = -1,
  fsdp: int = 1,
  expert: int = 1,
  context: int = 1,
  tensor: int = 1,
) -> jax.sharding.Mesh:
  """Returns a mesh over `devices`; by default all devices of all hosts.

  Neighbours on the last axes are neighbours on the network. Axes are `Auto`: the
  compiler propagates shardings from weights and constraints.

  Raises:
    ConfigError: the product of the axes is not the number of devices, or `slice` is
      not the number of slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(
    slice=slice, stage=stage, data=data, fsdp=fsdp, expert=expert, context=context,
    tensor=tensor,
  )  # fmt: skip
  sizes = fill_axes(sizes, len(devices), devices[0].device_kind)
  shape = tuple(sizes.values())
  groups = {getattr(device, "slice_index", 0) for device in devices}
  if len(groups) > 1 and slice != len(groups):
    raise ConfigError(
      "config.mesh.slice", slice, f"{len(groups)}, the number of slices",
      f"{len(groups)}",
    )  # fmt: skip
  if devices[0].platform != "tpu":  # ordered by process, and so by machine
    grid = np.array(devices).reshape(shape)
  elif len(groups) > 1:
    across = (slice,) + (1,) * (len(shape) - 1)
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]), across, devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device() -> jax.sharding.Mesh:
  """Returns a mesh of the first device alone."""
  return make_mesh(jax.devices()[:1])


def fill_axes(sizes: dict[str, int], count: int, kind: str) -> dict[str, int]:
  """Returns the sizes, with data=-1 replaced by what remains of `count` devices.

  Args:
    kind: of the devices, for the message.
  Raises:
    ConfigError: the sizes do not use every device once.
  """
  rest = math.prod(size for axis, size in sizes.items() if axis != "data")
  data = max(count // rest, 1) if sizes["data"] == -1 else sizes["data"]
  if data * rest != count:
    fits = [n for n in range(1, count + 1) if count % n == 0]
    shown = {**sizes, "data": data}
    raise ConfigError(
      "config.mesh",
      " x ".join(f"{axis}={n}" for axis, n in shown.items() if n > 1 or axis == "data")
      + f" = {data * rest} devices",
      f"the {count} devices of this job ({kind})",
      "data=-1, and others whose product is one of " + " ".join(map(str, fits[:8])),
    )
  return {**sizes, "data": data}
