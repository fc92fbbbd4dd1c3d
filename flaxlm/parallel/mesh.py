"""The devices as a grid with named axes: data, fsdp, tensor."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from flaxlm.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """Returns a mesh over all devices of all hosts; data=-1 takes what remains.

  Axes are `Auto`: the compiler propagates shardings from weights and constraints.

  Raises:
    ConfigError: the product of the axes is not the number of devices.
  """
  devices = jax.devices()
  count = len(devices)
  rest = fsdp * tensor
  if data == -1:
    data = max(count // rest, 1)
  if data * rest != count:
    fits = [n for n in range(1, count + 1) if count % n == 0]
    raise ConfigError(
      "config.mesh",
      f"data={data} x fsdp={fsdp} x tensor={tensor} = {data * rest} devices",
      f"the {count} devices that are here ({devices[0].device_kind})",
      "data=-1, and fsdp x tensor one of " + " ".join(map(str, fits[:8])),
    )
  if jax.process_count() > 1 and devices[0].platform == "cpu":
    grid = np.array(devices).reshape(data, fsdp, tensor)
  else:
    grid = mesh_utils.create_device_mesh(
      (data, fsdp, tensor), devices, allow_split_physical_axes=True
    )
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
