"""A plan as a table for the terminal, and as JSON; page.py draws it."""

import math
from typing import NamedTuple

from flaxlm.planning.collectives import Collective
from flaxlm.planning.roofline import Budget, Prediction


class Plan(NamedTuple):
  """Everything that `flaxlm plan` found out about a config on some hardware."""

  name: str  # of the config
  where: str  # the hardware, as the user wrote it
  sizes: dict[str, int]  # of the mesh
  how: str  # compiled | counted
  memory: dict[str, float]  # bytes per chip, by use; they add up to the peak
  available: float
  collectives: list[Collective]
  prediction: Prediction
  budget: Budget | None  # None if the number of tokens is unknown
  notes: tuple[str, ...] = ()  # fixes, warnings

  @property
  def fits(self) -> bool:
    return sum(self.memory.values()) <= self.available


def gib(size: float) -> str:
  return f"{size / 2**30:,.2f} GiB"


def band(low: float, mid: float, high: float, unit: str = "") -> str:
  """Returns "1.20 (1.00 to 1.50) unit": never a number without its error."""
  return f"{digits(mid)} ({digits(low)} to {digits(high)}) {unit}".rstrip()


def digits(number: float) -> str:
  """Returns a number with three significant digits, or more before the point."""
  if not number:
    return "0"
  places = max(2 - math.floor(math.log10(abs(number))), 0)
  return f"{round(number, places):,.{places}f}"


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
  """Returns the lines of the table as (label, text)."""
  found, mesh = plan.prediction, {a: n for a, n in plan.sizes.items() if n > 1}
  peak = sum(plan.memory.values())
  held = ", ".join(f"{name} {gib(size)}" for name, size in plan.memory.items())
  rate = found.tokens
  lines = [
    ("config", f"{plan.name} on {plan.where}"),
    ("mesh", " x ".join(f"{a} {n}" for a, n in mesh.items()) or "one device"),
    ("memory", f"{gib(peak)} of {gib(plan.available)} per chip ({plan.how}): {held}"),
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
    text = f"{axes} over {one.link}: {gib(one.bytes)} per chip and step"
    lines.append((one.kind, f"{text}, {one.count:,.0f} messages"))
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
  """Returns what `flaxlm plan` prints."""
  lines = plan_rows(plan)
  width = max(len(label) for label, _ in lines)
  return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def plan_to_json(plan: Plan) -> dict:
  """Returns the plan as plain values for `json.dumps`: seconds, bytes, USD, kWh."""
  found = plan.prediction
  return {
    **plan._asdict(),
    "fits": plan.fits,
    "collectives": [one._asdict() for one in plan.collectives],
    "prediction": {**found._asdict(), "terms": found.terms.flat()},
    "budget": plan.budget._asdict() if plan.budget else None,
  }
