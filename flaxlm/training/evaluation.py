"""The held-out loss: summed per row on the devices, then in float64 on the host.

Rows are added in the order of the data, so the layout of devices does not change the
result.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.models.transformer import Transformer
from flaxlm.training.losses import losses


def make_eval_step() -> Callable:
  """Returns `step(model, batch) -> (nats B, number of predictions B, choices)`.

  See `Losses.choices`.
  """

  def step(model, batch):
    result = losses(model, batch)
    nats_B, predicted_B = jnp.sum(result.nats, axis=1), jnp.sum(result.predicted, 1)
    return nats_B, predicted_B, result.choices

  return step


def evaluate(
  model: Transformer,
  batches: Iterable[dict[str, jax.Array]],
  eval_step: Callable,
  bytes_per_token: float | None,
  should_stop: Callable[[], bool] = lambda: False,
  on_batch: Callable[[], None] = lambda: None,
  score: Callable[..., dict[str, float]] | None = None,
) -> dict[str, float] | None:
  """Returns loss (nats/token), perplexity, bits_per_byte and tokens; None if stopped.

  Args:
    bytes_per_token: bytes of text per predicted token; None where not all of the text
      is predicted, so that bits per byte would mean nothing.
    should_stop: called after every batch.
    on_batch: called after every batch.
    score: (chosen labels NR, scores of spans N2 or None) -> further metrics.
  """
  nats, tokens, choices = 0.0, 0.0, []
  for batch in batches:
    row_nats, row_tokens, chosen = jax.tree.map(_gather, eval_step(model, batch))
    nats += float(np.sum(row_nats, dtype=np.float64))
    tokens += float(np.sum(row_tokens, dtype=np.float64))
    choices.append(chosen)
    on_batch()
    if should_stop():
      return None
  result = _summarize(nats / max(tokens, 1.0), int(tokens), bytes_per_token)
  if score is not None:
    del result["perplexity"]  # of tokens, not of labels
    result |= score(*jax.tree.map(lambda *parts: np.concatenate(parts), *choices))
  return result


def _summarize(
  loss: float, tokens: int, bytes_per_token: float | None
) -> dict[str, float]:
  result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
  if bytes_per_token is not None:
    result["bits_per_byte"] = loss / math.log(2) / bytes_per_token
  return result | {"tokens": tokens}


def _gather(x: jax.Array) -> np.ndarray:
  """Returns the whole array on each host, though it may be spread over hosts."""
  if jax.process_count() == 1:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
