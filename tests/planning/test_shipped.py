"""Every shipped config names hardware that it fits on.

The slow tests trace and lower the real step of each, for TPUs that are not here. They
compile those that show something of their own, which takes one or two minutes each on
two cores. `python -m flaxlm.plan` compiles any of them.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from flaxlm.config.load import load_config
from flaxlm.parallel.hardware import parse_hardware
from flaxlm.parallel.mesh import axis_sizes, fill_axes, make_mesh
from flaxlm.planning import search
from flaxlm.planning.compile import topology
from flaxlm.runs import program

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in ("base", "__init__")
)
# Compiled, each with the message that it is to show: kind, mesh axis, link.
SHOWN = {
  "llama3_70b": ("all-gather", "tensor", "ici"),
  "gpt3_175b": ("all-gather", "fsdp", "ici"),
  "mixtral_8x7b": ("all-to-all", "expert", "ici"),
  "llama3_1_8b_128k": ("permute", "context", "ici"),
  "llama2_70b": ("all-reduce", "slice", "dcn"),
}


def load(name: str):
  return load_config(str(ROOT / "configs" / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_hardware_that_its_mesh_fills(name):
  config = load(name)
  assert config.hardware, f"configs/{name}.py: config.hardware is empty"
  if config.hardware != "cpu":
    hardware = parse_hardware(config.hardware)
    sizes = fill_axes(axis_sizes(config.mesh), hardware.num_chips, hardware.chip.name)
    changes = {f"mesh.{axis}": size for axis, size in sizes.items()}
    assert search.changed(config, changes), f"{name}: the batch does not divide"


@pytest.mark.parametrize(("name", "least"), [("gpt3_175b", 1024), ("llama3_70b", 1024)])
def test_the_largest_are_for_pods(name, least):
  assert parse_hardware(load(name).hardware).num_chips >= least


@pytest.fixture
def libtpu():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install -e '.[plan]'")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in SHOWN])
def test_a_config_lowers_for_tpus(name, libtpu):
  config = load(name)
  if config.hardware in ("cpu", "h100x1"):
    config.hardware = "v5e:2x2"
    config.step.accumulation_steps = 1
  mesh = make_mesh(topology(parse_hardware(config.hardware)), **axis_sizes(config.mesh))
  built = program.build_program(config, mesh)
  with program.use_config_mesh(config, mesh):
    batch = program.abstract_batch(config, mesh)
    traced = built.train_step.trace(built.target, batch, None)
    assert "sdy.mesh" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_config_compiles_for_its_hardware_and_fits(name, libtpu):
  config = load(name)
  # One process each: libtpu keeps half a gigabyte per program that it compiled.
  command = [sys.executable, "-m", "flaxlm.plan", f"--config=configs/{name}.py"]
  done = subprocess.run(
    [*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  (found,) = json.loads(done.stdout)
  peak, mfu = sum(found["memory"].values()) / 2**30, found["prediction"]["mfu"]
  print(
    f"{name} on {config.hardware}: {found['how']}, {peak:.2f} of "
    f"{found['available'] / 2**30:.2f} GiB, MFU {mfu:.0%}, bound by "
    f"{found['prediction']['bound']}, {found['compile_seconds']:.0f} s, "
    f"{found['host_bytes'] / 1e9:.1f} GB"
  )
  assert found["fits"], found["advice"]
  assert found["host_bytes"] < 4e9
  messages = {
    (row["kind"], axis, row["link"])
    for row in found["collectives"]
    for axis in row["axes"]
  }
  assert SHOWN[name] in messages
