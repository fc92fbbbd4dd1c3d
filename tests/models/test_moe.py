"""Mixtures of experts: no token is lost, loads balance, devices do not matter."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import find_activation
from flaxlm.models.moe import MoeMlp, rebalance, route, routing_loss
from flaxlm.parallel import placement
from flaxlm.parallel.mesh import make_mesh
from flaxlm.parallel.sharding import partition_spec, use_mesh
from flaxlm.training.optim import make_optimizer
from flaxlm.training.state import (
  init_state,
  make_train_step,
  shardings_of,
  with_shardings,
)

T, E = 40, 6


@pytest.fixture
def config(tiny):
  tiny.model.moe.num_experts = E
  tiny.model.moe.expert_dim = 48
  return tiny


def layer(config, **moe):
  for name, value in moe.items():
    config.model.moe[name] = value
  model_config = TransformerConfig(**config.model)
  mlp = MoeMlp(model_config, nnx.Rngs(0))
  # A router as after training: far from uniform.
  mlp.router[...] = jax.random.normal(jax.random.key(1), mlp.router[...].shape)
  x_TD = jax.random.normal(jax.random.key(2), (T, model_config.embed_dim))
  return mlp, x_TD, jnp.ones(T)


def added_loss(mlp, routing):
  """What the routing of one layer adds to the loss of a step."""
  stacked = jax.tree.map(lambda x: x[None], routing)
  tokens = routing.load_E.sum() / mlp.config.moe.experts_per_token
  return float(routing_loss(stacked, stacked.load_E, tokens, mlp.config.moe))


def every_expert(mlp, x_TD):
  """The dense reference: every expert computes every token; chosen ones are summed."""
  moe = mlp.config.moe
  scores_TE = np.asarray(x_TD @ mlp.router[...], np.float64)
  if moe.router == "softmax":
    weight_TE = np.exp(scores_TE) / np.exp(scores_TE).sum(1, keepdims=True)
  else:
    weight_TE = 1 / (1 + np.exp(-scores_TE))
  out_TD = np.zeros(x_TD.shape)
  for t in range(T):
    chosen = np.argsort(-weight_TE[t], kind="stable")[: moe.experts_per_token]
    total = weight_TE[t, chosen].sum() if moe.renormalize else 1.0
    for e in chosen:
      up, down = mlp.expert_up[...][e], mlp.expert_down[...][e]
      gate = find_activation("silu")(x_TD[t] @ mlp.expert_gate[...][e])
      expert_D = (gate * (x_TD[t] @ up)) @ down
      out_TD[t] += moe.routed_scale * weight_TE[t, e] / total * np.asarray(expert_D)
  return out_TD


@pytest.mark.parametrize(
  "moe",
  [
    {"renormalize": True},
    {"renormalize": False, "routed_scale": 2.5},
    {"router": "sigmoid", "experts_per_token": 3},
  ],
)
@pytest.mark.parametrize("capacity_factor", [0.0, float(E)], ids=["dropless", "room"])
def test_equals_a_dense_reference(config, moe, capacity_factor):
  mlp, x_TD, is_token_T = layer(config, capacity_factor=capacity_factor, **moe)
  out_TD, routing = jax.jit(lambda m, x: m(x, is_token_T))(mlp, x_TD)
  np.testing.assert_allclose(out_TD, every_expert(mlp, x_TD), atol=2e-6)
  assert routing.load_E.sum() == T * mlp.config.moe.experts_per_token
  assert routing.load_E.max() > 1.5 * routing.load_E.min(), (
    "the test needs uneven loads"
  )
  assert routing.dropped == 0


def test_gradients_equal_those_of_the_dense_reference(config):
  mlp, x_TD, is_token_T = layer(config)

  def dense(mlp, x_TD):
    scores_TE = jnp.einsum("TD,DE->TE", x_TD, mlp.router[...])
    chosen_TK, weight_TK, _ = route(scores_TE, None, mlp.config.moe)
    one_hot_TKE = jax.nn.one_hot(chosen_TK, E)
    weight_TE = jnp.einsum("TKE,TK->TE", one_hot_TKE, weight_TK)
    hidden = jnp.einsum("TD,EDX->TEX", x_TD, mlp.expert_up[...])
    gate = jnp.einsum("TD,EDX->TEX", x_TD, mlp.expert_gate[...])
    out = jnp.einsum("TEX,EXD->TED", jax.nn.silu(gate) * hidden, mlp.expert_down[...])
    return jnp.einsum("TED,TE->TD", out, weight_TE)

  def total(forward):
    return lambda mlp, x_TD: jnp.sum(jnp.sin(3 * forward(mlp, x_TD)))

  sparse = total(lambda mlp, x_TD: mlp(x_TD, is_token_T)[0])
  expected = jax.jit(jax.grad(total(dense), (0, 1)))(mlp, x_TD)
  got = jax.jit(jax.grad(sparse, (0, 1)))(mlp, x_TD)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, expected
  )


def test_without_room_the_last_and_second_choices_go(config):
  mlp, x_TD, is_token_T = layer(config, capacity_factor=0.5, experts_per_token=1)
  out_TD, routing = mlp(x_TD, is_token_T)
  room = int(np.ceil(0.5 * T / E))
  scores_TE = x_TD @ mlp.router[...]
  chosen_T, expected = np.argmax(scores_TE, 1), every_expert(mlp, x_TD)
  seen, dropped = np.zeros(E, int), 0
  for t, e in enumerate(chosen_T):
    if seen[e] >= room:
      dropped, expected[t] = dropped + 1, 0
    seen[e] += 1
  np.testing.assert_allclose(out_TD, expected, atol=2e-6)
  assert routing.dropped == dropped > 0


def test_padding_is_not_counted_and_takes_no_room(config):
  mlp, x_TD, _ = layer(config, capacity_factor=0.5, experts_per_token=1)
  is_token_T = jnp.where(jnp.arange(T) < T // 2, 0.0, 1.0)
  out_TD, routing = mlp(x_TD, is_token_T)
  assert routing.load_E.sum() == T // 2
  alone_TD, alone = mlp(x_TD[T // 2 :], jnp.ones(T // 2))
  np.testing.assert_array_equal(routing.load_E, alone.load_E)
  for ours, theirs in zip(routing[:3], alone[:3], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  served = np.abs(alone_TD).sum(1) > 0
  np.testing.assert_allclose(out_TD[T // 2 :][served], alone_TD[served], atol=2e-6)


def test_losses_of_the_router(config):
  mlp, x_TD, is_token_T = layer(config, aux_loss=0.25, z_loss=0.5)
  _, routing = mlp(x_TD, is_token_T)
  scores_TE = np.asarray(x_TD @ mlp.router[...], np.float64)
  p_TE = np.exp(scores_TE) / np.exp(scores_TE).sum(1, keepdims=True)
  balance = E * np.sum(np.asarray(routing.load_E) / T * p_TE.mean(0))
  z = np.mean(np.log(np.exp(scores_TE).sum(1)) ** 2)
  assert added_loss(mlp, routing) == pytest.approx(0.25 * balance + 0.5 * z, rel=1e-5)
  even = layer(config, aux_loss=1.0, z_loss=0.0)[0]
  even.router[...] = jnp.zeros_like(even.router[...])
  routing = even(x_TD, is_token_T)[1]
  assert added_loss(even, routing) == pytest.approx(2.0)  # k, the minimum


def test_the_bias_moves_choices_and_no_gradient(config):
  mlp, x_TD, is_token_T = layer(config, balance="bias")
  mlp_at = jax.jit(lambda mlp: mlp(x_TD, is_token_T)[1])
  before = mlp_at(mlp)
  assert added_loss(mlp, before) == 0
  grads = jax.grad(lambda m: jnp.sum(m(x_TD, is_token_T)[0] ** 2))(mlp)
  assert not np.any(grads.balance_bias[...]) and np.any(grads.router[...])
  loads = []
  for _ in range(300):
    routing = mlp_at(mlp)
    loads.append(routing.load_E)
    stacked = jax.tree.map(lambda x: x[None], mlp)
    mlp = jax.tree.map(lambda x: x[0], rebalance(stacked, routing.load_E[None], 0.004))
  # Single steps vary: there are few tokens, each a fortieth of the load.
  after_E = np.mean(loads[150:], axis=0)
  assert np.ptp(after_E) < 0.2 * np.ptp(before.load_E)


def words(config, step) -> dict[str, np.ndarray]:
  """Random tokens with few frequent ones, as in text: unbalanced experts starve."""
  data = config.data
  batch = SyntheticBatches(data.seq_len, data.batch_size, 0, 64)[step]
  for name in ("tokens", "targets"):
    batch[name] = (64 * (batch[name] / 64) ** 2).astype(np.int32)
  return batch


def run(config, mesh, steps, skew=1.0):
  """Trains on `mesh`; returns (losses, last metrics). `skew` magnifies the router."""
  rules, model_config = config.mesh.rules.to_dict(), TransformerConfig(**config.model)
  tx, rate = make_optimizer(config.num_steps, **config.optim)
  batches = [words(config, step) for step in range(2)]
  moe = config.model.moe
  bias_rate = moe.bias_rate if moe.balance == "bias" else 0.0
  with use_mesh(mesh, rules):

    def init(key):
      state = init_state(key, model_config, tx, 0.0)
      state.model.blocks.mlp.router[...] *= skew
      return state

    target = with_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, rules)
    state = jax.jit(init, out_shardings=shardings_of(target))(jax.random.key(0))
    step = make_train_step(tx, rate, bias_rate=bias_rate, **config.step)
    step = jax.jit(step, out_shardings=(shardings_of(target), None))
    sharding = jax.sharding.NamedSharding(mesh, partition_spec(("batch",), rules))
    losses = []
    for i in range(steps):
      rows = placement.to_global(batches[i % 2], 0, config.data.batch_size, sharding)
      state, metrics = step(state, rows)
      losses.append(float(metrics["loss"]))
  return losses, metrics


@pytest.mark.parametrize(
  "capacity_factor, split",
  [
    (0.0, {"data": 2, "expert": 2}),
    pytest.param(2.0, {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param(2.0, {"data": 8}, marks=pytest.mark.slow),
    pytest.param(0.0, {"data": 8}, marks=pytest.mark.slow),
    pytest.param(0.0, {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
)
def test_several_devices_equal_one(config, one_device, capacity_factor, split):
  config.model.moe.capacity_factor = capacity_factor
  config.model.moe.first_dense_layers = 1
  config.model.moe.shared_dim = 16
  config.model.moe.aux_loss, config.model.moe.z_loss = 1.0, 0.1
  expected, one = run(config, one_device, 3)
  mesh = make_mesh(jax.devices()[: math.prod(split.values())], **split)
  got, metrics = run(config, mesh, 3)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  # The shares that balancing takes are those of the batch, not of a device's rows.
  np.testing.assert_allclose(metrics["grad_norm"], one["grad_norm"], rtol=1e-4)
  assert metrics["expert_load"].shape == (E,)


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["bias", "loss"])
def test_a_toy_learns_with_balanced_experts(config, one_device, balance):
  config.model.moe.bias_rate = 0.02
  config.optim.peak_learning_rate = 1e-2
  config.num_steps = 100
  config.step.accumulation_steps = 2
  config.model.moe.balance = "none"
  _, uneven = run(config, one_device, 100, skew=8.0)
  config.model.moe.balance = balance
  losses, metrics = run(config, one_device, 100, skew=8.0)
  assert losses[-1] < losses[0] - 1
  assert metrics["load_max"] < 1.42 and metrics["load_min"] > 0.5
  assert sum(metrics["expert_load"]) == pytest.approx(1)
  assert uneven["load_max"] > metrics["load_max"] + 0.08


def test_dense_layers_come_first(config):
  config.model.moe.first_dense_layers = 1
  from flaxlm.models.transformer import Transformer, describe_weights

  model_config = TransformerConfig(**config.model)
  shapes = {
    path: shape
    for path, shape, _ in describe_weights(Transformer(model_config, nnx.Rngs(0)))
  }
  assert shapes["first_blocks/mlp/up"] == (1, 32, 64)
  assert shapes["blocks/mlp/expert_up"] == (1, E, 32, 48)
  assert dataclasses.replace(model_config, num_layers=3).num_first_layers == 1
