"""Eight devices, on any mesh, compute what one does and hold only their share."""

import itertools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.ring import zigzag
from flaxlm.parallel import AXES, placement
from flaxlm.parallel.mesh import make_mesh
from flaxlm.parallel.pipeline import bubble
from flaxlm.parallel.placement import batch_sharding
from flaxlm.parallel.sharding import bytes_per_device, partition_spec, sharding_of
from flaxlm.runs import program as programs
from flaxlm.training.evaluation import evaluate, make_eval_step
from flaxlm.training.losses import count_predicted, summed_loss
from flaxlm.training.state import shardings_of

STEPS = 3
KEY = jax.random.key(0)


def mesh_of(config, **sizes):
  """Returns the config on a mesh of `sizes`, and that mesh."""
  config = config.copy_and_resolve_references()
  for axis, size in sizes.items():
    config.mesh[axis] = size
  sizes = {axis: n for axis, n in sizes.items() if axis in AXES}
  count = int(np.prod(list(sizes.values())))
  return config, make_mesh(jax.devices()[:count], **sizes)


def place(config, mesh, step: int = 0):
  """Returns a batch of random tokens on the devices of the mesh."""
  data = config.data
  rows = SyntheticBatches(data.seq_len, data.batch_size, 0, 64)[step]
  if config.model.attention == "ring" and mesh.shape["context"] > 1:
    order = zigzag(data.seq_len, mesh.shape["context"])
    rows = {name: row[:, order] for name, row in rows.items()}
  sharding = batch_sharding(config.mesh.rules.to_dict(), mesh)
  return placement.to_global(rows, 0, data.batch_size, sharding)


def start(config, mesh):
  """Returns (program, state at step 0)."""
  program = programs.build_program(config, mesh)
  with programs.use_config_mesh(config, mesh):
    return program, program.init(KEY)


def train(config, mesh):
  """Returns (losses of a few steps, final state)."""
  program, state = start(config, mesh)
  losses = []
  with programs.use_config_mesh(config, mesh):
    for i in range(STEPS):
      state, metrics = program.train_step(state, place(config, mesh, i), None)
      losses.append(float(metrics["loss"]))
  return losses, state


def gradient(config, mesh, model=None):
  """Returns (loss, its gradient, metrics, weights) of `model` or of new weights.

  Reusing the weights of another mesh avoids compiling the initialisation.
  """
  if model is None:
    program, state = start(config, mesh)
    model = state.model
  else:
    program = programs.build_program(config, mesh)
    target = program.target.model
    arrays = jax.device_put(
      jax.tree.leaves(model), jax.tree.leaves(shardings_of(target))
    )
    model = jax.tree.unflatten(jax.tree.structure(target), arrays)

  def loss(model, batch):
    counts = count_predicted(batch)
    return summed_loss(model, batch, counts, 0.0)

  compute = jax.jit(
    jax.value_and_grad(loss, has_aux=True),
    out_shardings=(None, shardings_of(program.target.model)),
  )
  with programs.use_config_mesh(config, mesh):
    (value, metrics), grads = compute(model, place(config, mesh))
  return (float(value), *jax.device_get((grads, metrics, model)))


def assert_same_gradient(got, expected):
  """Compares losses to 1e-5, gradients to 1e-5 of each array's largest value."""
  assert got[0] == pytest.approx(expected[0], rel=1e-5)
  arrays = zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True)
  for a, b in arrays:
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-12)


@pytest.fixture
def config(tiny):
  # Divisible over 8 devices.
  tiny.model.num_heads = tiny.model.num_kv_heads = 8
  tiny.model.head_dim = 4
  tiny.optim.peak_learning_rate = 1e-2
  return tiny


@pytest.fixture
def full(config):
  """A model that has something to split for every axis."""
  model = config.model
  model.num_layers = 4
  model.moe.num_experts = 4
  model.moe.expert_dim = 16
  model.moe.aux_loss, model.moe.z_loss = 0.1, 1e-3
  return config


@pytest.fixture(scope="module")
def expected():
  """The gradient on one device, computed once."""
  return {}


# Three axes at a time, so that each pair of the seven occurs once (the Fano plane);
# stage also with other schedules.
TRIPLES = ("013", "124", "235", "346", "450", "561", "602")
SPLITS = [{AXES[int(i)]: 2 for i in triple} for triple in TRIPLES] + [
  {"stage": 2, "microbatches": 4, "stage_repeats": 2},
  {"stage": 4, "expert": 2},
]
# Then each axis alone, and the pairs by themselves.
SPLITS += [
  pytest.param(dict.fromkeys(axes, 2), marks=pytest.mark.slow)
  for count in (1, 2)
  for axes in itertools.combinations(AXES, count)
]


def name_of(split) -> str:
  return "-".join(f"{axis}{size}" for axis, size in split.items())


