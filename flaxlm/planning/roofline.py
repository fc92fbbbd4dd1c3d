"""How long a step should take, what bounds it, and what a run then costs.

Compute, memory traffic and messages are each divided by the rate that a chip reaches. A
stated share of the messages hides behind the rest. Three sets of assumptions, kind,
likely and harsh, make an error band. On a calibrated machine, operations take their
measured times.
"""

import math
from typing import NamedTuple

from flaxlm.config.rules import attention_case
from flaxlm.kernels.attention.choice import BACKENDS, choose_backend
from flaxlm.models.cost import flops_per_token
from flaxlm.parallel.hardware import Calibration, Hardware
from flaxlm.parallel.pipeline import bubble
from flaxlm.planning.collectives import (
  Collective,
  expected_collectives,
  transfer_seconds,
)
from flaxlm.planning.operations import Op, operations


class Assumptions(NamedTuple):
  """Shares of a data sheet's rates that a training step reaches."""

  matmul: float  # of the peak, for large matrices
  attention: float  # of the peak, for a fused kernel
  bandwidth: float  # of the memory
  link: float  # inside a slice or node
  network: float
  overlap: float  # share of the shorter of (work, hidden messages) that is hidden
  measured: float  # a step over the sum of its operations, on a calibrated machine


# Matmul: 770-800 of 989 TFLOP/s (79%) were measured on an H200. A Llama-7B layer on v5e
# takes 39 ms by XLA's own count where its FLOPs need 34 (87%); a real step is slower.
# Attention: FlashAttention-3 claims 75% of an H100 forward, and less backward; TPU
# kernels reach about half. Copies reach 90% of an H200's memory bandwidth. Published
# steps of 8B to 70B models run at 38-60% MFU (MaxText, torchtitan), as predicted here.
ASSUMPTIONS = {
  "low": Assumptions(0.88, 0.60, 0.92, 0.95, 0.90, 1.0, 0.9),
  "mid": Assumptions(0.75, 0.45, 0.80, 0.80, 0.70, 0.8, 1.1),
  "high": Assumptions(0.60, 0.30, 0.65, 0.60, 0.45, 0.4, 1.4),
}
_STEP_OVERHEAD = 1e-3  # seconds: dispatch and stragglers, where nothing was measured


class Terms(NamedTuple):
  """Seconds of a step by what takes them, under the likely assumptions."""

  matmul: float
  attention: float
  memory: float  # passes over memory: norms, activations, logits, optimizer
  exposed: dict[str, float]  # link -> messages that compute waits for
  hidden: dict[str, float]  # link -> messages that can run beside compute
  bubble: float  # stages that wait for others
  overhead: float

  def flat(self) -> dict[str, float]:
    """Returns all terms by name. They overlap, so their sum may exceed the step."""
    named = {"matmul": self.matmul, "attention": self.attention, "memory": self.memory}
    for link in {**self.exposed, **self.hidden}:
      named[link] = self.exposed.get(link, 0.0) + self.hidden.get(link, 0.0)
    return named | {"bubble": self.bubble, "overhead": self.overhead}


class Prediction(NamedTuple):
  """The time of a step, as a band, and what follows from it."""

  low: float  # seconds per step
  mid: float
  high: float
  terms: Terms
  bound: str  # the largest of the terms
  model_flops: float  # per chip and step: visible pairs, each weight once
  hardware_flops: float  # what is really computed, with remat and masked pairs
  tokens: float  # per step, of all chips
  tokens_per_second: float
  mfu: float
  assumptions: tuple[str, ...]


class Budget(NamedTuple):
  """What a run takes; each quantity is (low, mid, high)."""

  days: tuple[float, float, float]
  device_hours: tuple[float, float, float]
  cost: tuple[float, float, float]  # USD
  energy: tuple[float, float, float]  # kWh
  assumptions: tuple[str, ...]


def keeps_no_scores(config, hardware: Hardware) -> bool:
  """Returns whether attention is a fused kernel there, which skips masked pairs."""
  backend = config.model.attention
  if backend == "auto":  # where no doctor has run
    backend = choose_backend(attention_case(config, hardware.chip.platform), {})
  return not BACKENDS[backend].keeps_scores


