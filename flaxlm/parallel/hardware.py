"""The one table of chips: rates, memory, links, power and prices.

A row is one `jax.Device`: a v4 or v5p chip is one (megacore), a TPU7x chip is two.
Links count bytes in one direction: half of what data sheets call bidirectional.
"""

import math
from typing import NamedTuple

import jax

from flaxlm.errors import ConfigError


class Chip(NamedTuple):
  """One `jax.Device`; rates are per second, from the data sheet."""

  name: str
  bf16_flops: float  # dense
  f32_flops: float  # of a float32 matmul by JAX's default: bf16 on TPUs, TF32 on GPUs
  memory_bytes: float
  memory_bandwidth: float  # bytes
  link: str  # inside a slice or node: ici | nvlink | memory
  link_bandwidth: float  # bytes per direction, all links of the chip together
  network: str  # between slices or nodes: dcn | ib | memory
  network_bandwidth: float  # bytes per direction, this device's share of its host's
  devices_per_host: int
  devices_per_chip: int
  watts: float  # at full load, host not included
  price: float  # USD per hour
  price_note: str  # which price, where and when

  @property
  def platform(self) -> str:
    """What JAX calls it: its link tells."""
    return {"ici": "tpu", "nvlink": "gpu", "memory": "cpu"}[self.link]


class Calibration(NamedTuple):
  """What planning/calibrate.py measured on a machine."""

  seconds: dict[tuple, float]  # by (kind, *dims, dtype) of planning/operations.py:Op
  dispatch_seconds: float  # of one call of a compiled function


class Hardware(NamedTuple):
  """The devices that a user rents."""

  chip: Chip
  num_chips: int  # JAX devices in all slices
  num_slices: int  # TPU slices, or nodes of GPUs
  topology: str  # of one slice, "8x16x16"; "" where there is no torus
  calibration: Calibration | None = None


# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read 2026-07. DCN is published
#   per chip for v5p, v6e and 7x; v5e has 2 x 100 Gb/s per host of 8 chips; v4's is not
#   published, so v5p's is used. Watts: a v4 takes 192 at most (Jouppi et al. 2023,
#   arXiv 2304.01433). Google publishes no others: the rest are guesses from v4 and from
#   its claims of FLOPs per watt.
# NVIDIA: data sheets of A100 80GB SXM, H100 SXM, H200 SXM, DGX B200 (2025). Their
#   tensor-core rates are with sparsity; dense rates are half. Each GPU has one network
#   card of 200 Gb/s (A100) or 400 Gb/s. Watts are the limit of the board.
# Prices are a starting point and go out of date: `--price` overrides them. GPU capacity
#   blocks are from AWS's page of 2025-01. The others were not checked against a page.
GB, GiB = 1e9, 2**30
_GCP = "Google Cloud, on demand, US, 2025"
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      "v4", 275e12, 275e12, 32 * GiB, 1228 * GB, "ici", 300 * GB, "dcn", 6.25 * GB,
      4, 1, 192, 3.22, _GCP,
    ),
    Chip(
      "v5e", 197e12, 197e12, 16 * GiB, 819 * GB, "ici", 200 * GB, "dcn", 3.125 * GB,
      8, 1, 170, 1.20, _GCP,
    ),
    Chip(
      "v5p", 459e12, 459e12, 95 * GiB, 2765 * GB, "ici", 600 * GB, "dcn", 6.25 * GB,
      4, 1, 350, 4.20, _GCP,
    ),
    Chip(
      "v6e", 918e12, 918e12, 32 * GiB, 1638 * GB, "ici", 400 * GB, "dcn", 12.5 * GB,
      8, 1, 300, 2.70, _GCP,
    ),
    Chip(  # half a chip, which has 2307 TFLOP/s, 192 GiB and $12
      "tpu7x", 1153.5e12, 1153.5e12, 96 * GiB, 3690 * GB, "ici", 300 * GB, "dcn",
      6.25 * GB, 8, 2, 400, 6.00, _GCP,
    ),
    Chip(
      "a100", 312e12, 156e12, 80 * GB, 2039 * GB, "nvlink", 300 * GB, "ib", 25 * GB,
      8, 1, 400, 3.43, "AWS p4de, on demand, US East, 2025",
    ),
    Chip(
      "h100", 989.4e12, 494.7e12, 80 * GB, 3350 * GB, "nvlink", 450 * GB, "ib", 50 * GB,
      8, 1, 700, 4.92, "AWS p5 capacity block, US East, 2025-01",
    ),
    Chip(
      "h200", 989.4e12, 494.7e12, 141 * GB, 4800 * GB, "nvlink", 450 * GB, "ib",
      50 * GB, 8, 1, 700, 5.41, "AWS p5e capacity block, US East, 2025-01",
    ),
    Chip(
      "b200", 2250e12, 1125e12, 180 * GB, 8000 * GB, "nvlink", 900 * GB, "ib", 50 * GB,
      8, 1, 1000, 14.24, "AWS p6-b200, on demand, US East, 2025",
    ),
  )
}  # fmt: skip

