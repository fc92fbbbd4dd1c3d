"""Every shipped config names its hardware and fits it: compiled, so that none can rot.

The slow tests compile the real step of each for TPUs that are not here, one after
another: two compilations at once would fight for the machine.
"""

import importlib.util
import pathlib

import pytest

from flaxlm import config as configs
from flaxlm.parallel.hardware import parse
from flaxlm.parallel.mesh import axis_sizes, fill
from flaxlm.planning import search

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in ("base", "__init__")
)
# A message that shows what a config is there to show: kind, axis of the mesh, link.
SHOWN = {
  "llama3_8b": ("all-gather", "fsdp", "ici"),
  "llama3_70b": ("all-gather", "tensor", "ici"),
  "mixtral_8x7b": ("all-to-all", "expert", "ici"),
  "llama3_1_8b_128k": ("permute", "context", "ici"),
  "llama2_70b": ("all-reduce", "slice", "dcn"),
}
GIB = 2**30


def load(name: str):
  return configs.load(str(ROOT / "configs" / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_hardware_that_its_mesh_fills(name):
  config = load(name)
  assert config.hardware, f"configs/{name}.py: config.hardware is empty"
  if config.hardware != "cpu":
    hardware = parse(config.hardware)
    sizes = fill(axis_sizes(config.mesh), hardware.num_chips, hardware.chip.name)
    changes = {f"mesh.{axis}": size for axis, size in sizes.items()}
    assert search.changed(config, changes), f"{name}: the batch does not divide"


@pytest.mark.parametrize(("name", "least"), [("gpt3_175b", 1024), ("llama3_70b", 1024)])
def test_the_largest_are_for_pods(name, least):
  assert parse(load(name).hardware).num_chips >= least


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_config_compiles_for_its_hardware_and_fits(name):
  config = load(name)
  if config.hardware == "cpu":
    pytest.skip("it runs in tests/test_end_to_end.py and test_real_runs.py")
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  result, predicted = search.judge(config, parse(config.hardware))
  print(
    f"{name} on {config.hardware}: {result.how}, {result.peak / GIB:.2f} of "
    f"{result.available / GIB:.2f} GiB, MFU {predicted.mfu:.0%}, bound by "
    f"{predicted.bound}, {result.compile_seconds:.0f} s, "
    f"{result.host_bytes / 1e9:.1f} GB"
  )
  assert result.fits
  assert result.host_bytes < 8e9  # of all compilations before, too
  messages = {
    (row.kind, axis, row.link) for row in result.collectives for axis in row.axes
  }
  assert name not in SHOWN or SHOWN[name] in messages
