"""The cost of a training step, counted in its compiled program without any timing.

`pytest tests/runs/test_program.py --update-golden` rewrites tests/golden; review the
changes. FLOPs of matrix products must be equal everywhere. What XLA decides (fusions,
messages, memory) must be within SAME of the golden values under the version of JAX that
made them, and within OTHER under any other.
"""

import collections
import json
import math
import pathlib
import re

import jax
import pytest

from flaxlm.errors import ConfigError
from flaxlm.parallel.mesh import axis_sizes, make_mesh, one_device
from flaxlm.parallel.sharding import bytes_per_device
from flaxlm.planning import hlo
from flaxlm.runs import loop, program, progress
from flaxlm.training.guards import StopSignal

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/compiled_step.json"
SAME, OTHER = 0.05, 0.3  # relative; fusions also depend on the processor
MESHES = {"one device": None, "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2}}


def causal(config):
  config.tokenizer.vocab_size = 512  # logits are the largest array, as in practice
  return config


def bert(config):
  config = causal(config)
  config.objective.kind = "masked"
  model = config.model
  model.causal, model.head, model.num_segment_types = False, "mlm", 2
  model.positions, model.norm, model.norm_placement = "learned", "layernorm", "residual"
  model.embedding_norm = model.use_bias = True
  model.gated_mlp, model.activation, model.num_kv_heads = False, "gelu", 4
  # Large enough that unsharded weights (biases, the head) are a small share.
  model.num_layers, model.embed_dim, model.mlp_dim = 4, 64, 1024
  return config


def compiled(config, axes):
  """Returns (compiled step, abstract state) on one of MESHES."""
  config.mesh.update(axes or {})
  mesh = make_mesh(**axis_sizes(config.mesh)) if axes else one_device()
  built = program.build_program(config, mesh)
  with program.use_config_mesh(config, mesh):
    batch = program.abstract_batch(config, mesh)
    lowered = built.train_step.lower(built.target, batch, None)
    # Compile as users do; tests use other emitters (tests/quick.py).
    return lowered.compile({"xla_cpu_use_fusion_emitters": True}), built.target


def instructions(computations, name, times=1):
  """Yields (instruction, its neighbours by name, times that it runs) of a program."""
  here = {instruction.name: instruction for instruction in computations[name]}
  for one in here.values():
    yield one, here, times
    if one.opcode == "while":
      body, condition = (
        re.search(rf"{what}=%?([\w.\-]+)", one.rest)[1]
        for what in ("body", "condition")
      )
      turns = hlo.trip_count(computations, condition, one.rest)
      yield from instructions(computations, body, times * turns)
    elif one.opcode in ("fusion", "call", "conditional"):
      for inner in hlo.CALLED.findall(one.rest):
        yield from instructions(computations, inner, times)


def dims(shape: str) -> list[int]:
  return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def dot_flops(dot, here) -> int:
  lhs = dims(here[re.search(r"%([\w.\-]+)", dot.rest)[1]].shape)
  summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)[1]
  return (
    2 * math.prod(dims(dot.shape)) * math.prod(lhs[int(i)] for i in summed.split(","))
  )


def count(config, axes) -> dict:
  """Returns the cost of a step: exact numbers, then those that XLA decides."""
  step, target = compiled(config, axes)
  computations, entry = hlo.parse_hlo(step.as_text())
  found = collections.Counter()
  for one, here, times in instructions(computations, entry):
    found[one.opcode] += times
    if one.opcode == "dot":
      found["dot FLOPs"] += times * dot_flops(one, here)
    kind = hlo.COLLECTIVE_KINDS.get(one.opcode.removesuffix("-start"))
    if kind:
      found[f"messages {kind}"] += times
      found[f"bytes {kind}"] += times * int(hlo.num_bytes(one.shape))
  assert not found["infeed"] + found["outfeed"] + found["send"] + found["recv"]
  assert "callback" not in step.as_text()
  memory = step.memory_analysis()
  # All of the state is donated and its memory reused: weights, moments, counts.
  assert memory.alias_size_in_bytes == bytes_per_device(target)
  kinds = {
    key: n for key, n in sorted(found.items()) if re.match("messages|bytes", key)
  }
  return {
    "dot FLOPs": found["dot FLOPs"],
    "argument bytes": memory.argument_size_in_bytes,
    "temporary bytes": memory.temp_size_in_bytes,
    "dots": found["dot"],
    "fusions": found["fusion"],
    "copies": found["copy"],
  } | kinds


