"""A plan for people: a table in the terminal, a page with its drawings, and JSON."""

import html
import math
from collections.abc import Callable
from typing import NamedTuple

from flaxlm.planning.roofline import Budget, Collective, Prediction

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
  padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.5em 0 }
td, th { padding: 0.15em 1em 0.15em 0; text-align: left; vertical-align: top }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif }
"""


class Plan(NamedTuple):
  """Everything that `flaxlm.plan` found out about a config on some hardware."""

  name: str  # of the config
  where: str  # the hardware, as the user wrote it
  sizes: dict[str, int]  # of the mesh
  how: str  # compiled | counted
  memory: dict[str, float]  # bytes a chip, by what they hold; they add up to the peak
  available: float
  collectives: list[Collective]
  prediction: Prediction
  budget: Budget | None  # None without a number of tokens
  notes: tuple[str, ...] = ()  # what else a reader should know: a fix, a warning

  @property
  def fits(self) -> bool:
    return sum(self.memory.values()) <= self.available


def gib(size: float) -> str:
  return f"{size / 2**30:,.2f} GiB"


def band(low: float, mid: float, high: float, unit: str = "") -> str:
  """1.2 (1.0 to 1.5) unit: three digits that count, never a bare number."""
  return f"{digits(mid)} ({digits(low)} to {digits(high)}) {unit}".rstrip()


def digits(number: float) -> str:
  if not number:
    return "0"
  places = max(2 - math.floor(math.log10(abs(number))), 0)
  return f"{round(number, places):,.{places}f}"


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
  """The plan as (label, text)."""
  found, mesh = plan.prediction, {a: n for a, n in plan.sizes.items() if n > 1}
  peak = sum(plan.memory.values())
  held = ", ".join(f"{name} {gib(size)}" for name, size in plan.memory.items())
  rate = found.tokens
  lines = [
    ("config", f"{plan.name} on {plan.where}"),
    ("mesh", " x ".join(f"{a} {n}" for a, n in mesh.items()) or "one device"),
    ("memory", f"{gib(peak)} of {gib(plan.available)} a chip ({plan.how}): {held}"),
    ("fits", "yes" if plan.fits else "NO"),
    ("step", band(found.low, found.mid, found.high, "s")),
    ("bound by", found.bound),
    (
      "terms",
      ", ".join(
        f"{name} {digits(s)} s" for name, s in found.terms.flat().items() if s > 0
      ),
    ),
    ("tokens/s", band(rate / found.high, found.tokens_per_second, rate / found.low)),
    (
      "MFU",
      f"{found.mfu:.0%} ({found.mfu * found.mid / found.high:.0%} to "
      f"{found.mfu * found.mid / found.low:.0%}); computed again or masked: "
      f"{found.hardware_flops / found.model_flops - 1:.0%} more FLOPs",
    ),
  ]
  for one in plan.collectives:
    axes = " x ".join(one.axes)
    text = f"{axes} over {one.link}: {gib(one.bytes)} a chip and step, {one.count:,.0f}"
    lines.append((one.kind, text + " messages"))
  if plan.budget:
    cost = plan.budget
    lines += [
      ("time", band(*cost.days, "days")),
      ("device hours", band(*cost.device_hours)),
      ("cost", band(*cost.cost, "USD")),
      ("energy", band(*cost.energy, "kWh, an estimate")),
    ]
  assumed = found.assumptions + (plan.budget.assumptions if plan.budget else ())
  lines += [("assumed", text) for text in assumed]
  return lines + [("note", text) for text in plan.notes]


def plan_table(plan: Plan) -> str:
  """What `python -m flaxlm.plan` prints."""
  lines = plan_rows(plan)
  width = max(len(label) for label, _ in lines)
  return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def plan_to_json(plan: Plan) -> dict:
  """The plan as plain values for `json.dumps`; seconds, bytes, USD, kWh."""
  found = plan.prediction
  return {
    **plan._asdict(),
    "fits": plan.fits,
    "collectives": [one._asdict() for one in plan.collectives],
    "prediction": {**found._asdict(), "terms": found.terms.flat()},
    "budget": plan.budget._asdict() if plan.budget else None,
  }


def page(plan: Plan) -> str:
  """One HTML file that needs no other: memory against its limit, the step's terms."""
  cells = "\n".join(
    f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>"
    for label, text in plan_rows(plan)
  )
  found = plan.prediction
  memory = bars([("a chip", plan.memory)], plan.available, "limit", gib)
  waits = {name: s for name, s in found.terms.flat().items() if s > 0}
  hidden = found.terms.hidden
  shown = {name: s - hidden.get(name, 0.0) for name, s in waits.items()}
  tracks = [("in turn", {name: s for name, s in shown.items() if s > 0})]
  tracks += [(f"{link}, beside it", {link: s}) for link, s in hidden.items()]
  step = bars(tracks, found.mid, "step", lambda s: f"{digits(s)} s")
  return document(
    f"{plan.name} on {plan.where}",
    f"<h2>Memory</h2>{memory}<h2>A step</h2>{step}<table>{cells}</table>",
  )


def document(title: str, body: str) -> str:
  title = html.escape(title)
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    f"<style>{STYLE}</style><h1>{title}</h1>{body}</html>\n"
  )


def bars(tracks, limit: float, name: str, show: Callable[[float], str]) -> str:
  """Stacked bars, one a track, and a line at `limit`, as SVG with its legend.

  Args:
    tracks: (label, {part: size}) of each bar.
  """
  left, width, height = 110, 640, 28
  whole = max([limit, *(sum(parts.values()) for _, parts in tracks)]) or 1.0
  names = list(dict.fromkeys(part for _, parts in tracks for part in parts))
  color = {part: COLORS[i % len(COLORS)] for i, part in enumerate(names)}
  shapes = []
  for i, (label, parts) in enumerate(tracks):
    x, y = float(left), 24 + i * (height + 6)
    shapes.append(f'<text x="0" y="{y + 18}">{html.escape(label)}</text>')
    for part, size in parts.items():
      long = size / whole * width
      shapes.append(
        f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{height}" '
        f'fill="{color[part]}"><title>{html.escape(f"{part} {show(size)}")}</title>'
        "</rect>"
      )
      x += long
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
