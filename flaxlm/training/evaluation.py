"""Held-out loss, exactly: sums per row on the device, added in order on the host."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.training.objectives import token_losses


def make_eval_step(chunk_size: int) -> Callable:
  """Returns `step(model, batch)` -> (nats, predicted tokens) of each row, float32 B."""

  def step(model, batch):
    loss_BL, _, predicted_BL = token_losses(model, batch, 0.0, chunk_size)
    return jnp.sum(loss_BL, axis=1), jnp.sum(predicted_BL, axis=1)

  return step


def evaluate(
  model,
  batches: Iterable[dict[str, jax.Array]],
  eval_step: Callable,
  bytes_per_token: float,
  should_stop: Callable[[], bool] = lambda: False,
  on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float] | None:
  """Returns loss (nats/token), perplexity, bits_per_byte and tokens; None if stopped.

  Rows are added up in float64 in the order of the data, so that the layout of devices
  does not change the sum.

  Args:
    bytes_per_token: of text, per predicted token of the split.
    should_stop: asked after every batch.
  """
  nats, tokens = 0.0, 0.0
  for batch in batches:
    row_nats, row_tokens = jax.tree.map(gather, eval_step(model, batch))
    nats += float(np.sum(row_nats, dtype=np.float64))
    tokens += float(np.sum(row_tokens, dtype=np.float64))
    on_batch()
    if should_stop():
      return None
  return summarize(nats / max(tokens, 1.0), int(tokens), bytes_per_token)


def summarize(loss: float, tokens: int, bytes_per_token: float) -> dict[str, float]:
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": loss / math.log(2) / bytes_per_token,
    "tokens": tokens,
  }


def gather(x: jax.Array) -> np.ndarray:
  """The whole of an array that may be spread over hosts, on each of them."""
  if jax.process_count() == 1:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