# `device_kind` of a jax.Device -> name above.
DEVICE_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
  "NVIDIA B200": "b200",
}
# Dense bfloat16 FLOP/s of devices for which `plan` has no row. Hopper and Ada: half of
# the data sheet's; GeForce: white papers of GA102 and Ada, with FP32 accumulation.
OTHER_PEAKS = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200 NVL": 835e12,
  "NVIDIA GH200 480GB": 989.4e12,
  "NVIDIA GB200": 2500e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA GeForce RTX 3090": 71e12,
  "NVIDIA GeForce RTX 4090": 165.2e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Returns the dense bfloat16 FLOP/s of a device, or None: never a guess."""
  chip = chip_of(device)
  return chip.bf16_flops if chip else OTHER_PEAKS.get(device.device_kind)


def chip_of(device: jax.Device) -> Chip | None:
  """Returns the row of a device, or None if the table has none."""
  return CHIPS.get(DEVICE_KINDS.get(device.device_kind, ""))


def parse_hardware(text: str, here: Hardware | None = None) -> Hardware:
  """Parses the value of `--hardware`.

  `v5p:8x16x16` is a torus of chips, `4xv6e:16x16` is four such slices, `h100x64` is 64
  GPUs in nodes of 8, and `this` (or `cpu`) is the machine that was calibrated.

  Args:
    here: the calibrated machine, from planning/calibrate.py.
  Raises:
    ConfigError: the text is none of these.
  """
  if text in ("this", "cpu"):
    if here is None:
      raise ConfigError(
        "--hardware", text, "a calibration of this machine", "--calibrate"
      )
    return here
  count, name = 1, text
  first, _, rest = text.partition("x")
  if first.isdigit():
    count, name = int(first), rest
  name, _, topology = name.partition(":")
  sizes = topology.split("x")
  tpu = [name for name, chip in CHIPS.items() if chip.link == "ici"]
  if name in tpu and all(size.isdigit() and int(size) for size in sizes) and count:
    chip = CHIPS[name]
    flat = name in ("v5e", "v6e")  # these pods are two-dimensional
    if len(sizes) == (2 if flat else 3):
      chips = math.prod(map(int, sizes)) * chip.devices_per_chip
      return Hardware(chip, chips * count, count, topology)
  gpu, _, number = text.rpartition("x")
  if gpu in CHIPS and gpu not in tpu and number.isdigit() and int(number):
    chip = CHIPS[gpu]
    nodes = -(-int(number) // chip.devices_per_host)
    return Hardware(chip, int(number), nodes, "")
  raise ConfigError(
    "--hardware",
    text,
    "a TPU and its topology (v5e:16x16, v5p:8x16x16, 4xv6e:16x16 for four slices), or "
    "a GPU and how many (h100x8)",
    "one of " + " ".join(CHIPS) + ", or `this` after --calibrate",
  )
