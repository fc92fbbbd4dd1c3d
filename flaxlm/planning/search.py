"""Better settings for some hardware: the fastest, or the nearest that fits.

Only knobs that leave the result of a step unchanged are tried: the mesh, what the
backward pass computes again, and how many rows are in flight. roofline.py ranks the
candidates, memory.py drops those that cannot fit, and the compiler decides about the
best few.
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

_REMAT = ("none", "dots", "full")  # from the fastest to the smallest
# Candidates that agree in these knobs differ in replicas alone, which hardly matters.
_ALIKE = (
  "mesh.stage", "mesh.expert", "mesh.context", "mesh.tensor", "model.remat",
)  # fmt: skip
_LONG_ROW = 32_768  # tokens from which splitting a row is tried
_LARGE_MODEL = 5e10  # bytes of weights from which a pipeline is tried


class Candidate(NamedTuple):
  """Changes to a config, and what they lead to."""

  changes: dict[str, object]  # {knob: value}
  prediction: roofline.Prediction
  compiled: Compiled


def paste(changes: dict[str, object]) -> list[str]:
  """Returns the changes as lines of a config file."""
  return [f"config.{key} = {value!r}" for key, value in changes.items()]


def changed(config, changes: dict[str, object]):
  """Returns a changed copy of `config`, or None if it breaks a rule."""
  config = copy.deepcopy(config)
  for key, value in changes.items():
    set_value(config, key, value)
  return None if any(broken_rules(config)) else config


def try_change(config, hardware: Hardware, changes: dict, step=compile_apart):
  """Returns the `Candidate` with these changes, or None if they cannot work.

  Args:
    step: compile_apart, or count_step, which takes no time.
  """
  config = changed(config, changes)
  if config is None:
    return None
  try:
    result, prediction = judge(config, hardware, step)
  except ConfigError:  # the mesh does not divide a weight
    return None
  return Candidate(changes, prediction, result)


def judge(config, hardware: Hardware, step=compile_apart):
  """Returns (Compiled, Prediction) of a config.

  If the step does not compile, its messages are counted.
  """
  result = step(config, hardware)
  messages = result.collectives or None
  return result, roofline.predict(config, result.sizes, hardware, messages)


def search(
  config, hardware: Hardware, step=compile_apart, compiles: int = 6
) -> list[Candidate]:
  """Returns the best settings that fit, fastest first.

  Args:
    step: as in `try_change`; it is called for at most 2 x `compiles` candidates.
    compiles: how many settings to return at most.
  """
  count = functools.partial(count_step, state=abstract_state(config))
  counted = []
  for mesh in meshes(config, hardware):
    for remat in _REMAT:
      fitting = []
      for passes in _split_batch(config, mesh):
        changes = mesh | passes | {"model.remat": remat}
        candidate = try_change(config, hardware, changes, count)
        if candidate and candidate.compiled.fits:
          fitting.append(candidate)
        if len(fitting) == 4:  # the most rows that fit, and the next three choices
          break
      counted += fitting
  counted.sort(key=lambda candidate: candidate.prediction.mid)
  found, tried, kinds = [], 0, set()
  error = {}  # mesh.expert -> the largest ratio of compiled to counted bytes so far
  for changes, _, by_count in counted:
    kind, experts = tuple(changes[key] for key in _ALIKE), changes["mesh.expert"]
    expected = by_count.peak * error.get(experts, 1.0)
    if kind in kinds or expected > by_count.available:
      continue
    if len(found) == compiles or tried == 2 * compiles:
      break
    tried += 1
    candidate = try_change(config, hardware, changes, step)
    if candidate is None:  # the compiler crashed, and would again
      kinds.add(kind)
      continue
    more = candidate.compiled.peak / by_count.peak
    error[experts] = max(more, error.get(experts, 1.0))
    if candidate.compiled.fits:
      kinds.add(kind)
      found.append(candidate._replace(changes=difference(config, hardware, changes)))
  return sorted(found, key=lambda candidate: candidate.prediction.mid)


def meshes(config, hardware: Hardware) -> Iterator[dict[str, int]]:
  """Yields meshes worth trying, as knobs: they use all chips and divide the model."""
  model, experts = config.model, config.model.moe.num_experts
  weights = 4 * sum(operations.layer_parameters(config))
  slices = {hardware.num_slices}
  if hardware.chip.link != "ici":  # GPU nodes need not be an axis
    slices.add(1)
  for slice in sorted(slices):
    chips = hardware.num_chips // slice
    for tensor in _powers_of_two(min(8, chips)):
      if model.num_heads % tensor or model.num_kv_heads % tensor:
        continue
      rest = chips // tensor
      long = config.data.seq_len // 4096 if config.data.seq_len >= _LONG_ROW else 1
      for context in _powers_of_two(min(rest, long)):
        for expert in _powers_of_two(min(rest // context, experts)):
          for stage in _powers_of_two(16 if weights >= _LARGE_MODEL else 1):
            left, remainder = divmod(rest, context * expert * stage)
            if remainder:
              continue
            for fsdp in _divisors(left):
              yield {
                "mesh.slice": slice,
                "mesh.stage": stage,
                "mesh.data": left // fsdp,
                "mesh.fsdp": fsdp,
                "mesh.expert": expert,
                "mesh.context": context,
                "mesh.tensor": tensor,
              } | ({"model.attention": CONTEXT_PARALLEL} if context > 1 else {})


def _split_batch(config, mesh: dict[str, int]) -> list[dict[str, int]]:
  """Returns the ways to split a batch into passes, down to one row per replica."""
  ways = math.prod(mesh[f"mesh.{axis}"] for axis in BATCH_AXES)
  rows, remainder = divmod(config.data.batch_size, ways)
  if remainder:
    return []
  if mesh["mesh.stage"] == 1:
    return [{"step.accumulation_steps": passes} for passes in _divisors(rows)]
  return [
    {"step.accumulation_steps": 1, "mesh.microbatches": passes}
    for passes in _divisors(rows)
    if passes >= mesh["mesh.stage"]
  ]


def nearest_that_fits(
  config, hardware: Hardware, step=compile_apart
) -> Candidate | None:
  """Returns the smallest change with which the compiled step fits, or None."""
  count = functools.partial(count_step, state=abstract_state(config))
  for changes in _smaller(config, hardware):
    counted = try_change(config, hardware, changes, count)
    # Counts may be wrong, but not by half: do not compile what cannot fit.
    if counted is None or counted.compiled.peak > 1.5 * counted.compiled.available:
      continue
    candidate = try_change(config, hardware, changes, step)
    if candidate and candidate.compiled.fits:
      return candidate
  return None


def _smaller(config, hardware: Hardware) -> Iterator[dict[str, object]]:
  """Yields changes that need less memory, cheap ones first."""
  sizes = fill_axes(axis_sizes(config.mesh), hardware.num_chips, hardware.chip.name)
  mesh = {f"mesh.{axis}": size for axis, size in sizes.items()}
  seen = [{}]
  for option in _shrinking_options(config, mesh):
    changes = difference(config, hardware, option)
    if changes not in seen:
      seen.append(changes)
      yield changes


def difference(config, hardware: Hardware, changes: dict) -> dict[str, object]:
  """Returns the changes that differ from the config, in which data=-1 is filled in."""
  now = flatten(config)
  rest = math.prod(now[f"mesh.{axis}"] for axis in AXES if axis != "data")
  if now["mesh.data"] == -1 and hardware.num_chips % rest == 0:
    now["mesh.data"] = hardware.num_chips // rest
  return {key: value for key, value in changes.items() if now[key] != value}


def _shrinking_options(config, mesh: dict[str, int]) -> Iterator[dict]:
  """Yields more passes, then remat, then meshes that split the weights further."""
  least = {"step.accumulation_steps": config.step.accumulation_steps}
  for passes in _split_batch(config, mesh):
    if passes["step.accumulation_steps"] >= least["step.accumulation_steps"]:
      least = passes
      yield least
  yield {"model.remat": "full"}
  least = least | {"model.remat": "full"}
  yield least
  replicas = mesh["mesh.data"] * mesh["mesh.fsdp"]
  wider = [mesh | {"mesh.data": 1, "mesh.fsdp": replicas}]
  for axis, limit in (("tensor", 8), ("context", config.data.seq_len // 4096)):
    for size in _powers_of_two(limit):
      factor, remainder = divmod(size, mesh[f"mesh.{axis}"])
      if factor > 1 and not remainder and replicas % factor == 0:
        wider.append(wider[0] | {f"mesh.{axis}": size, "mesh.fsdp": replicas // factor})
  for mesh in wider:
    if options := _split_batch(config, mesh):
      yield least | mesh | options[-1]


def _powers_of_two(limit: int) -> list[int]:
  """Returns 1, 2, 4 ... up to `limit`."""
  return [2**i for i in range(max(limit, 1).bit_length())]


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]