@pytest.mark.parametrize("split", SPLITS, ids=name_of)
def test_gradients_on_any_mesh_are_those_of_one_device(
  full, split, expected, one_device
):
  if not expected:
    expected["one"] = gradient(full, one_device)
  # Ring attention and, for some of the meshes, attention by heads.
  if "context" in split and len(split) != 2 and "data" not in split:
    full.model.attention = "ring"
  config, mesh = mesh_of(full, **split)
  got = gradient(config, mesh, expected["one"][3])
  assert_same_gradient(got, expected["one"])
  load = got[2]["expert_load"]
  np.testing.assert_array_equal(load, expected["one"][2]["expert_load"])


@pytest.mark.parametrize(
  "split",
  [{"context": 4, "tensor": 2}, pytest.param({"context": 8}, marks=pytest.mark.slow)],
)
def test_ring_attention_in_a_model_of_windows_and_documents(config, split, one_device):
  model = config.model
  model.num_layers, model.layer_pattern = 4, ("local", "global")
  model.sliding_window, model.attention_softcap = 5, 20.0
  config.data.seq_len = 64
  expected = gradient(config, one_device)
  config.model.attention = "ring"
  got = gradient(*mesh_of(config, **split), expected[3])
  assert_same_gradient(got, expected)


@pytest.mark.parametrize(
  "split",
  [
    {"data": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
  ],
)
def test_training_on_eight_devices_is_that_on_one(config, split, one_device):
  expected, reference = train(config, one_device)
  assert len(set(expected)) == STEPS
  config.step.offload_optimizer = True  # moves moments, changes no number
  config, mesh = mesh_of(config, **split)
  losses, state = train(config, mesh)
  # Only the order of float32 sums differs: 1e-5 of a loss, 1e-3 of a weight's scale.
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(state.model), jax.tree.leaves(reference.model), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-3)
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}
  assert kinds == {"pinned_host"}


def test_accumulation_equals_one_batch_on_any_mesh(config, one_device):
  expected = gradient(config, one_device)
  losses, _ = train(config, one_device)
  config.step.accumulation_steps = 2
  config, mesh = mesh_of(config, data=2, context=2, tensor=2)
  np.testing.assert_allclose(train(config, mesh)[0], losses, rtol=1e-5)
  assert expected[0] == pytest.approx(losses[0], rel=1e-5)


def test_evaluation_does_not_depend_on_the_mesh(config, one_device):
  results = []
  for sizes in ({"data": 1}, {"data": 8}, {"fsdp": 4, "tensor": 2}):
    own, mesh = mesh_of(config, **sizes)
    _, state = start(own, mesh)
    with programs.use_config_mesh(own, mesh):
      placed = [place(own, mesh, i) for i in range(3)]
      step = jax.jit(make_eval_step())
      results.append(evaluate(state.model, placed, step, 2.0))
      assert evaluate(state.model, placed, step, 2.0) == results[-1]
  for result in results[1:]:
    assert result == pytest.approx(results[0], rel=1e-6)


@pytest.mark.parametrize(
  "name",
  ["adamw", *(pytest.param(x, marks=pytest.mark.slow) for x in ("muon", "adafactor"))],
)
def test_weights_and_moments_are_split_over_all_devices(full, name):
  full.optim.name = name
  config, mesh = mesh_of(full, stage=2, fsdp=2, tensor=2)
  _, state = start(config, mesh)
  for path, array in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_matrix = any(part in name for part in ("query", "expert_up", "down", "embed"))
    if not is_matrix or array.ndim < 2 or "v_row" in name or "v_col" in name:
      continue  # Adafactor's factored moments are vectors, and small
    if array.size >= 1024:
      ways = array.size // array.addressable_shards[0].data.size
      assert ways == 8, f"{name} {array.shape} is split {ways} ways"
  total = sum(x.nbytes for x in jax.tree.leaves(state.model))
  assert bytes_per_device(state.model) < 1.1 * total / 8


def test_tokens_between_blocks_are_split_over_tensor_too(config):
  """With sequence parallelism, no device ever holds all logits or half of them."""
  config.model.vocab_size = 512
  config.data.batch_size = 16
  config, mesh = mesh_of(config, fsdp=2, tensor=4)
  program = programs.build_program(config, mesh)
  with programs.use_config_mesh(config, mesh):
    batch = programs.abstract_batch(config, mesh)
    text = program.train_step.lower(program.target, batch, None).compile().as_text()
  tokens, width, words = 16 * 32, config.model.embed_dim, 512
  shapes = set(re.findall(r"f32\[([\d,]+)\]", text))
  assert f"{tokens // 8},{width}" in shapes  # the stream, on eight devices
  assert f"{tokens // 2},{words // 4}" in shapes  # logits of half the tokens
  assert f"{tokens // 2},{words}" not in shapes and f"{tokens},{words}" not in shapes
  assert f"{tokens},{width}" not in shapes


