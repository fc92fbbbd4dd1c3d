"""Eight devices, however split, compute what one does and hold only their share."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from flaxlm.data.batches import SyntheticBatches
from flaxlm.errors import ConfigError
from flaxlm.models.layers import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel import hosts
from flaxlm.parallel.mesh import make_mesh
from flaxlm.parallel.sharding import sharding_of, spec, use_mesh
from flaxlm.training.evaluation import evaluate, make_eval_step
from flaxlm.training.optim import make_optimizer
from flaxlm.training.state import (
  init_state,
  make_train_step,
  shardings_of,
  with_shardings,
)

STEPS = 4
KEY = jax.random.key(0)
SPLITS = [
  (data, fsdp, 8 // data // fsdp)
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  if data * fsdp <= 8
]


def train(config, mesh):
  """Returns (losses of a few steps, final state)."""
  rules = config.mesh.rules.to_dict()
  tx, rate = make_optimizer(config.num_steps, **config.optim)
  model_config = TransformerConfig(**config.model)
  init = functools.partial(
    init_state, model_config=model_config, tx=tx, ema_decay=config.step.ema_decay
  )
  batches = SyntheticBatches(config.data.seq_len, config.data.batch_size, 0, 64)
  with use_mesh(mesh, rules):
    key = jax.random.key(0)
    target = with_shardings(jax.eval_shape(init, key), mesh, rules)
    state = jax.jit(init, out_shardings=shardings_of(target))(key)
    step = jax.jit(
      make_train_step(tx, rate, **config.step),
      donate_argnums=0,
      out_shardings=(shardings_of(target), None),
    )
    sharding = jax.sharding.NamedSharding(mesh, spec(("batch",), rules))
    losses = []
    for i in range(STEPS):
      batch = hosts.to_global(batches[i], 0, config.data.batch_size, sharding)
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
  return losses, state


@pytest.fixture
def config(tiny):
  # Divide over 8 devices.
  tiny.model.num_heads = tiny.model.num_kv_heads = 8
  tiny.model.head_dim = 4
  tiny.optim.peak_learning_rate = 1e-2
  return tiny


def test_eight_devices_in_every_split_equal_one(config, one_device):
  assert len(SPLITS) == 10
  expected, reference = train(config, one_device)
  assert len(set(expected)) == STEPS
  for split in SPLITS:
    losses, state = train(config, make_mesh(*split))
    # Only the order of float32 sums differs: 1e-5 of a loss, 1e-3 of a weight's scale.
    np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=str(split))
    for a, b in zip(
      jax.tree.leaves(state.model), jax.tree.leaves(reference.model), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-3, err_msg=str(split))


def test_evaluation_does_not_depend_on_the_mesh(config, one_device):
  batches = SyntheticBatches(config.data.seq_len, config.data.batch_size, 0, 64)
  model_config = TransformerConfig(**config.model)
  rules = config.mesh.rules.to_dict()
  results = []
  for mesh in (one_device, make_mesh(8, 1, 1), make_mesh(1, 4, 2)):
    with use_mesh(mesh, rules):
      target = with_shardings(
        jax.eval_shape(lambda key: Transformer(model_config, nnx.Rngs(key)), KEY),
        mesh,
        rules,
      )
      model = jax.jit(
        lambda key: Transformer(model_config, nnx.Rngs(key)),
        out_shardings=shardings_of(target),
      )(KEY)
      sharding = jax.sharding.NamedSharding(mesh, spec(("batch",), rules))
      placed = [hosts.to_global(batches[i], 0, 8, sharding) for i in range(3)]
      step = jax.jit(make_eval_step(0))
      results.append(evaluate(model, placed, step, 2.0))
      assert evaluate(model, placed, step, 2.0) == results[-1]
  for result in results[1:]:
    assert result == pytest.approx(results[0], rel=1e-6)


def test_accumulation_equals_one_batch_on_any_mesh(config, one_device):
  expected, _ = train(config, one_device)
  config.step.accumulation_steps = 2
  for mesh in (one_device, make_mesh(2, 2, 2)):
    losses, _ = train(config, mesh)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_weights_and_moments_are_really_split(config, name):
  config.optim.name = name
  _, state = train(config, make_mesh(1, 4, 2))
  rows = jax.tree_util.tree_leaves_with_path(state)
  for path, array in rows:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if (
      any(part in name for part in ("query", "up", "down", "embed")) and array.ndim > 1
    ):
      if "v_row" in name or "v_col" in name or array.size < 1024:
        continue  # Adafactor's factored moments are vectors, and small
      ways = array.size // array.addressable_shards[0].data.size
      assert ways == 8, f"{name} {array.shape} is split {ways} ways"


def test_the_mesh_must_use_every_device():
  assert make_mesh(-1, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
  with pytest.raises(ConfigError, match=r"data=2 x fsdp=1 x tensor=1 = 2 devices"):
    make_mesh(2, 1, 1)
  with pytest.raises(ConfigError, match="the 8 devices"):
    make_mesh(-1, 3, 1)


def test_rules_that_do_not_fit_name_the_weight():
  mesh = make_mesh(1, 1, 8)
  rules = {"embed": ("fsdp",), "heads": ("tensor",)}
  with pytest.raises(ConfigError, match=r"query of shape \(32, 4, 8\).*'heads' = 4"):
    sharding_of("query", (32, 4, 8), ("embed", "heads", None), mesh, rules)
  with pytest.raises(ConfigError, match=r"config.mesh.rules.mlp"):
    sharding_of("up", (32, 64), ("embed", "mlp"), mesh, rules)


def test_an_axis_splits_an_array_once():
  rules = {"embed": ("fsdp",), "mlp": ("fsdp", "tensor"), "norm": ()}
  assert spec(("embed", "mlp"), rules) == P("fsdp", "tensor")
  assert spec(("mlp", "norm", None), rules) == P(("fsdp", "tensor"), None, None)
