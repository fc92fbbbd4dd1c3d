"""The messages that a compiled program sends, read from its text.

XLA prints each instruction once, however often it runs, so the body of a loop counts
once per iteration. On TPUs, one message is cut into several fusions, which share its
channel; a reduce-scatter is an all-reduce inside a computation of that name; messages
between slices go through the host, as pairs of send and recv.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from flaxlm.parallel.hardware import Hardware
from flaxlm.planning.collectives import Collective, link_of

COLLECTIVE_KINDS = {
  "all-gather": "all-gather",
  "all-reduce": "all-reduce",
  "reduce-scatter": "reduce-scatter",
  "all-to-all": "all-to-all",
  "ragged-all-to-all": "all-to-all",
  "collective-permute": "permute",
  "recv": "permute",  # unless `_xla_megascale_transfer_type` says otherwise
}
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bf16[8,128], pred[]
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(
  r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  shape: str
  opcode: str
  rest: str  # operands and attributes


def collectives(
  text: str, sizes: dict[str, int], hardware: Hardware
) -> list[Collective]:
  """Returns the messages of one run of a program, most bytes first.

  Args:
    text: of the optimized program.
    sizes: of the axes of its mesh, in order.
  """
  computations, entry = parse_hlo(text)
  found = {}
  _walk(computations, entry, 1, entry, found)
  totals = collections.defaultdict(lambda: [0.0, 0])
  for kind, size, group, times in found.values():
    axes = _varying_axes(group, sizes) if isinstance(group, np.ndarray) else group
    if axes:  # a group of one sends nothing
      total = totals[kind, axes]
      total[0] += size * times
      total[1] += times
  rows = [
    Collective(kind, size, count, axes, link_of(axes, sizes, hardware))
    for (kind, axes), (size, count) in totals.items()
  ]
  return sorted(rows, key=lambda row: -row.bytes)


def parse_hlo(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns ({computation: its instructions}, name of the entry computation)."""
  computations, entry, current = {}, "", []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations[match[2]] = []
      entry = match[2] if match[1] else entry
    elif match := _INSTRUCTION.match(line):
      current.append(Instruction(*match.groups()))
  return computations, entry


def _walk(computations: dict, name: str, times: int, scope: str, found: dict) -> None:
  """Adds to `found` the collectives of a computation that runs `times` times.

  Args:
    scope: the computation that called the fusions around this one. Pieces of one
      message share a `chain_id` there.
  """
  here = {instruction.name: instruction for instruction in computations[name]}
  for instruction in here.values():
    opcode, rest = instruction.opcode, instruction.rest
    kind = COLLECTIVE_KINDS.get(opcode.removesuffix("-done"))
    if kind and opcode != "recv-done":
      started = instruction
      if opcode.endswith("-done"):  # its shape is the result alone
        started = here[re.search(r"%([\w.\-]+)", rest)[1]]
      chain = re.search(r'chain_id="(\d+)"', started.rest)
      key = scope, chain[1] if chain else (name, instruction.name)
      found[key] = (*_describe_instruction(kind, instruction, started, name), times)
    elif opcode == "while":
      body, condition = (
        re.search(rf"{what}=%?([\w.\-]+)", rest)[1] for what in ("body", "condition")
      )
      iterations = trip_count(computations, condition, rest)
      _walk(computations, body, times * iterations, body, found)
    elif opcode in ("fusion", "call", "async-start", "conditional"):
      called = CALLED.findall(rest)
      for names in re.findall(r"branch_computations=\{(.*?)\}", rest):
        called += re.findall(r"[\w.\-]+", names)
      for inner in called:
        _walk(computations, inner, times, name if opcode == "call" else scope, found)


