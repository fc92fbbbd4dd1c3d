"""Held-out loss, exactly: sums per row on the device, added in order on the host."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.training.losses import losses


def make_eval_step() -> Callable:
  """Returns `step(model, batch)` -> (nats B, predictions made B, labels chosen).

  The last is `Losses.choices`: None where words are predicted.
  """

  def step(model, batch):
    result = losses(model, batch)
    nats_B, predicted_B = jnp.sum(result.nats, axis=1), jnp.sum(result.predicted, 1)
    return nats_B, predicted_B, result.choices

  return step


def evaluate(
  model,
  batches: Iterable[dict[str, jax.Array]],
  eval_step: Callable,
  bytes_per_token: float | None,
  should_stop: Callable[[], bool] = lambda: False,
  on_batch: Callable[[], None] = lambda: None,
  score: Callable[..., dict[str, float]] | None = None,
) -> dict[str, float] | None:
  """Returns loss (nats/token), perplexity, bits_per_byte and tokens; None if stopped.

  Rows are added up in float64 in the order of the data, so that the layout of devices
  does not change the sum.

  Args:
    bytes_per_token: of text, per predicted token of the split; None where not all of
      the text is predicted, so that bits per byte would mean nothing.
    should_stop: asked after every batch.
    score: turns the labels that were chosen, NR, and scores of spans, N2, into further
      numbers.
  """
  nats, tokens, choices = 0.0, 0.0, []
  for batch in batches:
    row_nats, row_tokens, chosen = jax.tree.map(gather_to_host, eval_step(model, batch))
    nats += float(np.sum(row_nats, dtype=np.float64))
    tokens += float(np.sum(row_tokens, dtype=np.float64))
    choices.append(chosen)
    on_batch()
    if should_stop():
      return None
  result = summarize_loss(nats / max(tokens, 1.0), int(tokens), bytes_per_token)
  if score is not None:
    del result["perplexity"]  # of words; labels have none
    result |= score(*jax.tree.map(lambda *parts: np.concatenate(parts), *choices))
  return result


def summarize_loss(
  loss: float, tokens: int, bytes_per_token: float | None
) -> dict[str, float]:
  result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
  if bytes_per_token is not None:
    result["bits_per_byte"] = loss / math.log(2) / bytes_per_token
  return result | {"tokens": tokens}


def gather_to_host(x: jax.Array) -> np.ndarray:
  """The whole of an array that may be spread over hosts, on each of them."""
  if jax.process_count() == 1:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
