"""The training step: its objective, its guard against NaNs, its update per weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxlm.data.batches.masking import Objective, synthetic_vocabulary
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import dropout
from flaxlm.training import losses as objectives
from flaxlm.training import state as training_state
from flaxlm.training.evaluation import evaluate, make_eval_step
from flaxlm.training.losses import summed_loss
from flaxlm.training.optim import decays, leaf_name, make_optimizer
from flaxlm.training.state import init_state, make_train_step


def build(config):
  tx, rate = make_optimizer(config.num_steps, **config.optim)
  model = TransformerConfig(**config.model)
  state = jax.jit(lambda key: init_state(key, model, tx, config.step.ema_decay))(
    jax.random.key(0)
  )
  return state, jax.jit(make_train_step(tx, rate, **config.step))


def batch(config, step=0):
  data = config.data
  batches = SyntheticBatches(data.seq_len, data.batch_size, 0, config.model.vocab_size)
  return {name: jnp.asarray(rows) for name, rows in batches[step].items()}


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_optimizer_learns_a_batch_by_heart(tiny, name):
  tiny.optim.name = name
  tiny.optim.peak_learning_rate = 3e-3 if name == "lion" else 1e-2
  state, step = build(tiny)
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch(tiny))
    losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(np.log(64), rel=0.02)
  assert losses[-1] < losses[0] - 0.4


def test_adamw_is_the_textbook_update(tiny):
  """One step computed by hand: clipping, moments, bias correction, decay by name."""
  tiny.optim.max_grad_norm = 0.01
  tiny.optim.warmup_steps = 0
  tiny.model.positions, tiny.model.norm, tiny.model.use_bias = (
    "learned",
    "layernorm",
    True,
  )
  state, step = build(tiny)
  rows = batch(tiny)
  loss = functools.partial(summed_loss, counts={"main": 8.0 * 32}, z_loss=0.0)
  grads, _ = jax.jit(jax.grad(loss, has_aux=True))(state.model, rows)
  norm = float(optax.tree.norm(grads))
  new, metrics = step(state, rows)
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5) and norm > 0.01
  optim, rate = tiny.optim, float(metrics["learning_rate"])
  assert rate == pytest.approx(optim.peak_learning_rate)
  seen = {True: 0, False: 0}
  for decay, g, old, updated in zip(
    *map(jax.tree.leaves, (decays(state.model), grads, state.model, new.model)),
    strict=True,
  ):
    g = np.asarray(g) * 0.01 / norm
    m_hat, v_hat = g, g * g  # after one step the corrections cancel the decay rates
    update = m_hat / (np.sqrt(v_hat) + optim.epsilon) + optim.weight_decay * decay * old
    np.testing.assert_allclose(updated, old - rate * update, atol=2e-5)
    seen[decay] += 1
  assert seen == {True: 9, False: 13}


def test_decay_spares_norms_and_biases_even_when_stacked(tiny):
  tiny.model.use_bias, tiny.model.norm, tiny.model.qk_norm = True, "layernorm", "head"
  state, _ = build(tiny)
  names = jax.tree_util.tree_leaves_with_path(decays(state.model))
  spared = {
    jax.tree_util.keystr(p, simple=True, separator="/") for p, d in names if not d
  }
  assert all("norm" in name or "bias" in name for name in spared) and len(spared) == 15


def test_muon_gets_the_matrices_of_the_layers_and_adam_the_rest(tiny):
  tiny.optim.name = "muon"
  state, _ = build(tiny)
  held = {"mu": set(), "nu": set()}
  for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state):
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if "adam" in keys and "nu" in keys:
      held["nu"].add(leaf_name(path))
    elif "muon" in keys and "mu" in keys:
      held["mu"].add(leaf_name(path))
  assert held["mu"] == {"down", "gate", "key", "out", "query", "up", "value"}
  assert held["nu"] == {"embed", "scale"}


@pytest.mark.faults
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_step_changes_nothing_but_the_counters(tiny, poison):
  tiny.step.ema_decay = 0.9
  state, step = build(tiny)
  state, _ = step(state, batch(tiny))
  sick = jax.tree.map(lambda x: x, state)
  sick.model.final_norm.scale[...] = sick.model.final_norm.scale[...].at[3].set(poison)
  after, metrics = step(sick, batch(tiny, 1))
  assert bool(metrics["bad"]) and int(after.skipped) == 1 and int(after.step) == 2
  for part in ("model", "opt_state", "ema"):
    for a, b in zip(
      jax.tree.leaves(getattr(after, part)),
      jax.tree.leaves(getattr(sick, part)),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
  good, metrics = step(state, batch(tiny, 1))
  assert not bool(metrics["bad"]) and int(good.skipped) == 0


def test_ema_is_the_debiased_average_of_the_weights(tiny):
  """The weights before the first step have no part in it, however high the decay."""
  decay = tiny.step.ema_decay = 0.999
  state, step = build(tiny)
  state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 100.0, state.ema))
  total, counted = jax.tree.map(np.zeros_like, state.model), 0.0
  for i in range(5):
    rows = batch(tiny, i)
    if i == 1:  # a step that is skipped does not count
      scale = state.model.final_norm.scale[...]
      state.model.final_norm.scale[...] = scale.at[3].set(np.nan)
    new, _ = step(state, rows)
    if i == 1:
      new.model.final_norm.scale[...] = scale
    else:
      total = jax.tree.map(lambda t, m: decay * t + m, total, new.model)
      counted = decay * counted + 1
    for ema, sum_ in zip(*map(jax.tree.leaves, (new.ema, total)), strict=True):
      np.testing.assert_allclose(ema, sum_ / counted, atol=3e-5)
    state = new
  assert int(state.skipped) == 1 and state.eval_model is state.ema


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.999999])
def test_the_average_of_a_constant_model_is_the_model_from_step_1(decay):
  model, average = {"w": jnp.asarray([3.0, -1e-3])}, {"w": jnp.asarray([0.0, 5.0])}
  for number in (1, 2, 3, 10_000, 2**31 - 1):
    average = training_state._move_average(average, model, decay, jnp.int32(number))
    np.testing.assert_allclose(average["w"], model["w"], rtol=1e-5)


@pytest.mark.faults
def test_positions_without_a_target_do_not_count(tiny):
  state, train_step = build(tiny)
  rows = batch(tiny)
  half = dict(rows, targets=rows["targets"].at[:, 16:].set(-1))
  step = jax.jit(make_eval_step())
  nats, tokens, _ = step(state.model, half)
  full, _, _ = step(state.model, rows)
  assert np.all(tokens == 16) and np.all(nats < full)
  nothing = dict(rows, targets=jnp.full_like(rows["targets"], -1))
  _, metrics = train_step(state, nothing)
  assert float(metrics["loss"]) == 0 and not bool(metrics["bad"])


def test_evaluation_counts_every_token_once(tiny):
  state, _ = build(tiny)
  batches = [batch(tiny, i) for i in range(3)]
  batches[2]["targets"] = batches[2]["targets"].at[4:].set(-1)
  result = evaluate(state.model, batches, jax.jit(make_eval_step()), 2.5)
  assert result["tokens"] == (8 + 8 + 4) * 32
  one = {"main": 1.0}
  loss = jax.jit(lambda m, rows: summed_loss(m, rows, one, 0.0)[1]["loss"])
  total = sum(float(loss(state.model, rows)) for rows in batches)
  assert result["loss"] == pytest.approx(total / result["tokens"], rel=1e-5)
  assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))
  assert result["bits_per_byte"] == pytest.approx(result["loss"] / np.log(2) / 2.5)
  stopped = evaluate(state.model, batches, jax.jit(make_eval_step()), 1.0, lambda: True)
  assert stopped is None


def test_dropout_is_a_function_of_seed_and_step(tiny):
  tiny.model.dropout = 0.2
  state, _ = build(tiny)
  rows = batch(tiny)
  tx, rate = make_optimizer(tiny.num_steps, **tiny.optim)

  runs = [jax.jit(make_train_step(tx, rate, **tiny.step, seed=s)) for s in (0, 1)]

  def loss_at(seed, step):
    moved = dataclasses.replace(state, step=jnp.int32(step))
    return float(runs[seed](moved, rows)[1]["loss"])

  assert loss_at(0, 0) == loss_at(0, 0)
  assert len({loss_at(0, 0), loss_at(0, 1), loss_at(1, 0)}) == 3
  # Evaluation has no dropout.
  nats, tokens, _ = jax.jit(make_eval_step())(state.model, rows)
  plain = dataclasses.replace(tiny_model(tiny), dropout=0.0)
  same = jax.jit(lambda key: init_state(key, plain, tx, 0.0))(jax.random.key(0))
  expected, _, _ = jax.jit(make_eval_step())(same.model, rows)
  np.testing.assert_array_equal(nats, expected)
  assert tokens.sum() == 8 * 32


def tiny_model(config):
  return TransformerConfig(**config.model)


def test_dropout_keeps_the_mean():
  x = jnp.ones((1000, 10))
  dropped = dropout(x, 0.25, jax.random.key(0))
  assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
  assert float(dropped.mean()) == pytest.approx(1, abs=0.03)
  assert dropout(x, 0.25, None) is x


def test_sentence_pairs_add_their_own_loss(tiny):
  """Each of a batch's two tasks is a mean over its own predictions."""
  tiny.model.causal, tiny.model.head, tiny.model.pair_head = False, "mlm", True
  tiny.model.num_segment_types = 2
  tiny.objective.kind, tiny.objective.pairs = "masked", "nsp"
  objective = Objective(**tiny.objective)
  vocabulary = synthetic_vocabulary(objective, 64)
  batches = SyntheticBatches(32, 8, 0, 64, objective=objective, vocabulary=vocabulary)
  rows = {name: jnp.asarray(x) for name, x in batches[0].items()}
  state, step = build(tiny)
  _, metrics = step(state, rows)
  assert float(metrics["pair_loss"]) == pytest.approx(np.log(2), abs=0.05)
  assert float(metrics["loss"]) == pytest.approx(np.log(64), abs=0.2)
  grads = jax.jit(jax.grad(lambda m: sum_of_pairs(m, rows)))(state.model)
  assert np.any(grads.pair_head.classifier[...]) and np.any(grads.segment_types[...])
  unlabelled = dict(rows, pair_labels=jnp.full_like(rows["pair_labels"], -1))
  assert float(sum_of_pairs(state.model, unlabelled)) == 0


def sum_of_pairs(model, rows):
  return jnp.sum(objectives.losses(model, rows).pair_nats)
