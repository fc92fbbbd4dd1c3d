"""Measures this machine: each operation of a step at its own size, on one device.

`python -m flaxlm.plan --calibrate` stores the times. Predictions for this machine then
add up measured times instead of dividing by peak rates. Other work on the machine slows
the measurements: calibrate when it is as busy as it will be during training.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxlm import machine
from flaxlm.errors import ConfigError, MissingInputError
from flaxlm.files import write_output
from flaxlm.json_files import read_json
from flaxlm.parallel import AXES
from flaxlm.parallel.hardware import (
  CHIPS,
  DEVICE_KINDS,
  Calibration,
  Chip,
  Hardware,
  chip_of,
)
from flaxlm.planning.microbenchmarks import measure_seconds, prepare
from flaxlm.planning.operations import Op, operations
from flaxlm.planning.roofline import predict

_SQUARE = 2048  # sides of the matmul whose rate counts as the machine's peak
SQUARE_KEY = ("matmul", 1, _SQUARE, _SQUARE, _SQUARE, "float32")
COPY_KEY = ("norm", 1 << 15, 1024, "float32")  # 128 MiB: larger than any cache
_MAX_WEIGHTS = 1 << 24  # to time an optimizer on: the time is linear in their number
_FIELDS = {  # of a calibration, with their types
  "num_devices": int,
  "platform": str,
  "device_kind": str,
  "seconds": list,
  "dispatch_seconds": float,
}


def measure(configs: list, budget: float = 0.2) -> dict:
  """Times each operation that the configs need on one device.

  Args:
    budget: seconds to spend on each operation.
  Returns:
    Plain values: what `save_calibration` writes and `measured_hardware` reads.
  """
  machine.keep_freed_memory()  # as in training
  one = dict.fromkeys(AXES, 1)
  wanted = {SQUARE_KEY, COPY_KEY}
  for config in configs:
    for op in operations(config, one, flash=False):
      wanted.add(measurement_key(op, config.model.dtype))
  device = jax.devices()[0]
  with jax.default_device(device):
    rows = []
    for key in sorted(wanted, key=str):
      function, args = prepare(key[0], key[1:-1], key[-1])
      rows.append([*key, measure_seconds(function, args, budget)])
    dispatch = measure_seconds(jax.jit(lambda x: x + 1), (jnp.zeros(()),), budget)
  return {
    "device_kind": device.device_kind,
    "platform": device.platform,
    "num_devices": jax.device_count(),
    "link_bandwidth": _all_reduce_bandwidth(budget),
    "dispatch_seconds": dispatch,
    "seconds": rows,
  }


def _all_reduce_bandwidth(budget: float, count: int = 1 << 22) -> float:
  """Returns the bytes per second that a device sends in a ring all-reduce.

  It is 0 with one device.
  """
  n = jax.device_count()
  if n == 1:
    return 0.0
  mesh = jax.make_mesh((n,), ("all",), axis_types=(AxisType.Auto,))
  spec = PartitionSpec("all")
  x = jax.device_put(jnp.ones((n, count)), NamedSharding(mesh, spec))
  reduce = jax.jit(
    jax.shard_map(
      lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spec, out_specs=spec,
      check_vma=False,
    )
  )  # fmt: skip
  return 2 * (n - 1) / n * 4 * count / measure_seconds(reduce, (x,), budget)


def measurement_key(op: Op, dtype: str) -> tuple:
  """Returns the key of an operation in a calibration."""
  dims = op.dims
  if op.kind in ("optimizer", "weights"):
    dims = (min(dims[0], _MAX_WEIGHTS),)
  return (op.kind, *dims, dtype)


def save_calibration(measured: dict, path: str | os.PathLike) -> None:
  """Writes what `measure` returned as JSON."""
  write_output(path, json.dumps(measured, indent=1) + "\n", f"--calibration={path}")


def measured_hardware(measured: dict) -> Hardware:
  """Returns the machine that was measured."""
  number = measured["num_devices"]
  # Devices on one CPU share its cores, so each is slower than the one measured alone.
  sharing = number if measured["platform"] == "cpu" else 1
  times = {tuple(key): sharing * value for *key, value in measured["seconds"]}
  known = CHIPS.get(DEVICE_KINDS.get(measured["device_kind"], ""))
  link = measured["link_bandwidth"]
  if known is not None:
    chip = known._replace(link_bandwidth=link or known.link_bandwidth)
  else:
    flops, (rows, width) = 6 * _SQUARE**3 / times[SQUARE_KEY], COPY_KEY[1:3]
    bandwidth = 40 * rows * width / times[COPY_KEY]
    link = link or bandwidth
    chip = Chip(
      "cpu", flops, flops, machine.host_memory() / sharing, bandwidth, "memory", link,
      "memory", link, number, 1, 0.0, 0.0, "this machine",
    )  # fmt: skip
  calibration = Calibration(times, measured["dispatch_seconds"])
  return Hardware(chip, number, 1, "", calibration)


def _are_positive(measured: dict) -> bool:
  """Returns whether all that a calibration measured are numbers above 0."""
  rows = measured["seconds"]
  numbers = [row[-1] if isinstance(row, list) and row else None for row in rows]
  numbers += [measured[key] for key in ("num_devices", "dispatch_seconds")]
  numbers += [measured.get("link_bandwidth") or 1]  # one device has no link
  return all(type(n) in (int, float) and n > 0 for n in numbers)


def load_calibration(path: str | os.PathLike) -> Hardware:
  """Returns the machine whose calibration is in a file.

  Raises:
    MissingInputError: there is no such file.
    ConfigError: it is not a calibration.
  """
  try:
    measured = read_json(path, _FIELDS)
    if not _are_positive(measured):
      raise ValueError("numbers that are not above 0")
    return measured_hardware(measured)
  except FileNotFoundError as error:
    raise MissingInputError(
      f"{path} does not exist", needed="a calibration", hint="--calibrate"
    ) from error
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      "the calibration", path, f"a file that --calibrate wrote ({error!r})"
    ) from error


def expected_seconds(config, mesh: jax.sharding.Mesh) -> float | None:
  """Returns the predicted seconds per step, which the loop logs beside measured ones.

  They come from the calibration in config.log.calibration if there is one, else from
  the table of chips. Returns None for an unknown machine, or if the calibration has
  another number of devices. Takes milliseconds.
  """
  path, number = pathlib.Path(config.log.calibration), jax.device_count()
  if path.is_file():
    here = load_calibration(path)
    if here.num_chips != number:
      return None
  elif (chip := chip_of(jax.devices()[0])) is not None:
    nodes = jax.process_count() if chip.link == "nvlink" else mesh.shape["slice"]
    here = Hardware(chip, number, nodes, "")
  else:
    return None
  return predict(config, dict(mesh.shape), here).mid
