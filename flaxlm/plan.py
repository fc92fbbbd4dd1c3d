"""Know before you rent: does a config fit the hardware, how fast is it, at what cost?

  python -m flaxlm.plan --config=configs/llama3_8b.py --hardware=v5p:8x16x16
  python -m flaxlm.plan --config=configs/llama3_8b.py --hardware=v5e:16x16 --search

The hardware need not be here. For TPUs, libtpu compiles the real training step (pip
install libtpu); for GPUs that are not here, memory is counted. If a step does not fit,
the smallest change with which it does is searched for. Several --config print one line
each. --calibrate measures this machine, which is then --hardware=this. Exit codes: 0
done, whether it fits or not; 2 config.
"""

import json
import pathlib

from flaxlm import cli, files
from flaxlm.config.load import load_config
from flaxlm.errors import ConfigError


def main(argv: list[str] | None = None) -> None:
  args, overrides = cli.parse_arguments(make_parser(), argv)
  if not args.config:
    raise ConfigError("--config", "nothing", "a config file", "configs/llama3_8b.py")
  loaded = {path: load_config(path, overrides, args.allow) for path in args.config}
  if args.html:
    files.check_output(args.html, f"--html={args.html}")
  if args.calibrate:
    from flaxlm.planning import calibrate

    files.check_output(args.calibration, f"--calibration={args.calibration}")
    measured = calibrate.measure(list(loaded.values()))
    calibrate.save_calibration(measured, args.calibration)
    print(f"measured this machine: {args.calibration}, --hardware=this")
    return
  if args.scaling:
    _scale(loaded, args)
    return
  found = [_plan_one(path, config, args) for path, config in loaded.items()]
  _show(found, args)


def _show(found: list[tuple], args) -> None:
  """Prints what `_plan_one` returned for each config, and writes the page."""
  from flaxlm.planning import table
  from flaxlm.planning.page import plan_page

  if args.html:
    page = "\n".join(plan_page(plan) for plan, _ in found)
    files.write_output(args.html, page, f"--html={args.html}")
  if args.json:
    print(
      json.dumps([table.plan_to_json(plan) | more for plan, more in found], indent=2)
    )
  elif len(found) == 1:
    plan, more = found[0]
    print("\n".join([table.plan_table(plan), *more["advice"]]))
  else:
    print(_summary_table(found))


def _scale(loaded: dict, args) -> None:
  """Prints and draws the predicted speed of each config on 8 to 8,192 chips."""
  from flaxlm.planning import scaling
  from flaxlm.planning.page import scaling_page

  series = {}
  for path, config in loaded.items():
    hardware = _hardware_of(path, config, args)
    found = scaling.weak_scaling(config, hardware)
    series[f"{pathlib.Path(path).stem} on {hardware.chip.name}"] = found
  for name, found in series.items():
    print(f"{name}, the same rows per chip:\n{scaling.scaling_table(found)}")
  if args.html:
    page = scaling_page("weak scaling, predicted", series)
    files.write_output(args.html, page, f"--html={args.html}")


def _hardware_of(path: str, config, args):
  """Returns the hardware of --hardware, or else that of the config."""
  from flaxlm.parallel import hardware as chips
  from flaxlm.planning import calibrate

  where = args.hardware or config.hardware
  if not where:
    needed = f"a name, as {path} has no config.hardware"
    raise ConfigError("--hardware", "nothing", needed, "v5e:4x4")
  here = (
    calibrate.load_calibration(args.calibration) if where in ("this", "cpu") else None
  )
  return chips.parse_hardware(where, here)


def make_parser():
  parser = cli.make_parser(__doc__, "plan")
  add = parser.add_argument
  cli.add_config(parser, "a config file; may be repeated", action="append")
  add("--hardware", help="v5e:16x16, 2xv5p:8x8x8, h100x64, this; default: the config's")
  add("--search", action="store_true", help="find the fastest mesh, remat and passes")
  add(
    "--scaling",
    action="store_true",
    help="predict 8 to 8,192 chips, with the same rows per chip",
  )
  add("--json", action="store_true", help="print JSON")
  add("--html", metavar="FILE", help="also write a page")
  add("--price", type=float, help="USD per chip and hour; default: from a dated table")
  add("--tokens", type=float, help="in the whole run; default: the config's num_steps")
  add("--no_compile", action="store_true", help="count instead: fast, less exact")
  add("--calibrate", action="store_true", help="measure this machine for the configs")
  add(
    "--calibration", metavar="FILE", default="calibration.json",
    help="where the measurements are kept (%(default)s)",
  )  # fmt: skip
  return parser