def predict(
  config,
  sizes: dict[str, int],
  hardware: Hardware,
  collectives: list[Collective] | None = None,
) -> Prediction:
  """Predicts the time of a training step.

  Args:
    sizes: of the mesh axes; their product is the number of chips.
    collectives: of the compiled step; None counts those that the sharding needs.
  """
  if collectives is None:
    collectives = expected_collectives(config, sizes, hardware)
  ops = operations(config, sizes, keeps_no_scores(config, hardware))
  results = {
    name: _step_seconds(ops, collectives, config, sizes, hardware, assumed)
    for name, assumed in ASSUMPTIONS.items()
  }
  seconds, terms = results["mid"]
  flat = terms.flat()
  tokens = config.data.batch_size * config.data.seq_len
  chips = math.prod(sizes.values())
  model_flops = flops_per_token(config.model, config.data.seq_len) * tokens / chips
  return Prediction(
    results["low"][0],
    seconds,
    results["high"][0],
    terms,
    max(flat, key=lambda name: flat[name]),
    model_flops,
    sum(op.count * op.flops * (1 + op.again) for op in ops),
    tokens,
    tokens / seconds,
    model_flops / seconds / _peak_of(config, hardware),
    _describe_assumptions(hardware),
  )


def _peak_of(config, hardware: Hardware) -> float:
  """Returns the peak FLOP/s of a chip in the dtype of the model."""
  chip = hardware.chip
  return chip.bf16_flops if config.model.dtype == "bfloat16" else chip.f32_flops


def _step_seconds(ops, collectives, config, sizes, hardware, assumed: Assumptions):
  """Returns (seconds, Terms) under one set of assumptions."""
  spent = {"matmul": 0.0, "attention": 0.0, "memory": 0.0}
  for op in ops:
    term = op.kind if op.kind in spent else "memory"
    one = op_seconds(op, config, hardware, assumed)
    spent[term] += op.count * (1 + op.again) * one
  exposed, hidden = {}, {}
  for one in collectives:
    near = one.link == hardware.chip.link
    took = transfer_seconds(one, sizes, hardware)
    took /= assumed.link if near else assumed.network
    side = exposed if _must_wait(one) else hidden
    side[one.link] = side.get(one.link, 0.0) + took
  work = sum(spent.values()) + sum(exposed.values())
  beside = max(hidden.values(), default=0.0)  # links work at the same time
  busy = work + beside - assumed.overlap * min(work, beside)
  overhead = _STEP_OVERHEAD
  if hardware.calibration:
    overhead = hardware.calibration.dispatch_seconds
  waits = 0.0
  if sizes["stage"] > 1:
    waves = config.mesh.microbatches or sizes["stage"]
    idle = bubble(sizes["stage"], waves, config.mesh.stage_repeats)
    waits = busy * idle / (1 - idle)
  terms = Terms(
    **spent, exposed=exposed, hidden=hidden, bubble=waits, overhead=overhead
  )
  return busy + waits + overhead, terms


def _must_wait(collective: Collective) -> bool:
  """Returns whether the next operation needs the result.

  It does if tensor or expert splits send it. Gathers and gradients of weights belong to
  another layer than the one that computes.
  """
  waits = collective.kind == "all-to-all" or "tensor" in collective.axes
  return waits and collective.kind != "permute"


def op_seconds(op: Op, config, hardware: Hardware, assumed: Assumptions) -> float:
  """Returns the measured seconds, or the longer of those for FLOPs and for bytes."""
  if hardware.calibration:
    found = _measured_seconds(op, config.model.dtype, hardware.calibration)
    if found is not None:
      return found * assumed.measured
  rate = _peak_of(config, hardware)
  rate *= assumed.attention if op.kind == "attention" else assumed.matmul
  if op.kind == "matmul":
    rate *= _filled_share(op, hardware)
  moving = op.bytes / (hardware.chip.memory_bandwidth * assumed.bandwidth)
  return max(op.flops / rate, moving)


