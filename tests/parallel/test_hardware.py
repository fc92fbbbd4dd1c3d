"""The table of chips, and the values that `--hardware` takes."""

import types

import pytest

from flaxlm.errors import ConfigError
from flaxlm.parallel import hardware


@pytest.mark.parametrize(
  ("text", "chip", "chips", "slices", "topology"),
  [
    ("v5p:8x16x16", "v5p", 2048, 1, "8x16x16"),
    ("4xv6e:16x16", "v6e", 1024, 4, "16x16"),
    ("v4:4x4x4", "v4", 64, 1, "4x4x4"),
    ("tpu7x:4x4x4", "tpu7x", 128, 1, "4x4x4"),  # two devices per chip
    ("h100x8", "h100", 8, 1, ""),
    ("h200x64", "h200", 64, 8, ""),
    ("h100x12", "h100", 12, 2, ""),
  ],
)
def test_hardware_is_read(text, chip, chips, slices, topology):
  found = hardware.parse_hardware(text)
  assert found.chip.name == chip
  assert found[1:] == (chips, slices, topology, None)


@pytest.mark.parametrize(
  "text",
  [
    "", "h100", "h100x0", "x8", "v6e", "v5p:8x16", "v5e:4x4x4", "0xv5e:2x2", "v5ex8",
    "v5e:0x4", "v5e:ax4", "h100:2x2", "2xh100x8", "a1000x8",
  ],
)  # fmt: skip
def test_other_hardware_is_refused_with_what_is_known(text):
  with pytest.raises(ConfigError, match=r"v5p .*h100"):
    hardware.parse_hardware(text)


def test_this_machine_needs_a_calibration():
  with pytest.raises(ConfigError, match="--calibrate"):
    hardware.parse_hardware("cpu")
  here = hardware.parse_hardware("h100x8")
  assert hardware.parse_hardware("this", here) is here


def test_every_device_kind_has_a_row_and_rows_are_sane():
  for kind, name in hardware.DEVICE_KINDS.items():
    device = types.SimpleNamespace(device_kind=kind)
    assert hardware.chip_of(device) is hardware.CHIPS[name]
    assert hardware.peak_flops(device) == hardware.CHIPS[name].bf16_flops
  for chip in hardware.CHIPS.values():
    # Bytes per second fall from memory to links to network.
    assert chip.memory_bandwidth > chip.link_bandwidth > chip.network_bandwidth > 0
    assert 1e14 < chip.bf16_flops < 3e15 and 16 <= chip.memory_bytes / 2**30 < 200
    # FLOPs per byte at which a product becomes compute-bound: hundreds, on all chips.
    assert 100 < chip.bf16_flops / chip.memory_bandwidth < 600
  unknown = types.SimpleNamespace(device_kind="cpu")
  assert hardware.peak_flops(unknown) is None and hardware.chip_of(unknown) is None


def test_peak_is_never_guessed():
  def peak(kind):
    return hardware.peak_flops(types.SimpleNamespace(device_kind=kind))

  assert peak("TPU v5 lite") == 197e12 and peak("TPU7x") == 1153.5e12
  assert peak("NVIDIA H100 MIG 1g.10gb") is peak("TPU v9") is None
