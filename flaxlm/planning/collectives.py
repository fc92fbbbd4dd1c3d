"""What chips send each other in a step, over which link, and how long that takes.

The messages are counted from the config, where a step cannot be compiled; hlo.py reads
them off a compiled step.
"""

import math
from typing import NamedTuple

from flaxlm.kernels.attention.choice import CONTEXT_PARALLEL
from flaxlm.parallel.hardware import Hardware
from flaxlm.planning.operations import itemsize, layer_parameters, share


class Collective(NamedTuple):
  """All messages of one kind over the same axes in one step, as seen by one chip."""

  kind: str  # all-gather | reduce-scatter | all-reduce | all-to-all | permute
  # The larger of operand and result: what an all-gather returns, or a reduce-scatter
  # takes. Every iteration of the loops around it counts.
  bytes: float
  count: float
  axes: tuple[str, ...]  # mesh axes that the group spans
  link: str  # ici | dcn | nvlink | ib | memory


# Seconds per hop that a message takes however small it is. ICI: 1 us (How to Scale Your
# Model, Google 2025, part 3); the others are orders of magnitude.
_LATENCY = {"ici": 1e-6, "nvlink": 2e-6, "ib": 5e-6, "dcn": 1e-4, "memory": 1e-6}


def link_of(axes: tuple[str, ...], sizes: dict[str, int], hardware: Hardware) -> str:
  """Returns the slowest link that a group over `axes` crosses.

  Devices are numbered with the last axis of the mesh fastest. So a group of GPUs leaves
  its node along every axis whose stride times its size exceeds the node.
  """
  chip = hardware.chip
  if chip.link == "ici":
    return chip.network if "slice" in axes and sizes["slice"] > 1 else chip.link
  if hardware.num_slices == 1:
    return chip.link
  stride, longest = 1, 0
  for axis in reversed(sizes):
    if axis in axes and sizes[axis] > 1:
      longest = stride * sizes[axis]
    stride *= sizes[axis]
  return chip.network if longest > chip.devices_per_host else chip.link


def transfer_seconds(
  collective: Collective, sizes: dict[str, int], hardware: Hardware
) -> float:
  """Returns the seconds of a collective at the full rate of its link.

  All but all-to-all are taken to run as rings.
  """
  n, chip = math.prod(sizes[axis] for axis in collective.axes), hardware.chip
  if n == 1 or not collective.count:
    return 0.0
  wire = {"all-reduce": 2 * (n - 1) / n, "permute": 1.0}
  sent = collective.bytes * wire.get(collective.kind, (n - 1) / n)
  hops = 1 if collective.kind == "permute" else n - 1
  if collective.link == "ici":
    rate, hops = chip.link_bandwidth, min(hops, 64)
    torus, spanned = dimensions(n, hardware.topology)
    rate *= spanned / torus
    if collective.kind == "permute":
      rate /= 2 * spanned  # to one neighbour, over one link
    elif collective.kind == "all-to-all":
      # Over a ring of s chips a message passes s/4 links on average.
      sent *= max(n ** (1 / spanned) / 4, 1.0)
  elif collective.link == "ib":
    # A group with several GPUs of a node uses all of their network cards.
    together = min(_group_in_node(collective.axes, sizes, chip.devices_per_host), n)
    rate = min(chip.link_bandwidth, together * chip.network_bandwidth)
  elif collective.link == "dcn":
    rate, hops = chip.network_bandwidth, 1
  else:
    rate = chip.link_bandwidth
  return sent / rate + collective.count * hops * _LATENCY[collective.link]


def dimensions(n: int, topology: str) -> tuple[int, int]:
  """Returns (dimensions of the torus, how many of them an axis of `n` chips spans).

  The share of the dimensions is log(n) / log(chips). An axis is taken to span all of an
  unknown torus ("").
  """
  if not topology:
    return 1, 1
  lengths = [int(length) for length in topology.split("x")]
  share = math.log(n) / math.log(max(math.prod(lengths), 2))
  return len(lengths), min(max(round(len(lengths) * share), 1), len(lengths))


