"""Weak scaling, predicted: tokens per second over the number of chips."""

import math
from collections.abc import Callable

from flaxlm.parallel.hardware import Hardware
from flaxlm.parallel.mesh import axis_sizes
from flaxlm.planning.roofline import Prediction, predict
from flaxlm.planning.table import band, digits


def scaling(
  config_for: Callable[[int], tuple], hardware_for: Callable[[int], Hardware], counts
) -> list[tuple[int, Prediction]]:
  """Returns (chips, Prediction) for each number of chips.

  Args:
    config_for: number of chips -> (config, sizes of its mesh); weak scaling gives each
      chip the same rows.
    hardware_for: number of chips -> hardware.
  """
  return [(n, predict(*config_for(n), hardware_for(n))) for n in counts]


# Chips in the largest slice to rent; the network joins slices to more.
_LARGEST_SLICE = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
_COUNTS = (8, 32, 128, 512, 2048, 8192)


def weak_scaling(config, hardware: Hardware, counts=_COUNTS) -> list:
  """Returns `scaling` of a config with the same rows per chip on each number of chips.

  The axes keep their sizes, but fsdp shrinks on fewer chips, `data` grows on more, and
  `slice` grows beyond the largest slice. Counts that are too small for one group of the
  other axes are left out.
  """
  rows = config.data.batch_size / hardware.num_chips
  own = axis_sizes(config.mesh)
  group = math.prod(own[axis] for axis in ("stage", "expert", "context", "tensor"))
  limit = _LARGEST_SLICE.get(hardware.chip.name, hardware.chip.devices_per_host)

  def slices(n: int) -> int:
    return -(-n // limit)

  def config_for(n: int) -> tuple:
    one = config.copy_and_resolve_references()
    one.data.batch_size = max(round(rows * n), 1)
    fsdp = max(math.gcd(own["fsdp"], n // slices(n) // group), 1)
    data = n // (slices(n) * group * fsdp)
    return one, own | {"slice": slices(n), "data": data, "fsdp": fsdp}

  def hardware_for(n: int) -> Hardware:
    return hardware._replace(num_chips=n, num_slices=slices(n), topology="")

  fitting = [n for n in counts if n % (slices(n) * group) == 0]
  return scaling(config_for, hardware_for, fitting)


def scaling_table(found: list[tuple[int, Prediction]]) -> str:
  """Returns one line per number of chips; efficiency is relative to the first."""
  cells = [["chips", "tokens/s", "per chip", "MFU", "efficiency", "bound by"]]
  first = found[0][1].tokens_per_second / found[0][0]
  for n, one in found:
    rate, chip = one.tokens, one.tokens_per_second / n
    cells.append(
      [
        f"{n:,}",
        band(rate / one.high, one.tokens_per_second, rate / one.low),
        digits(chip),
        f"{one.mfu:.0%}",
        f"{chip / first:.0%}",
        one.bound,
      ]
    )
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
    for row in cells
  )
