"""Losses equal their definitions, and add up over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.training.losses import count_predicted, losses, summed_loss

compute_losses = jax.jit(losses, static_argnums=2)


def make_model(config, **changes):
  """A model with one layer of random numbers, so nothing is compiled."""
  config.model.update(changes, num_layers=1)
  model_config, rng = TransformerConfig(**config.model), np.random.default_rng(1)
  abstract = jax.eval_shape(
    lambda: Transformer(model_config, nnx.Rngs(jax.random.key(0)))
  )
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.0, 0.2, x.shape), x.dtype), abstract
  )


def make_batch(config, rows=4):
  """Random tokens; the second half of the last row is not predicted."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, config.model.vocab_size, (rows, config.data.seq_len + 1))
  targets = ids[:, 1:].copy()
  targets[-1, 16:] = -1
  return {
    "tokens": jnp.asarray(ids[:, :-1], jnp.int32),
    "targets": jnp.asarray(targets, jnp.int32),
    "segment_ids": jnp.ones_like(jnp.asarray(targets, jnp.int32)),
    "positions": jnp.broadcast_to(jnp.arange(config.data.seq_len)[None], targets.shape),
  }


@jax.jit
def features_of(model, batch):
  return model(batch["tokens"], batch["positions"], batch["segment_ids"]).features


def logits_of(model, batch):
  """Returns logits over the vocabulary, in float64."""
  x_BLD = np.asarray(features_of(model, batch), np.float64)
  return x_BLD @ np.asarray(model.unembedding(), np.float64)


def log_softmax(scores):
  scores = scores - scores.max(axis=-1, keepdims=True)
  return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def test_tokens_cost_their_cross_entropy_and_z_loss(tiny):
  model, batch = make_model(tiny), make_batch(tiny)
  logits_BLV, targets_BL = logits_of(model, batch), np.asarray(batch["targets"])
  at_BL1 = np.maximum(targets_BL, 0)[:, :, None]
  nats_BL = -np.take_along_axis(log_softmax(logits_BLV), at_BL1, axis=2)[:, :, 0]
  log_z_BL = np.log(np.exp(logits_BLV).sum(axis=2))
  counts = targets_BL >= 0
  result = compute_losses(model, batch, 0.1, 3.0)
  np.testing.assert_allclose(result.nats, nats_BL * counts, atol=1e-5)
  np.testing.assert_array_equal(result.predicted, counts)
  total = 3.0 * np.sum((nats_BL + 0.1 * log_z_BL**2) * counts)
  assert float(result.total) == pytest.approx(total, rel=1e-5)
  assert result.choices is result.pair_nats is result.routing is None


def test_classes_cost_their_cross_entropy_and_the_likeliest_is_chosen(tiny):
  model = make_model(tiny, head="sequence", num_labels=3)
  batch = make_batch(tiny) | {"labels": jnp.asarray([[2], [0], [-1], [1]])}
  result = compute_losses(model, batch, scale=2.0)
  first_BD = features_of(model, batch)[:, 0]  # pooling: first
  scores_BC = np.asarray(model.head.classify(model.head.transform(first_BD)))
  nats_BC = -log_softmax(scores_BC.astype(np.float64))
  nats = np.asarray([[nats_BC[0, 2]], [nats_BC[1, 0]], [0.0], [nats_BC[3, 1]]])
  np.testing.assert_allclose(result.nats, nats, atol=1e-5)
  assert float(result.total) == pytest.approx(2.0 * nats.sum(), rel=1e-5)
  labels, spans = result.choices
  np.testing.assert_array_equal(labels[:, 0], scores_BC.argmax(axis=1))
  assert labels.dtype == jnp.int32 and spans is None


def test_pairs_without_a_label_cost_nothing(tiny):
  model = make_model(tiny, head="mlm", pair_head=True)
  batch = make_batch(tiny)
  assert jax.eval_shape(losses, model, batch).pair_nats is None
  batch["pair_labels"] = jnp.asarray([[1], [-1], [0], [-1]])
  nats_B = np.asarray(compute_losses(model, batch).pair_nats)
  assert nats_B.shape == (4,) and nats_B[1] == nats_B[3] == 0
  assert np.all(nats_B[[0, 2]] > 0.1)


def test_predictions_are_counted_by_task():
  batch = {
    "targets": jnp.asarray([[3, -1], [0, 5]]),
    "pair_labels": jnp.asarray([[-1]]),
  }
  assert jax.tree.map(float, count_predicted(batch)) == {"main": 3.0, "pairs": 1.0}
  batch = {"labels": jnp.asarray([[-1], [-1]])}  # 1, so that nothing is divided by 0
  assert jax.tree.map(float, count_predicted(batch)) == {"main": 1.0}


@pytest.mark.parametrize("experts", [0, 4])
def test_micro_batches_add_up_to_the_batch(tiny, experts):
  """The loss is the mean over all predictions, although the halves differ in count."""
  tiny.model.moe.num_experts, tiny.model.moe.z_loss = experts, 0.1
  model, batch = make_model(tiny), make_batch(tiny)
  batch["segment_ids"] = batch["segment_ids"].at[0, 20:].set(0)  # padding
  counts = count_predicted(batch)
  compute = jax.jit(lambda rows, load: summed_loss(model, rows, counts, 0.0, load))
  parts = [{n: x[at] for n, x in batch.items()} for at in (slice(0, 2), slice(2, 4))]
  first = compute(parts[0], jnp.zeros((1, 4)))
  second = compute(parts[1], first[1].get("expert_load"))
  total, metrics = jax.tree.map(jnp.add, first, second)
  whole = compute_losses(model, batch)
  mean = float(whole.nats.sum()) / (3.5 * 32)
  assert float(metrics["loss"]) == pytest.approx(mean, rel=1e-5)
  if experts:
    np.testing.assert_array_equal(metrics["expert_load"], whole.routing.load_E)
    # Balancing takes the shares of the micro-batches so far; all else is of the batch.
    one, two = (jax.device_get(compute_losses(model, part).routing) for part in parts)
    balance = np.sum(one.load_E / (2 * 32 - 12) * one.probability_E)
    so_far_SE = one.load_E + two.load_E
    balance += np.sum(so_far_SE / (4 * 32 - 12) * two.probability_E)
    log_z = float(whole.routing.log_z_squared.sum())
    added = (0.01 * experts * balance + 0.1 * log_z) / (4 * 32 - 12)
    assert float(total) == pytest.approx(mean + added, rel=1e-5)
    assert added > 0.05 and float(metrics["dropped"]) == 0
  else:
    assert float(total) == pytest.approx(mean, rel=1e-5)
