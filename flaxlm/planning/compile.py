"""The real training step, compiled for hardware that need not be here.

libtpu compiles for any slice of any TPU on any machine, from shapes alone, and reports
within seconds when a step does not fit. For GPUs that are not here, memory is counted
instead (memory.py).
"""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import pathlib
import re
import resource
import tempfile
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh

from flaxlm.config.load import config_from_json, config_to_json
from flaxlm.errors import ConfigError
from flaxlm.parallel import AXES
from flaxlm.parallel.hardware import Hardware, chip_of
from flaxlm.parallel.mesh import axis_sizes, fill_axes, make_mesh
from flaxlm.parallel.sharding import bytes_per_device
from flaxlm.planning import hlo
from flaxlm.planning.collectives import Collective, expected_collectives
from flaxlm.planning.memory import expected_memory, on_device
from flaxlm.planning.roofline import keeps_no_scores
from flaxlm.runs import program
from flaxlm.training.optim import make_optimizer
from flaxlm.training.state import TrainState, with_shardings

# Without these, libtpu asks the network which TPU this is and logs that none answered.
# The type does not limit what it compiles for. Several processes may compile at once.
_LIBTPU_VARIABLES = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
}


class Compiled(NamedTuple):
  """What a chip holds during a step, and what it sends."""

  how: str  # compiled | counted
  sizes: dict[str, int]  # of the mesh
  memory: dict[str, float]  # bytes by what they hold; they add up to the peak
  available: float
  collectives: list[Collective]  # [] if the step does not compile
  compile_seconds: float = 0.0
  host_bytes: float = 0.0  # peak memory of the process that compiled

  @property
  def peak(self) -> float:
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    return self.peak <= self.available


def compile_step(config, hardware: Hardware) -> Compiled:
  """Compiles one training step of `config` for `hardware`.

  A step that does not fit is a result, not an error.

  Raises:
    ConfigError: the mesh does not match the hardware, libtpu is missing or does not
      know the slice.
  """
  devices = _find_devices(hardware)
  if devices is None:
    return count_step(config, hardware)
  mesh = make_mesh(devices, **axis_sizes(config.mesh))
  built = program.build_program(config, mesh)
  batch = program.abstract_batch(config, mesh)
  state = built.target
  held = {
    "parameters": bytes_per_device((state.model, state.ema)),
    "optimizer": on_device(state.opt_state),
    "batch": bytes_per_device(batch),
  }
  start = time.perf_counter()
  available, text = hardware.chip.memory_bytes, ""
  with program.use_config_mesh(config, mesh):
    traced = built.train_step.trace(state, batch, None)
    tpu = {"lowering_platforms": ("tpu",)} if hardware.chip.link == "ici" else {}
    lowered = traced.lower(**tpu)
  try:
    memory, text = compile_and_read(lowered)
    # The donated state is written in place; other results need memory of their own.
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + fresh + memory.temp_size_in_bytes
    peak += memory.generated_code_size_in_bytes
  except jax.errors.JaxRuntimeError as error:
    peak, available = read_out_of_memory(str(error), error)
  sizes = dict(mesh.shape)
  collectives = hlo.collectives(text, sizes, hardware) if text else []
  # Activations, gradients, gathered weights, padding and the code.
  held["temporaries"] = peak - sum(held.values())
  return Compiled(
    "compiled", sizes, held, available, collectives,
    time.perf_counter() - start, _peak_host_bytes(),
  )  # fmt: skip


def compile_apart(config, hardware: Hardware, step=compile_step) -> Compiled:
  """Runs `compile_step` in a process of its own, because libtpu may end the process.

  Raises:
    ConfigError: as in compile_step, or the compiler crashed.
  """
  if hardware.chip.link != "ici":
    return step(config, hardware)
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    try:
      return pool.submit(_on_cpu, step, config_to_json(config), hardware).result()
    except concurrent.futures.process.BrokenProcessPool:
      raise ConfigError(
        "config.mesh",
        " ".join(f"{axis}={n}" for axis, n in axis_sizes(config.mesh).items()),
        "a step that libtpu can compile: it ended with the message above",
        "another mesh or remat, or --no_compile",
      ) from None


def _on_cpu(step, config: str, hardware: Hardware) -> Compiled:
  jax.config.update("jax_platforms", "cpu")
  return step(config_from_json(config), hardware)


def count_step(config, hardware: Hardware, state: TrainState | None = None) -> Compiled:
  """Counts, from shapes, what `compile_step` reads off the compiled program.

  Args:
    state: `abstract_state(config)`, if it is known already.
  """
  sizes = fill_axes(axis_sizes(config.mesh), hardware.num_chips, hardware.chip.name)
  mesh = AbstractMesh(tuple(sizes.values()), AXES)
  state = abstract_state(config) if state is None else state
  state = with_shardings(
    state, mesh, config.mesh.rules.to_dict(), config.step.offload_optimizer
  )
  return Compiled(
    "counted",
    sizes,
    expected_memory(config, state, sizes, keeps_no_scores(config, hardware))._asdict(),
    hardware.chip.memory_bytes,
    expected_collectives(config, sizes, hardware),
  )


def abstract_state(config) -> TrainState:
  """Returns the state of a run as shapes without shardings."""
  tx, _ = make_optimizer(config.num_steps, **config.optim)
  return jax.eval_shape(program.make_init(config, tx), jax.random.key(0))


def _find_devices(hardware: Hardware) -> list | None:
  """Returns the devices to compile for, or None if counting is all that is possible."""
  if hardware.chip.link == "ici":
    return topology(hardware)
  here = jax.devices()
  known = hardware.calibration is not None or chip_of(here[0]) == hardware.chip
  return here if known and len(here) == hardware.num_chips else None


def topology(hardware: Hardware) -> list:
  """Returns the devices of TPU slices, which need not exist."""
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "--hardware",
      hardware.chip.name,
      "libtpu, which compiles for it on any machine (Linux, x86)",
      "pip install libtpu, or --no_compile",
    )
  for name, value in _LIBTPU_VARIABLES.items():
    os.environ.setdefault(name, value)
  options = {}
  if hardware.num_slices > 1:
    options["num_slices"] = hardware.num_slices
  if hardware.chip.name == "v4":  # otherwise a chip is two devices
    options["chip_config_name"] = "megacore"
  name = f"{hardware.chip.name}:{hardware.topology}"
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())[:120]
    raise ConfigError(
      "--hardware", name, f"a slice that libtpu knows ({reason})", "v5e:4x4, v5p:4x4x4"
    ) from error
  return list(found)


def read_out_of_memory(text: str, error: Exception) -> tuple[float, float]:
  """Returns (bytes needed, bytes available) from XLA's message.

  Raises `error` if the message is about something else.
  """
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  found = re.search(
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", text
  ) or re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", text)
  if not found:
    raise error
  needed, needed_unit, available, available_unit = found.groups()
  return float(needed) * unit[needed_unit], float(available) * unit[available_unit]


def compile_and_read(lowered: jax.stages.Lowered) -> tuple:
  """Returns (memory_analysis(), XLA's text) of a program that it compiles.

  The text comes from XLA's dump, because `as_text()` fails, after minutes of compiling,
  if a gather runs on the sparse core of a v5p (libtpu 0.0.52).
  """
  with tempfile.TemporaryDirectory() as directory:
    step = lowered.compile(
      compiler_options={"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
    )
    files = pathlib.Path(directory).glob("*after_optimizations.txt")
    largest = max(files, key=lambda file: file.stat().st_size)
    return step.memory_analysis(), largest.read_text()


def _peak_host_bytes() -> float:
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kilobytes * 1024.0