@pytest.mark.parametrize(
  "keep, backend",
  [
    ("attention", "xla"),
    pytest.param("attention", "reference", marks=pytest.mark.slow),
    ("attention", "chunked"),
    ("hidden", "xla"),
    pytest.param("query", "xla", marks=pytest.mark.slow),
  ],
)
def test_a_named_tensor_is_kept_or_offloaded(config, keep, backend, one_device):
  """remat=full recomputes the dot, unless it is named."""
  config.model.attention = backend

  def dots(**changes):
    own, mesh = mesh_of(config, data=1)
    own.model.update(changes)
    program = programs.build_program(own, mesh)
    batch = programs.abstract_batch(own, mesh)
    with programs.use_config_mesh(own, mesh):
      jaxpr = str(program.train_step.trace(program.target, batch, None).jaxpr)
    return jaxpr.count("dot_general"), jaxpr.count("<host>")

  everything, _ = dots(remat="full")
  kept, _ = dots(remat="full", keep=(keep,))
  offloaded, moved = dots(remat="full", offload=(keep,))
  none, _ = dots(remat="none")
  assert none < kept < everything
  assert offloaded == kept and moved > 0


def test_a_pipeline_reports_its_bubble():
  assert bubble(1, 4, 1) == 0
  assert bubble(4, 4, 1) == pytest.approx(3 / 7)
  assert bubble(4, 8, 2) == pytest.approx(3 / 19)  # more rounds, fewer bubbles


def test_stages_hold_their_own_layers_and_send_activations_on(full):
  config, mesh = mesh_of(full, stage=4, data=2)
  program = programs.build_program(config, mesh)
  query = program.target.model.blocks.attention.query.get_value()
  assert query.sharding.spec[0] == "stage"
  with programs.use_config_mesh(config, mesh):
    batch = programs.abstract_batch(config, mesh)
    text = program.train_step.lower(program.target, batch, None).compile().as_text()
  assert "collective-permute" in text


@pytest.mark.faults
def test_the_mesh_must_use_every_device():
  sizes = {axis: n for axis, n in make_mesh(fsdp=2, tensor=2).shape.items() if n > 1}
  assert sizes == {"data": 2, "fsdp": 2, "tensor": 2}
  with pytest.raises(ConfigError, match=r"data=2 = 2 devices"):
    make_mesh(data=2)
  with pytest.raises(ConfigError, match="the 8 devices"):
    make_mesh(tensor=3)


@pytest.mark.faults
def test_a_batch_that_does_not_divide_is_refused(config):
  config.data.batch_size = 12
  config, mesh = mesh_of(config, data=2, fsdp=4)
  with pytest.raises(ConfigError, match="a multiple of 8"):
    programs.open_feed(config, mesh)


def test_weights_that_no_axis_splits_are_refused(config):
  config.mesh.rules.mlp = ()
  config, mesh = mesh_of(config, fsdp=2, tensor=2)
  with pytest.raises(ConfigError, match=r"2 devices along tensor, most .*mlp/"):
    programs.build_program(config, mesh)


@pytest.mark.faults
def test_rules_that_do_not_fit_name_the_weight():
  mesh = make_mesh(data=1, tensor=8)
  rules = {"embed": ("fsdp",), "heads": ("tensor",)}
  with pytest.raises(ConfigError, match=r"query of shape \(32, 4, 8\).*'heads' = 4"):
    sharding_of("query", (32, 4, 8), ("embed", "heads", None), mesh, rules)
  with pytest.raises(ConfigError, match=r"config.mesh.rules.mlp"):
    sharding_of("up", (32, 64), ("embed", "mlp"), mesh, rules)


def test_an_axis_splits_an_array_once():
  rules = {"embed": ("fsdp",), "mlp": ("fsdp", "tensor"), "norm": ()}
  assert partition_spec(("embed", "mlp"), rules) == P("fsdp", "tensor")
  assert partition_spec(("mlp", "norm", None), rules) == P(
    ("fsdp", "tensor"), None, None
  )
  rules = {"batch": ("data",), "length": ("context",), "stream": ("tensor",)}
  assert partition_spec(("stream", None), rules) == P(
    ("data", "context", "tensor"), None
  )


def test_a_ring_never_holds_all_scores_nor_masks(config):
  """JAX would compute the masks of all layers ahead if they were the same."""
  config.model.attention, config.data.seq_len = "ring", 128
  config, mesh = mesh_of(config, data=2, context=4)
  program = programs.build_program(config, mesh)
  with programs.use_config_mesh(config, mesh):
    batch = programs.abstract_batch(config, mesh)
    text = program.train_step.lower(program.target, batch, None).compile().as_text()
  shapes = re.findall(r"(?:f32|pred)\[([\d,]+)\]", text)
  largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
  rows, own, whole, heads = 4, 128 // 4, 128, 8
  assert largest < rows * heads * own * whole / 2
