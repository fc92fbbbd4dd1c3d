"""The losses of a batch, for every objective and head.

A batch marks the positions to predict: `targets_BL` holds the right token there and -1
everywhere else; `labels_BR` does the same for classes. Losses are sums, not means, so
that micro-batches, rows and hosts add up exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.kernels.cross_entropy import Split, linear_cross_entropy
from flaxlm.models.heads import best_spans, label_scores, pool
from flaxlm.models.moe import Routing, routing_loss
from flaxlm.models.transformer import Output, Transformer
from flaxlm.parallel.sharding import current_layout, join_rows, split_rows


class Losses(NamedTuple):
  """R is L where tokens are predicted, else the number of labels per row."""

  total: jax.Array  # scaled sum of cross entropy and z-loss, to differentiate
  nats: jax.Array  # BR, float32: cross entropy where something is predicted, else 0
  predicted: jax.Array  # BR: 1 where something is predicted, else 0
  # (likeliest labels BR, scores of spans B2 or None); None where tokens are predicted.
  choices: tuple[jax.Array, jax.Array | None] | None
  pair_nats: jax.Array | None  # B: cross entropy of the task on sentence pairs
  routing: Routing | None  # of the experts


def _run_model(
  model: Transformer, batch: dict[str, jax.Array], dropout_key: jax.Array | None
) -> Output:
  return model(
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
    token_types_BL=batch.get("token_types"),
    prefix_BL=batch.get("prefix"),
    dropout_key=dropout_key,
  )


def losses(
  model: Transformer,
  batch: dict[str, jax.Array],
  z_loss: float = 0.0,
  scale: jax.Array | float = 1.0,
  dropout_key: jax.Array | None = None,
) -> Losses:
  """Returns the loss of each position, or label, of a batch, and `scale` x their sum.

  `scale` is applied inside, because the kernel computes loss and gradient together.

  Args:
    z_loss: weight of log(Z)^2, where tokens are predicted.
    dropout_key: None turns dropout off.
  """
  out = _run_model(model, batch, dropout_key)
  pair_nats_B = _pair_losses(model, out.features, batch)
  if model.config.head in ("lm", "mlm"):
    targets_BL = batch["targets"]
    predicted, choices = (targets_BL >= 0).astype(jnp.float32), None
    total, nats_T = linear_cross_entropy(
      join_rows(model.for_vocabulary(out.features)),
      model.unembedding(),
      join_rows(targets_BL),
      join_rows(scale * predicted),
      bias_V=model.vocab_bias(),
      softcap=model.config.logit_softcap,
      z_loss=z_loss,
      split=_split_of_loss(),
    )
    nats = split_rows(nats_T, targets_BL.shape[0]) * predicted
  else:
    scores_BRC, labels_BR = label_scores(model, out.features, batch), batch["labels"]
    predicted = (labels_BR >= 0).astype(jnp.float32)
    nats = _label_losses(scores_BRC, labels_BR) * predicted
    total = scale * jnp.sum(nats)
    if model.config.head == "span":
      choices = best_spans(scores_BRC, batch["token_types"])
    else:
      choices = jnp.argmax(scores_BRC, axis=-1).astype(jnp.int32), None
  return Losses(total, nats, predicted, choices, pair_nats_B, out.routing)


def _split_of_loss() -> Split:
  """Returns the mesh axes that split the tokens, the vocabulary and the embedding.

  An axis that splits the tokens cannot split the vocabulary too.
  """
  now = current_layout()
  if now is None:
    return Split()
  tokens = now.axes("batch", "length")
  vocabulary = tuple(axis for axis in now.axes("vocab") if axis not in tokens)
  embedding = tuple(axis for axis in now.axes("embed") if axis in tokens)
  return Split(tokens, vocabulary, embedding)


def _label_losses(scores_BRC: jax.Array, labels_BR: jax.Array) -> jax.Array:
  """Returns the cross entropy of each label, BR, in nats; -1 counts as class 0."""
  log_p_BRC = jax.nn.log_softmax(scores_BRC)
  at_BR1 = jnp.maximum(labels_BR, 0)[:, :, None]
  return -jnp.take_along_axis(log_p_BRC, at_BR1, axis=2)[:, :, 0]


def _pair_losses(
  model: Transformer, x_BLD: jax.Array, batch: dict[str, jax.Array]
) -> jax.Array | None:
  """Returns the cross entropy of the pair labels, B, in nats; 0 where they are -1."""
  if model.pair_head is None or "pair_labels" not in batch:
    return None
  labels_B1 = batch["pair_labels"]
  x_BD = pool(x_BLD, batch["segment_ids"], "first")
  scores_BC = model.pair_head.classify(model.pair_head.transform(x_BD))
  nats_B1 = _label_losses(scores_BC[:, None], labels_B1)
  return jnp.sum(jnp.where(labels_B1 >= 0, nats_B1, 0.0), axis=1)


def count_predicted(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns how many predictions a batch asks for, by task, and its tokens.

  Each is at least 1, so that nothing is divided by 0.
  """
  main = "targets" if "targets" in batch else "labels"
  lowest = {
    "main": (main, 0),
    "pairs": ("pair_labels", 0),
    "tokens": ("segment_ids", 1),
  }
  return {
    name: jnp.maximum(jnp.sum(batch[key] >= low), 1).astype(jnp.float32)
    for name, (key, low) in lowest.items()
    if key in batch
  }


def summed_loss(
  model: Transformer,
  batch: dict[str, jax.Array],
  counts: dict[str, jax.Array],
  z_loss: float,
  earlier_load: jax.Array | float = 0.0,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the part of the step's mean loss that a micro-batch contributes.

  Args:
    counts: `count_predicted` of the step's whole batch.
    earlier_load: the sum of "expert_load" of the step's earlier micro-batches.
  Returns:
    (loss to differentiate: z-loss, pair loss and routing included; metrics: "loss" is
    cross entropy alone, in nats per prediction). All add up over micro-batches.
  """
  result = losses(model, batch, z_loss, 1 / counts["main"], dropout_key)
  total, metrics = result.total, {"loss": jnp.sum(result.nats) / counts["main"]}
  if result.pair_nats is not None:
    metrics["pair_loss"] = jnp.sum(result.pair_nats) / counts["pairs"]
    total += metrics["pair_loss"]
  if result.routing is not None:
    metrics["expert_load"] = result.routing.load_E
    seen_SE = earlier_load + result.routing.load_E
    total += routing_loss(result.routing, seen_SE, counts["tokens"], model.config.moe)
    metrics["dropped"] = jnp.sum(result.routing.dropped)
  return total, metrics