def _plan_one(path: str, config, args) -> tuple:
  """Returns (Plan, what --json prints besides) for one config."""
  import jax

  from flaxlm.planning import roofline, search
  from flaxlm.planning.compile import compile_apart, count_step
  from flaxlm.planning.table import Plan

  hardware = _hardware_of(path, config, args)
  if hardware.chip.link == "ici":  # libtpu compiles for it, and never touches it
    jax.config.update("jax_platforms", "cpu")
  step = count_step if args.no_compile else compile_apart
  found, nearest = [], None
  if args.search:
    found = search.search(config, hardware, step)
  if found:
    _, prediction, result = found[0]
  else:
    result, prediction = search.judge(config, hardware, step)
    if not result.fits:
      nearest = search.nearest_that_fits(config, hardware, step)
  tokens = args.tokens or config.num_steps * prediction.tokens
  notes = []
  if result.compile_seconds:
    notes.append(
      f"compiled in {result.compile_seconds:.0f} s; the process grew to "
      f"{result.host_bytes / 1e9:.1f} GB"
    )
  plan = Plan(
    pathlib.Path(path).stem,
    args.hardware or config.hardware,
    result.sizes,
    result.how,
    result.memory,
    result.available,
    result.collectives,
    prediction,
    roofline.budget(prediction, hardware, tokens, args.price),
    tuple(notes),
  )
  more = {
    "compile_seconds": result.compile_seconds,
    "host_bytes": result.host_bytes,
    "nearest": nearest.changes if nearest else None,
    "found": [one.changes | {"seconds": one.prediction.mid} for one in found],
    "advice": list(_advice(result, nearest, found)),
  }
  return plan, more


def _advice(result, nearest, found: list):
  """Yields what to print below the table: what was found, and lines to paste."""
  from flaxlm.planning.search import paste

  if found:
    yield "\nBest first, seconds per step (low to high); the table is of the first:"
  for rank, one in enumerate(found, 1):
    took, peak = one.prediction, one.compiled.peak / 2**30
    mesh = " ".join(f"{axis}={n}" for axis, n in one.compiled.sizes.items() if n > 1)
    others = [
      f"{key.split('.')[-1]}={value}"
      for key, value in one.changes.items()
      if not key.startswith("mesh.") or key == "mesh.microbatches"
    ]
    yield (
      f"{rank}. {took.mid:.3g} ({took.low:.3g} to {took.high:.3g}), "
      f"MFU {took.mfu:.0%}, bound by {took.bound}, {peak:,.1f} GiB: {mesh} "
      + " ".join(others)
    )
  chosen = found[0] if found else nearest
  if nearest:
    yield f"\nThe smallest change that fits ({nearest.compiled.peak / 2**30:,.2f} GiB):"
  elif found:
    yield (
      "\nFor the first, in the config:" if chosen.changes else "\nIt is your config."
    )
  elif not result.fits:
    yield "\nNo change of passes, remat or mesh was found that fits: use more chips."
  if chosen:
    yield from (f"  {line}" for line in paste(chosen.changes))


def _summary_table(found: list[tuple]) -> str:
  """Returns a Markdown table with one line per config."""
  lines = [
    "| config | hardware | mesh | fits | GiB per chip | predicted MFU | bound by "
    "| compiled in |",
    "|---" * 8 + "|",
  ]
  for plan, more in found:
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.sizes.items() if n > 1)
    took, limit = plan.prediction, plan.available / 2**30
    slow, fast = (took.mfu * took.mid / seconds for seconds in (took.high, took.low))
    cells = [
      plan.name,
      plan.where,
      mesh or "one device",
      "yes" if plan.fits else "no",
      f"{sum(plan.memory.values()) / 2**30:,.1f} of {limit:,.1f}",
      f"{took.mfu:.0%} ({slow:.0%} to {fast:.0%})",
      took.bound,
      f"{more['compile_seconds']:.0f} s, {more['host_bytes'] / 1e9:.1f} GB",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run_command(
    main, cache=False
  )  # programs for machines elsewhere cannot be read back