def _describe_instruction(
  kind: str, result: Instruction, started: Instruction, computation: str
) -> tuple:
  """Returns (kind, bytes, members of its groups or names of axes) of a message."""
  if transfer := re.search(r'megascale_transfer_type="(\w+)"', started.rest):
    kind = transfer[1].lower().replace("_", "-")
    size = num_bytes(result.shape.replace("u32[]", ""))
    return kind if kind in COLLECTIVE_KINDS else "permute", size, ("slice",)
  group = members(started.rest)
  size = num_bytes(result.shape)
  if kind == "reduce-scatter":
    size *= group.shape[-1] if group.size else 1
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  return kind, size, group


def trip_count(computations: dict, condition: str, rest: str) -> int:
  """Returns the iterations of a loop: as XLA states them, or its counter's bound."""
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', rest):
    return int(known[1])
  todo, constants = [condition], []
  while todo:
    for instruction in computations[todo.pop()]:
      todo += CALLED.findall(instruction.rest)
      if instruction.opcode == "constant" and re.match(
        "[su](32|64)", instruction.shape
      ):
        constants.append(int(instruction.rest.split(")")[0]))
  return max(constants, default=1)


def num_bytes(shape: str) -> float:
  """Returns the bytes of a shape such as `(bf16[8,128]{1,0}, u32[])`."""
  return sum(
    int(bits or 8) / 8 * math.prod(int(n) for n in dims.split(",") if n)
    for bits, dims in _ARRAY.findall(shape)
  )


def members(rest: str) -> np.ndarray:
  """Returns the devices that exchange a message, as an array of groups x members.

  Devices are numbered in the order of the mesh; 0 x 0 means all of them. XLA writes
  groups as lists, as a reshaped and transposed range, or by the axes of a mesh of its
  own. It writes permutations as pairs, each of which is a group here.
  """
  numbers = re.compile(r"\d+")
  if text := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest):
    rows = [[int(n) for n in numbers.findall(row)] for row in text[1].split("},")]
    return np.array(rows)
  if text := re.search(
    r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", rest
  ):
    return _parse_range(text[1])
  if text := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}", rest):
    return _parse_mesh_groups(*text.groups())
  return np.zeros((0, 0), int)


def _parse_range(text: str) -> np.ndarray:
  """Parses `[4,2]<=[2,4]T(1,0)`: a range of shape 2 x 4, transposed, as 4 x 2."""
  shape, source, order = (
    [int(n) for n in part.split(",")] if part else None
    for part in re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  )
  ids = np.arange(math.prod(source)).reshape(source)
  return (ids.transpose(order) if order else ids).reshape(shape)


def _parse_mesh_groups(sizes: str, devices: str, chosen: str) -> np.ndarray:
  """Parses `mesh['a'=4,'b'=2] {'b'}`: groups along b; `'a':(2)2` is a part of axis a.

  The devices of that mesh are in order, a list of numbers, or `([2,4]T(1,0))`: a range
  in that shape, transposed.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", sizes)}
  ids = np.arange(math.prod(sizes.values()))
  if found := re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", devices):
    shape, order = ([int(n) for n in part.split(",")] for part in found.groups())
    ids = ids.reshape(shape).transpose(order)
  elif listed := re.findall(r"\d+", devices):
    ids = np.array([int(n) for n in listed])
  parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
  shape, inside = [], []
  for name, size in sizes.items():
    cuts = {(int(pre or 1), int(n or size)) for axis, pre, n in parts if axis == name}
    done = 1
    for before, length in sorted(cuts):
      shape += [before // done, length]
      inside.append(len(shape) - 1)
      done = before * length
    shape.append(size // done)
  outside = [i for i in range(len(shape)) if i not in inside]
  length = math.prod(shape[i] for i in inside)
  return ids.reshape(shape).transpose(outside + inside).reshape(-1, length)


def _varying_axes(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
  """Returns the axes along which the members of a group differ."""
  if not groups.size:
    return tuple(axis for axis, size in sizes.items() if size > 1)
  places = np.unravel_index(groups, tuple(sizes.values()))
  return tuple(
    axis
    for axis, place in zip(sizes, places, strict=True)
    if (place != place[:, :1]).any()
  )