def _group_in_node(axes: tuple[str, ...], sizes: dict[str, int], node: int) -> int:
  """Returns how many devices of a node belong to the same group over `axes`."""
  stride, together = 1, 1
  for axis in reversed(sizes):
    room = max(node // stride, 1)
    if axis in axes:
      together *= min(sizes[axis], room)
    stride *= sizes[axis]
  return together


def expected_collectives(
  config, sizes: dict[str, int], hardware: Hardware
) -> list[Collective]:
  """Returns the collectives that the sharding of a step needs.

  XLA may choose others (planning/hlo.py). Weights travel in the type of the
  activations; gradients of replicas travel once per step, in float32.
  """
  rows = _weight_messages(config, sizes) + _activation_messages(config, sizes)
  rows = [
    (kind, size, count, _spanned(axes, sizes)) for kind, size, count, axes in rows
  ]
  return [
    Collective(kind, size, count, axes, link_of(axes, sizes, hardware))
    for kind, size, count, axes in rows
    if axes and size > 0
  ]


def _spanned(axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[str, ...]:
  return tuple(axis for axis in sizes if axis in axes and sizes[axis] > 1)


def _weight_messages(config, sizes: dict[str, int]) -> list[tuple]:
  """Returns (kind, bytes, count, axes) of weights and their gradients."""
  part, width = share(config, sizes), itemsize(config)
  layer, experts, table = layer_parameters(config)
  held = sizes["tensor"] * sizes["stage"]
  split = {axis: sizes[axis] for axis in ("fsdp", "context", "expert")}
  # The weights of a layer are gathered when it runs, forward and again backward.
  accumulation = config.step.accumulation_steps
  trips = accumulation * part.ticks / config.mesh.stage_repeats
  layers = part.layers * trips
  rows = []
  for count, axes, trip, calls in (
    (layer / held, ("fsdp", "context", "expert"), trips, layers),
    (experts / held / split["expert"], ("fsdp", "context"), trips, layers),
    (
      table / sizes["tensor"],
      ("fsdp", "context", "expert"),
      accumulation,
      accumulation,
    ),
  ):
    rows.append(("all-gather", 2 * trip * count * width, 2 * calls, axes))
    rows.append(("reduce-scatter", trip * count * width, calls, axes))
  ways = math.prod(split.values())
  dense = (layer / held + table / sizes["tensor"]) / ways + experts / held / ways
  for axes in (("data",), ("slice",)):
    rows.append(("all-reduce", 4 * dense, 1, axes))
  return rows


def _activation_messages(config, sizes: dict[str, int]) -> list[tuple]:
  """Returns (kind, bytes, count, axes) of activations and their gradients."""
  model, part, width = config.model, share(config, sizes), itemsize(config)
  # All stages run in every tick, so idle stages of the pipeline send as well.
  accumulation, repeats = config.step.accumulation_steps, config.mesh.stage_repeats
  trips = accumulation * part.ticks / repeats if sizes["stage"] > 1 else part.passes
  calls = part.layers * trips
  again = model.remat == "full"
  stream = part.tokens * model.embed_dim * width
  rows = []
  if config.mesh.rules.stream:  # tokens between blocks are split over `tensor`
    for kind in ("all-gather", "reduce-scatter"):
      times = calls * (4 + again * 2 * (kind == "all-gather"))
      rows.append((kind, times * stream, times, ("tensor",)))
  else:
    times = calls * (4 + again)
    rows.append(("all-reduce", times * stream, times, ("tensor",)))
  rows.append(("all-reduce", 2 * part.passes * stream, 2 * part.passes, ("tensor",)))
  heads = model.head_dim * width * part.tokens / sizes["tensor"]
  keys = 2 * model.num_kv_heads * heads
  if model.attention == CONTEXT_PARALLEL:
    hops = (sizes["context"] - 1) * calls * (3 + again)  # keys, and their gradients
    rows.append(("permute", hops * keys, hops, ("context",)))
  else:  # to whole rows of some heads and back, forward and backward
    moved = (2 * model.num_heads * heads + keys) * calls * (2 + again)
    rows.append(("all-to-all", moved, 4 * calls * (2 + again), ("context",)))
  if model.moe.num_experts:
    sparse = 1 - model.moe.first_dense_layers / model.num_layers
    pairs = model.moe.experts_per_token * (model.moe.capacity_factor or 1.0)
    times = calls * sparse * (4 + 2 * again)
    rows.append(("all-to-all", times * pairs * stream, times, ("expert",)))
  ticks = 2 * accumulation * part.ticks * (sizes["stage"] > 1)
  rows.append(("permute", ticks * stream, ticks, ("stage",)))
  return rows