def _filled_share(op: Op, hardware: Hardware) -> float:
  """Returns the share of the matrix unit's tiles that a product fills."""
  tile = 256 if hardware.chip.name in ("v6e", "tpu7x") else 128
  if hardware.chip.link == "memory":
    return 1.0
  sides = op.dims[2:] if hardware.chip.link == "ici" else op.dims[1::2]
  return math.prod(side / (-(-side // tile) * tile) for side in sides)


def _measured_seconds(op: Op, dtype: str, calibration: Calibration) -> float | None:
  """Returns the measured seconds of an operation; None if none of its kind is known.

  The operation nearest in size is taken, and scaled by the size.
  """
  best, distance = None, math.inf
  for key, seconds in calibration.seconds.items():
    kind, *dims, key_dtype = key
    if (kind, key_dtype) != (op.kind, dtype):
      continue
    ratios = [math.log(a / b) for a, b in zip(op.dims, dims, strict=True)]
    far = sum(map(abs, ratios))
    if far < distance:
      ratio = _work_size(op.kind, op.dims) / _work_size(kind, dims)
      best, distance = seconds * ratio, far
  return best


def _work_size(kind: str, dims) -> float:
  """Returns the quantity that the time of an operation is proportional to."""
  if kind == "attention":
    rows, queries, keys, heads, _, width = dims
    return rows * queries * keys * heads * width
  return math.prod(dims[:2] if kind == "embedding" else dims)


def _describe_assumptions(hardware: Hardware) -> tuple[str, ...]:
  """Returns the assumptions as sentences to print."""
  low, mid, high = (ASSUMPTIONS[name] for name in ("low", "mid", "high"))
  if hardware.calibration:
    return (
      f"each operation as measured here, times {mid.measured} "
      f"({low.measured} to {high.measured}) for what happens between them",
    )
  return (
    f"matmuls reach {mid.matmul:.0%} of the peak ({high.matmul:.0%} to "
    f"{low.matmul:.0%}), attention {mid.attention:.0%}, memory {mid.bandwidth:.0%}, "
    f"links {mid.link:.0%} ({high.link:.0%} to {low.link:.0%})",
    f"{mid.overlap:.0%} ({high.overlap:.0%} to {low.overlap:.0%}) of the messages that "
    "can hide behind compute do; those of tensor and expert splits cannot",
  )


# PUE: 1.09 to 1.10 in Google's fleet (2024), elsewhere 1.2 to 1.5 (Uptime Institute:
# 1.56 on average). Chips that wait for memory or links draw less than their limit.
_PUE = (1.08, 1.15, 1.5)
_DRAW = (0.6, 0.8, 1.0)  # of a chip's watts
_HOST = 1.2  # host, network and fans, as a factor of the chips


def budget(
  prediction: Prediction, hardware: Hardware, tokens: float, price: float | None = None
) -> Budget:
  """Returns what training on `tokens` takes.

  Args:
    price: USD per chip and hour; None takes the table's.
  """
  chip = hardware.chip
  band = (prediction.low, prediction.mid, prediction.high)
  hours = [tokens / prediction.tokens * step / 3600 for step in band]
  devices = [hour * hardware.num_chips for hour in hours]
  # A price is per chip, as it is rented: a TPU7x chip is two devices.
  rate = chip.price if price is None else price / chip.devices_per_chip
  note = chip.price_note if price is None else "as given"
  energy = [
    device * chip.watts * draw * _HOST * pue / 1000
    for device, draw, pue in zip(devices, _DRAW, _PUE, strict=True)
  ]
  return Budget(
    tuple(hour / 24 for hour in hours),
    tuple(devices),
    tuple(device * rate for device in devices),
    tuple(energy),
    (
      f"{rate:.2f} USD per device and hour ({note})",
      f"{chip.watts:.0f} W per device at {_DRAW[1]:.0%} "
      f"({_DRAW[0]:.0%} to {_DRAW[2]:.0%}), "
      f"host and network x {_HOST}, PUE {_PUE[1]} ({_PUE[0]} to {_PUE[2]})",
      "no restarts, evaluation or compilation",
    ),
  )
