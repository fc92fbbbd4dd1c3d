"""Better settings for some hardware: the fastest, or the nearest that fits.

Only what leaves the result of a step as it is may change: the mesh, what the backward
pass computes again, and how many rows are in flight. The model of roofline.py ranks,
memory.py drops what cannot fit, and the compiler has the last word on the best few.
"""

import copy
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

from flaxlm.config.rules import broken_rules
from flaxlm.config.tree import flatten, set_value
from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.choice import CONTEXT_PARALLEL
from flaxlm.parallel import AXES, BATCH_AXES
from flaxlm.parallel.hardware import Hardware
from flaxlm.parallel.mesh import axis_sizes, fill_axes
from flaxlm.planning import operations, roofline
from flaxlm.planning.compile import Compiled, abstract_state, compile_apart, count_step

REMAT = ("none", "dots", "full")  # from the fastest to the smallest
ALIKE = (
  "mesh.stage", "mesh.expert", "mesh.context", "mesh.tensor", "model.remat",
)  # fmt: skip
LONG = 32_768  # tokens a row from which splitting it is tried
LARGE = 5e10  # bytes of weights from which a pipeline is tried


class Candidate(NamedTuple):
  changes: dict[str, object]  # knob -> value, where it differs from the config given
  prediction: roofline.Prediction
  compiled: Compiled


def paste(changes: dict[str, object]) -> list[str]:
  """The changes as lines of a config file."""
  return [f"config.{key} = {value!r}" for key, value in changes.items()]


def changed(config, changes: dict[str, object]):
  """Returns a changed copy of `config`, or None where the result cannot work."""
  config = copy.deepcopy(config)
  for key, value in changes.items():
    set_value(config, key, value)
  return None if any(broken_rules(config)) else config


def try_change(config, hardware: Hardware, changes: dict, step=compile_apart):
  """Returns the `Candidate` of some changes, or None where they cannot work.

  Args:
    step: compile_apart, or count, which takes no time.
  """
  config = changed(config, changes)
  if config is None:
    return None
  try:
    result, prediction = judge(config, hardware, step)
  except ConfigError:  # a weight does not divide
    return None
  return Candidate(changes, prediction, result)


def judge(config, hardware: Hardware, step=compile_apart):
  """Returns (Compiled, Prediction); what does not compile sends what it should."""
  result = step(config, hardware)
  messages = result.collectives or None
  return result, roofline.predict(config, result.sizes, hardware, messages)


def search(
  config, hardware: Hardware, step=compile_apart, compiles: int = 6
) -> list[Candidate]:
  """Returns the best settings found that fit, fastest first, at most `compiles`.

  Args:
    step: as in `evaluate`; it judges the best candidates, twice `compiles` at most.
  """
  by_hand = functools.partial(count_step, state=abstract_state(config))
  counted = []
  for mesh in meshes(config, hardware):
    for remat in REMAT:
      fitting = []
      for passes in rows_in_flight(config, mesh):
        changes = mesh | passes | {"model.remat": remat}
        candidate = try_change(config, hardware, changes, by_hand)
        if candidate and candidate.compiled.fits:
          fitting.append(candidate)
        if len(fitting) == 4:  # the most rows that fit, and the next
          break
      counted += fitting
  counted.sort(key=lambda candidate: candidate.prediction.mid)
  found, tried = [], 0
  kinds = set()  # what differs in replicas alone is as good as equal
  error = {}  # experts' split -> compiled over counted bytes, the largest so far
  for changes, _, by_count in counted:
    kind, experts = tuple(changes[key] for key in ALIKE), changes["mesh.expert"]
    expected = by_count.peak * error.get(experts, 1.0)
    if kind in kinds or expected > by_count.available:
      continue
    if len(found) == compiles or tried == 2 * compiles:
      break
    tried += 1
    candidate = try_change(config, hardware, changes, step)
    if candidate is None:  # the compiler broke down, and would again
      kinds.add(kind)
      continue
    more = candidate.compiled.peak / by_count.peak
    error[experts] = max(more, error.get(experts, 1.0))
    if candidate.compiled.fits:
      kinds.add(kind)
      found.append(candidate._replace(changes=difference(config, hardware, changes)))
  return sorted(found, key=lambda candidate: candidate.prediction.mid)


