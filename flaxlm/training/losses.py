"""What the model is asked to predict, as a sum of losses over a batch.

A batch marks the positions to predict: `targets_BL` holds the right token there and -1
everywhere else; `labels_BR` does the same for classes. Sums, not means: micro-batches,
rows and hosts then add up exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.kernels.cross_entropy import Split, linear_cross_entropy
from flaxlm.models.heads import best_spans, label_scores, pool
from flaxlm.models.moe import Routing
from flaxlm.models.transformer import Output
from flaxlm.parallel.sharding import current_layout, join_rows, split_rows


class Losses(NamedTuple):
  total: jax.Array  # sum of cross entropy and z-loss, scaled: the one to differentiate
  nats: jax.Array  # cross entropy where something is predicted, else 0; float32 BR
  predicted: jax.Array  # 1 where something is predicted
  choices: (
    tuple | None
  )  # (likeliest labels BR, scores of spans B2 or None); words: None
  pair_nats: jax.Array | None  # of the second task on sentence pairs, B
  routing: Routing | None  # of the experts


def run_model(model, batch: dict[str, jax.Array], dropout_key=None) -> Output:
  return model(
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
    token_types_BL=batch.get("token_types"),
    prefix_BL=batch.get("prefix"),
    dropout_key=dropout_key,
  )


def losses(
  model,
  batch: dict[str, jax.Array],
  z_loss: float = 0.0,
  scale: jax.Array | float = 1.0,
  dropout_key: jax.Array | None = None,
) -> Losses:
  """Returns the losses of each position, or label, of a batch, and `scale` x their sum.

  The scale of the loss comes first, as its gradient is made together with it.
  """
  out = run_model(model, batch, dropout_key)
  pair_nats_B = pair_losses(model, out.features, batch)
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
      split=split_of_loss(),
    )
    nats = split_rows(nats_T, targets_BL.shape[0]) * predicted
  else:
    scores_BRC, labels_BR = label_scores(model, out.features, batch), batch["labels"]
    predicted = (labels_BR >= 0).astype(jnp.float32)
    nats = label_losses(scores_BRC, labels_BR) * predicted
    total = scale * jnp.sum(nats)
    if model.config.head == "span":
      choices = best_spans(scores_BRC, batch["token_types"])
    else:
      choices = jnp.argmax(scores_BRC, axis=-1).astype(jnp.int32), None
  return Losses(total, nats, predicted, choices, pair_nats_B, out.routing)


def split_of_loss() -> Split:
  """Each device has its own tokens; their words are split by the axes that remain."""
  now = current_layout()
  if now is None:
    return Split()
  tokens = now.axes("batch", "length")
  words = tuple(axis for axis in now.axes("vocab") if axis not in tokens)
  return Split(tokens, words, tuple(a for a in now.axes("embed") if a in tokens))


def label_losses(scores_BRC: jax.Array, labels_BR: jax.Array) -> jax.Array:
  """Cross entropy of each label, in nats; label -1 counts as class 0."""
  log_p_BRC = jax.nn.log_softmax(scores_BRC)
  at_BR1 = jnp.maximum(labels_BR, 0)[:, :, None]
  return -jnp.take_along_axis(log_p_BRC, at_BR1, axis=2)[:, :, 0]


def pair_losses(model, x_BLD: jax.Array, batch) -> jax.Array | None:
  """Cross entropy of "does B follow A", in nats, B; rows with label -1 have 0."""
  if model.pair_head is None or "pair_labels" not in batch:
    return None
  labels_B1 = batch["pair_labels"]
  x_BD = pool(x_BLD, batch["segment_ids"], "first")
  scores_BC = model.pair_head.classify(model.pair_head.transform(x_BD))
  nats_B1 = label_losses(scores_BC[:, None], labels_B1)
  return jnp.sum(jnp.where(labels_B1 >= 0, nats_B1, 0.0), axis=1)


def count_predicted(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """How many predictions a batch asks for, to divide sums of losses by; at least 1."""
  main = "targets" if "targets" in batch else "labels"
  names = {"main": main, "pairs": "pair_labels"}
  return {
    name: jnp.maximum(jnp.sum(batch[key] >= 0), 1).astype(jnp.float32)
    for name, key in names.items()
    if key in batch
  }


def summed_loss(model, batch, counts, z_loss, share, dropout_key=None):
  """The part of the mean loss that `batch` contributes.

  Args:
    counts: of `count_predicted`, for the whole of the step's batch.
    share: of this micro-batch in the step, for what is a mean already.
  Returns:
    (loss to differentiate: z-loss, pair loss and routing included; metrics: "loss" is
    cross entropy alone, in nats; all of them add up over micro-batches).
  """
  result = losses(model, batch, z_loss, 1 / counts["main"], dropout_key)
  total, metrics = result.total, {"loss": jnp.sum(result.nats) / counts["main"]}
  if result.pair_nats is not None:
    metrics["pair_loss"] = jnp.sum(result.pair_nats) / counts["pairs"]
    total += metrics["pair_loss"]
  if result.routing is not None:
    total += share * jnp.sum(result.routing.loss)
    metrics["expert_load"] = result.routing.load_E
    metrics["dropped"] = jnp.sum(result.routing.dropped)
  return total, metrics
