"""A plan, or a scaling plot, as one HTML page that loads nothing from elsewhere."""

import html
import math
from collections.abc import Callable

from flaxlm.planning.roofline import Prediction
from flaxlm.planning.table import Plan, digits, gib, plan_rows

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 420, 80, 50  # of the scaling plot, in SVG units
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
  padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.5em 0 }
td, th { padding: 0.15em 1em 0.15em 0; text-align: left; vertical-align: top }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif }
"""


def plan_page(plan: Plan) -> str:
  """Returns a page that draws the memory against its limit, and the terms of a step."""
  cells = "\n".join(
    f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>"
    for label, text in plan_rows(plan)
  )
  found = plan.prediction
  memory = bars([("per chip", plan.memory)], plan.available, "limit", gib)
  waits = {name: s for name, s in found.terms.flat().items() if s > 0}
  hidden = found.terms.hidden
  shown = {name: s - hidden.get(name, 0.0) for name, s in waits.items()}
  tracks = [("in turn", {name: s for name, s in shown.items() if s > 0})]
  tracks += [(f"{link}, hidden", {link: s}) for link, s in hidden.items()]
  step = bars(tracks, found.mid, "step", lambda s: f"{digits(s)} s")
  return _document(
    f"{plan.name} on {plan.where}",
    f"<h2>Memory</h2>{memory}<h2>Time of a step</h2>{step}<table>{cells}</table>",
  )


def _document(title: str, body: str) -> str:
  title = html.escape(title)
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    f"<style>{_STYLE}</style><h1>{title}</h1>{body}</html>\n"
  )


def bars(tracks, limit: float, name: str, show: Callable[[float], str]) -> str:
  """Returns an SVG with one stacked bar per track, a line at `limit` and a legend.

  Args:
    tracks: (label, {part: size}) of each bar.
    name: of the limit.
    show: a size as text.
  """
  left, width, height = 110, 640, 28
  whole = max([limit, *(sum(parts.values()) for _, parts in tracks)]) or 1.0
  names = list(dict.fromkeys(part for _, parts in tracks for part in parts))
  color = {part: _COLORS[i % len(_COLORS)] for i, part in enumerate(names)}
  shapes = []
  for i, (label, parts) in enumerate(tracks):
    x, y = float(left), 24 + i * (height + 6)
    shapes.append(f'<text x="0" y="{y + 18}">{html.escape(label)}</text>')
    for part, size in parts.items():
      length = size / whole * width
      shapes.append(
        f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{height}" '
        f'fill="{color[part]}"><title>{html.escape(f"{part} {show(size)}")}</title>'
        "</rect>"
      )
      x += length
  bottom = 24 + len(tracks) * (height + 6)
  at = left + limit / whole * width
  text = html.escape(f"{name} {show(limit)}")
  shapes.append(
    f'<line x1="{at:.1f}" x2="{at:.1f}" y1="18" y2="{bottom}" stroke="#222" '
    f'stroke-width="2"/><text x="{at:.1f}" y="12" text-anchor="end">{text}</text>'
  )
  sums = {part: sum(parts.get(part, 0.0) for _, parts in tracks) for part in names}
  for i, part in enumerate(names):
    x, y = left + i % 3 * 215, bottom + 20 + i // 3 * 18
    text = html.escape(f"{part} {show(sums[part])}")
    shapes.append(
      f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{color[part]}"/>'
      f'<text x="{x + 15}" y="{y}">{text}</text>'
    )
  total = bottom + 26 + math.ceil(len(names) / 3) * 18
  return f'<svg viewBox="0 0 {left + width + 20} {total}">{"".join(shapes)}</svg>'


def scaling_page(title: str, series: dict[str, list[tuple[int, Prediction]]]) -> str:
  """Returns a page with each model's line and error band; perfect scaling is dashed."""
  return _document(title, _scaling_svg(series))


def _scaling_svg(series: dict[str, list[tuple[int, Prediction]]]) -> str:
  """Returns the plot; both axes are logarithmic.

  Args:
    series: {name of a model: what scaling.scaling returned}.
  """
  points = [point for found in series.values() for point in found]
  chips = [n for n, _ in points]
  rates = [one.tokens / s for _, one in points for s in (one.low, one.high)]

  def place(value, values, first, last) -> float:
    low, high = math.log(min(values)), math.log(max(values))
    return first + (math.log(value) - low) / ((high - low) or 1.0) * (last - first)

  def at(n: float, rate: float) -> str:
    x = place(n, chips, _LEFT, _WIDTH - 20)
    y = place(rate, rates, _HEIGHT - _BOTTOM, 20)
    return f"{x:.1f},{y:.1f}"

  shapes = []
  for n in sorted(set(chips)):
    x = place(n, chips, _LEFT, _WIDTH - 20)
    y = _HEIGHT - _BOTTOM + 20
    shapes.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{n:,}</text>')
  low, high = (math.log10(f(rates)) for f in (min, max))
  for power in range(math.ceil(low), math.floor(high) + 1):
    y = place(10.0**power, rates, _HEIGHT - _BOTTOM, 20)
    shapes.append(
      f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
      f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10**power:,}</text>'
    )
  for i, (name, found) in enumerate(series.items()):
    color = _COLORS[i % len(_COLORS)]
    upper = [at(n, one.tokens / one.low) for n, one in found]
    lower = [at(n, one.tokens / one.high) for n, one in found]
    middle = " ".join(at(n, one.tokens_per_second) for n, one in found)
    start = found[0][0]
    ideal = found[0][1].tokens_per_second / start
    # The ideal line is cut where it would leave the plot.
    end = min(found[-1][0], max(rates) / ideal)
    area = " ".join(upper + lower[::-1])
    shapes.append(
      f'<polygon points="{area}" fill="{color}" opacity="0.2"/>'
      f'<polyline points="{middle}" fill="none" stroke="{color}" stroke-width="2"/>'
      f'<polyline points="{at(start, ideal * start)} {at(end, ideal * end)}" '
      f'fill="none" stroke="{color}" stroke-dasharray="4 4"/>'
      f'<text x="{_LEFT + 10}" y="{30 + 18 * i}" fill="{color}">'
      f"{html.escape(name)}</text>"
    )
  shapes.append(
    f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
    "chips (vertical: tokens per second; band: error of the prediction)</text>"
  )
  return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(shapes)}</svg>'