def meshes(config, hardware: Hardware) -> Iterator[dict[str, int]]:
  """Yields the meshes worth a thought, as knobs: all of the chips, all divisible."""
  model, experts = config.model, config.model.moe.num_experts
  weights = 4 * sum(operations.layer_parameters(config))
  slices = {hardware.num_slices}
  if hardware.chip.link != "ici":  # nodes need not be an axis
    slices.add(1)
  for slice in sorted(slices):
    chips = hardware.num_chips // slice
    for tensor in powers(min(8, chips)):
      if model.num_heads % tensor or model.num_kv_heads % tensor:
        continue
      rest = chips // tensor
      long = config.data.seq_len // 4096 if config.data.seq_len >= LONG else 1
      for context in powers(min(rest, long)):
        for expert in powers(min(rest // context, experts)):
          for stage in powers(16 if weights >= LARGE else 1):
            left, remainder = divmod(rest, context * expert * stage)
            if remainder:
              continue
            for fsdp in divisors(left):
              yield {
                "mesh.slice": slice,
                "mesh.stage": stage,
                "mesh.data": left // fsdp,
                "mesh.fsdp": fsdp,
                "mesh.expert": expert,
                "mesh.context": context,
                "mesh.tensor": tensor,
              } | ({"model.attention": CONTEXT_PARALLEL} if context > 1 else {})


def rows_in_flight(config, mesh: dict[str, int]) -> list[dict[str, int]]:
  """The ways to cut a batch into passes, down to one row a pass and group of chips."""
  ways = math.prod(mesh[f"mesh.{axis}"] for axis in BATCH_AXES)
  rows, remainder = divmod(config.data.batch_size, ways)
  if remainder:
    return []
  if mesh["mesh.stage"] == 1:
    return [{"step.accumulation_steps": passes} for passes in divisors(rows)]
  return [
    {"step.accumulation_steps": 1, "mesh.microbatches": passes}
    for passes in divisors(rows)
    if passes >= mesh["mesh.stage"]
  ]


def nearest_that_fits(
  config, hardware: Hardware, step=compile_apart
) -> Candidate | None:
  """Returns the smallest change with which `config` fits, as compiled; None if none."""
  by_hand = functools.partial(count_step, state=abstract_state(config))
  for changes in smaller(config, hardware):
    counted = try_change(config, hardware, changes, by_hand)
    # What is counted may be wrong, not by half: spare the compiler the hopeless.
    if counted is None or counted.compiled.peak > 1.5 * counted.compiled.available:
      continue
    candidate = try_change(config, hardware, changes, step)
    if candidate and candidate.compiled.fits:
      return candidate
  return None


def smaller(config, hardware: Hardware) -> Iterator[dict[str, object]]:
  """Yields changes that need less memory, from harmless to costly."""
  sizes = fill_axes(axis_sizes(config.mesh), hardware.num_chips, hardware.chip.name)
  mesh = {f"mesh.{axis}": size for axis, size in sizes.items()}
  seen = [{}]
  for option in shrinking(config, hardware, mesh):
    changes = difference(config, hardware, option)
    if changes not in seen:
      seen.append(changes)
      yield changes


def difference(config, hardware: Hardware, changes: dict) -> dict[str, object]:
  """The changes that change something; `mesh.data=-1` is what it would become."""
  now = flatten(config)
  rest = math.prod(now[f"mesh.{axis}"] for axis in AXES if axis != "data")
  if now["mesh.data"] == -1 and hardware.num_chips % rest == 0:
    now["mesh.data"] = hardware.num_chips // rest
  return {key: value for key, value in changes.items() if now[key] != value}


def shrinking(config, hardware: Hardware, mesh: dict[str, int]) -> Iterator[dict]:
  least = {"step.accumulation_steps": config.step.accumulation_steps}
  for passes in rows_in_flight(config, mesh):
    if passes["step.accumulation_steps"] >= least["step.accumulation_steps"]:
      least = passes
      yield least
  yield {"model.remat": "full"}
  least = least | {"model.remat": "full"}
  yield least
  replicas = mesh["mesh.data"] * mesh["mesh.fsdp"]
  wider = [mesh | {"mesh.data": 1, "mesh.fsdp": replicas}]
  for axis, limit in (("tensor", 8), ("context", config.data.seq_len // 4096)):
    for size in powers(limit):
      factor, remainder = divmod(size, mesh[f"mesh.{axis}"])
      if factor > 1 and not remainder and replicas % factor == 0:
        wider.append(wider[0] | {f"mesh.{axis}": size, "mesh.fsdp": replicas // factor})
  for mesh in wider:
    if options := rows_in_flight(config, mesh):
      yield least | mesh | options[-1]


def powers(limit: int) -> list[int]:
  """1, 2, 4 ... up to `limit`."""
  return [2**i for i in range(max(limit, 1).bit_length())]


def divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]