@pytest.mark.parametrize(
  ("change", "mesh"),
  [
    (causal, "fsdp 4 x tensor 2"),
    (bert, "one device"),
    pytest.param(causal, "one device", marks=pytest.mark.slow),
    pytest.param(bert, "fsdp 4 x tensor 2", marks=pytest.mark.slow),
  ],
)
def test_a_step_costs_what_it_did(change, mesh, tiny, request):
  name = f"{change.__name__}, {mesh}"
  now = count(change(tiny), MESHES[mesh])
  golden = (
    json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"jax": "", "steps": {}}
  )
  if request.config.getoption("--update-golden"):
    golden["jax"] = jax.__version__
    golden["steps"][name] = now
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")
  before = golden["steps"][name]
  for key in ("dot FLOPs", "argument bytes"):
    assert now[key] == before[key], key
  margin = SAME if golden["jax"] == jax.__version__ else OTHER
  assert now.keys() == before.keys()
  assert now == pytest.approx(before, rel=margin)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_loop_compiles_once_and_reads_each_step_once(
  tiny, tmp_path, monkeypatch, asynchronous
):
  tiny.num_steps, tiny.eval.every = 6, 0
  if asynchronous:  # as accelerators are
    monkeypatch.setattr(loop.machine, "keep_freed_memory", lambda: "")
  before = jax.config.read("jax_cpu_enable_async_dispatch")
  jax.config.update("jax_cpu_enable_async_dispatch", asynchronous)
  log, add, get = [], progress.TrainingProgress.add, jax.device_get

  def on_compile(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
      log.append("compile")

  def added(progress, step, metrics):
    log.append(f"dispatched {step}")
    with jax.transfer_guard("disallow"):  # reading is explicit, or fails
      add(progress, step, metrics)

  def read(tree):
    log.append("read")
    return get(tree)

  monkeypatch.setattr(progress.TrainingProgress, "add", added)
  monkeypatch.setattr(jax, "device_get", read)
  jax.monitoring.register_event_duration_secs_listener(on_compile)
  try:
    loop.train(tiny, tmp_path, StopSignal())
  finally:
    jax.monitoring.clear_event_listeners()
    jax.config.update("jax_cpu_enable_async_dispatch", before)
  first = log.index("dispatched 1")
  assert "compile" in log[:first]
  # One read per step, late if steps overlap; nothing more is compiled.
  reads = [x for i in range(1, 7) for x in (f"dispatched {i}", "read")]
  if asynchronous:
    reads.remove("read")
  assert log[first : log.index("dispatched 6") + 2] == reads


def test_products_of_a_narrow_model_on_a_cpu_are_eigens(tiny, monkeypatch):
  def options(width, platform):
    tiny.model.embed_dim = width
    return program.step_options(tiny.model, platform)

  def in_fusions():  # where XLA puts the products that YNN computes
    text = compiled(causal(tiny), None)[0].as_text()
    bodies = re.findall(r"^%?fused_computation.*?^}", text, re.M | re.S)
    return sum(len(re.findall(r" dot\(", body)) for body in bodies), text.count(" dot(")

  eigens, products = in_fusions()
  with monkeypatch.context() as patch:
    patch.setattr(program, "WIDE", 0)
    ynns, _ = in_fusions()
  assert eigens < products / 10 and ynns > products / 3
  assert options(384, "cpu") == program.EIGEN
  assert options(768, "cpu") is None and options(384, "gpu") is None
  monkeypatch.setattr(program, "EIGEN", {"xla_cpu_that_is_gone": "1"})
  assert options(384, "cpu") is None


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_that_a_cpu_would_undo_is_refused(tiny, remat):
  tiny.model.num_layers = tiny.model.unroll = 2
  tiny.model.remat = remat
  with pytest.raises(ConfigError, match=f"2 layers.*{remat}.*\n.*try:    1") as error:
    program.build_program(tiny, one_device())
  assert error.value.key == "config.model.unroll"
  program.check_unrolled(tiny.model, "tpu")
  tiny.model.unroll = 1
  program.build_program(tiny, one_device())
