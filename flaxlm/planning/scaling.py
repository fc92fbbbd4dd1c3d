"""Weak scaling on paper: tokens per second over the number of chips, table and plot."""

import html
import math
from collections.abc import Callable

from flaxlm.parallel.hardware import Hardware
from flaxlm.parallel.mesh import axis_sizes
from flaxlm.planning.roofline import Prediction, predict
from flaxlm.planning.table import COLORS, band, digits, document

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 420, 80, 50


def scaling(
  config_for: Callable[[int], tuple], hardware_for: Callable[[int], Hardware], counts
) -> list[tuple[int, Prediction]]:
  """Predicts a step on each number of chips: (chips, Prediction).

  Args:
    config_for: number of chips -> (config, sizes of its mesh); weak scaling gives each
      chip the same rows.
    hardware_for: number of chips -> the hardware.
  """
  return [(n, predict(*config_for(n), hardware_for(n))) for n in counts]


# Chips of the largest slice that is rented; more of them are joined by the network.
LARGEST_SLICE = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
COUNTS = (8, 32, 128, 512, 2048, 8192)


def weak_scaling(config, hardware: Hardware, counts=COUNTS) -> list:
  """`scaling` of a config, from its mesh and its rows a chip.

  Each chip keeps its rows, and the axes their sizes: on fewer chips fsdp shrinks, on
  more `data` grows, and `slice` beyond the largest slice. Counts that hold not even one
  group of the other axes are left out.
  """
  rows = config.data.batch_size / hardware.num_chips
  own = axis_sizes(config.mesh)
  group = math.prod(own[axis] for axis in ("stage", "expert", "context", "tensor"))
  limit = LARGEST_SLICE.get(hardware.chip.name, hardware.chip.devices_per_host)

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
  cells = [["chips", "tokens/s", "a chip", "MFU", "efficiency", "bound by"]]
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


def scaling_page(title: str, series: dict[str, list[tuple[int, Prediction]]]) -> str:
  """One HTML file: each model's line with its error band; dashed: perfect scaling."""
  return document(title, scaling_svg(series))


def scaling_svg(series: dict[str, list[tuple[int, Prediction]]]) -> str:
  """Both axes are logarithmic.

  Args:
    series: name of a model -> what report.scaling returned.
  """
  points = [point for found in series.values() for point in found]
  chips = [n for n, _ in points]
  rates = [one.tokens / s for _, one in points for s in (one.low, one.high)]

  def place(value, values, first, last) -> float:
    low, high = math.log(min(values)), math.log(max(values))
    return first + (math.log(value) - low) / ((high - low) or 1.0) * (last - first)

  def at(n: float, rate: float) -> str:
    x = place(n, chips, LEFT, WIDTH - 20)
    y = place(rate, rates, HEIGHT - BOTTOM, 20)
    return f"{x:.1f},{y:.1f}"

  shapes = []
  for n in sorted(set(chips)):
    x = place(n, chips, LEFT, WIDTH - 20)
    y = HEIGHT - BOTTOM + 20
    shapes.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{n:,}</text>')
  low, high = (math.log10(f(rates)) for f in (min, max))
  for power in range(math.ceil(low), math.floor(high) + 1):
    y = place(10.0**power, rates, HEIGHT - BOTTOM, 20)
    shapes.append(
      f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
      f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10**power:,}</text>'
    )
  for i, (name, found) in enumerate(series.items()):
    color = COLORS[i % len(COLORS)]
    upper = [at(n, one.tokens / one.low) for n, one in found]
    lower = [at(n, one.tokens / one.high) for n, one in found]
    middle = " ".join(at(n, one.tokens_per_second) for n, one in found)
    start = found[0][0]
    ideal = found[0][1].tokens_per_second / start
    # The ideal line leaves the drawing where the real ones do not reach: cut there.
    end = min(found[-1][0], max(rates) / ideal)
    area = " ".join(upper + lower[::-1])
    shapes.append(
      f'<polygon points="{area}" fill="{color}" opacity="0.2"/>'
      f'<polyline points="{middle}" fill="none" stroke="{color}" stroke-width="2"/>'
      f'<polyline points="{at(start, ideal * start)} {at(end, ideal * end)}" '
      f'fill="none" stroke="{color}" stroke-dasharray="4 4"/>'
      f'<text x="{LEFT + 10}" y="{30 + 18 * i}" fill="{color}">'
      f"{html.escape(name)}</text>"
    )
  shapes.append(
    f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
    "chips (tokens per second; band: error of the prediction)</text>"
  )
  return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(shapes)}</svg>'
