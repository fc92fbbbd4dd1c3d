"""What chips send each other in a step, over which link, and how long that takes."""

import math
from typing import NamedTuple

from flaxlm.kernels.attention.choice import CONTEXT_PARALLEL
from flaxlm.parallel.hardware import Hardware
from flaxlm.planning.operations import itemsize, layer_parameters, share


class Collective(NamedTuple):
  """All messages of one kind over the same axes in one step, as one chip sees them."""

  kind: str  # all-gather | reduce-scatter | all-reduce | all-to-all | permute
  # The larger of a chip's operand and result: of an all-gather what comes out, of a
  # reduce-scatter what goes in. All trips of the loops around it are counted.
  bytes: float
  count: float
  axes: tuple[str, ...]  # of the mesh, that the group spans
  link: str  # ici | dcn | nvlink | ib | memory


# Seconds that a message takes however small it is, a hop of a ring. ICI: 1 us a hop
# (How to Scale Your Model, Google 2025, part 3); the others: orders of magnitude.
LATENCY = {"ici": 1e-6, "nvlink": 2e-6, "ib": 5e-6, "dcn": 1e-4, "memory": 1e-6}


def link_of(axes: tuple[str, ...], sizes: dict[str, int], hardware: Hardware) -> str:
  """The slowest link that a group over `axes` crosses.

  Devices are numbered with the last axis of the mesh fastest, so GPUs leave their node
  along every axis whose steps, times its size, are longer than a node.
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
  """Time of a collective at the link's full rate: rings for all but all-to-all."""
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
    # All cards of a node serve a group that has several of its GPUs.
    together = min(stride_share(collective.axes, sizes, chip.devices_per_host), n)
    rate = min(chip.link_bandwidth, together * chip.network_bandwidth)
  elif collective.link == "dcn":
    rate, hops = chip.network_bandwidth, 1
  else:
    rate = chip.link_bandwidth
  return sent / rate + collective.count * hops * LATENCY[collective.link]


def dimensions(n: int, topology: str) -> tuple[int, int]:
  """Returns (dimensions of the torus, how many of them an axis of `n` chips spans).

  An axis has as many of the dimensions as its share of chips, on a logarithmic scale.
  An unknown torus ("") is taken to be spanned.
  """
  if not topology:
    return 1, 1
  lengths = [int(length) for length in topology.split("x")]
  share = math.log(n) / math.log(max(math.prod(lengths), 2))
  return len(lengths), min(max(round(len(lengths) * share), 1), len(lengths))


def stride_share(axes: tuple[str, ...], sizes: dict[str, int], node: int) -> int:
  """How many devices of a node belong to the same group over `axes`."""
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
  """The collectives that the sharding of a step asks for, counted by hand.

  What XLA makes of it is in the compiled program (planning/hlo.py); this stands in
  where nothing can be compiled. Weights travel in the type of the activations,
  gradients of replicas in float32 and once a step.
  """
  rows = weight_messages(config, sizes) + activation_messages(config, sizes)
  rows = [
    (kind, size, count, spanning(axes, sizes)) for kind, size, count, axes in rows
  ]
  return [
    Collective(kind, size, count, axes, link_of(axes, sizes, hardware))
    for kind, size, count, axes in rows
    if axes and size > 0
  ]


def spanning(axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[str, ...]:
  return tuple(axis for axis in sizes if axis in axes and sizes[axis] > 1)


def weight_messages(config, sizes: dict[str, int]) -> list[tuple]:
  part, width = share(config, sizes), itemsize(config)
  layer, experts, table = layer_parameters(config)
  held = sizes["tensor"] * sizes["stage"]
  split = {axis: sizes[axis] for axis in ("fsdp", "context", "expert")}
  # Weights of a layer are gathered where it runs: forward, and again backward.
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


def activation_messages(config, sizes: dict[str, int]) -> list[tuple]:
  model, part, width = config.model, share(config, sizes), itemsize(config)
  # Bubbles of the pipeline send as well: all stages run in every tick.
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
  else:  # whole rows of some heads: there and back, forward and backward
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
