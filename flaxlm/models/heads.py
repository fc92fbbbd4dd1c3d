"""The heads on top of the transformer: masked tokens, classification, spans.

All are one module: an optional dense layer with activation and norm, then scores of the
vocabulary or of labels. BERT's "pooler" and ModernBERT's "head" are that dense layer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import (
  add_bias,
  bias,
  find_activation,
  make_norm,
  project,
  weight,
)

_MAX_ANSWER = 30  # tokens in an extracted answer (as Devlin et al. 2018)


class Head(nnx.Module):
  """Maps features D to scores: of the vocabulary by the tied table (mlm), or of labels.

  With num_labels=0 it stops before the scores: a bare encoder whose pooler is kept.
  """

  def __init__(
    self,
    config: TransformerConfig,
    rngs: nnx.Rngs,
    num_labels: int,
    dense: bool,
    norm: bool,
    activation: str,
    vocabulary: bool = False,
  ):
    D, C = config.embed_dim, num_labels
    self.activation = activation
    self.dense = weight(rngs, (D, D), ("embed", None)) if dense else None
    self.dense_bias = bias((D,), ("norm",)) if dense and config.use_bias else None
    self.norm = make_norm(config) if norm else None
    self.vocab_bias = bias((config.vocab_size,), ("vocab",)) if vocabulary else None
    self.classifier = weight(rngs, (D, C), ("embed", None)) if C else None
    self.classifier_bias = bias((C,), (None,)) if C else None

  def transform(self, x: jax.Array) -> jax.Array:
    """Applies the dense layer and the norm, if any, to the last dimension."""
    if self.dense is not None:
      x = add_bias(project(x, self.dense), self.dense_bias)
      x = find_activation(self.activation)(x)
    return x if self.norm is None else self.norm(x)

  def classify(self, x: jax.Array) -> jax.Array:
    """Returns the scores of the labels in float32, from features of any rank."""
    weight_DC = self.classifier[...].astype(x.dtype)
    scores = jnp.einsum(
      "...D,DC->...C", x, weight_DC, preferred_element_type=jnp.float32
    )
    return add_bias(scores, self.classifier_bias)


def make_head(config: TransformerConfig, rngs: nnx.Rngs) -> Head | None:
  """Returns the head that the config names; None for lm, which has no weights."""
  if config.head == "lm":
    return None
  elif config.head == "mlm":
    return Head(config, rngs, 0, True, True, config.head_activation, vocabulary=True)
  elif config.head == "span":
    num_labels = 2
  elif config.head == "choice":
    num_labels = 1
  elif config.head in ("sequence", "token"):
    num_labels = config.num_labels
  else:
    needed = "lm, mlm, sequence, token, span or choice"
    raise ConfigError("config.model.head", config.head, needed)
  dense, norm = config.head_dense, config.head_norm
  return Head(config, rngs, num_labels, dense, norm, config.head_activation)


def pool(x_BLD: jax.Array, segment_ids_BL: jax.Array, how: str) -> jax.Array:
  """Returns one vector BD for each row's text, which is segment 1.

  Args:
    how: first | mean | last.
  """
  is_text_BL = segment_ids_BL == 1
  if how == "mean":
    weight_BL = is_text_BL.astype(jnp.float32)
    total_BD = jnp.einsum("BLD,BL->BD", x_BLD.astype(jnp.float32), weight_BL)
    count_B = jnp.maximum(jnp.sum(weight_BL, axis=1), 1.0)
    return (total_BD / count_B[:, None]).astype(x_BLD.dtype)
  elif how == "first":
    at_B = jnp.argmax(is_text_BL, axis=1)
  elif how == "last":
    L = is_text_BL.shape[1]
    at_B = L - 1 - jnp.argmax(is_text_BL[:, ::-1], axis=1)
  else:
    raise ConfigError("config.model.pooling", how, "first, mean or last")
  return jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)[:, 0]


def label_scores(model, x_BLD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """Returns the scores of a classifying head in float32, BRC, for labels BR.

  sequence: R = 1. token: R = L. choice: R = 1, with C options, which begin at `starts`
  (-1: no such option). span: R = 2 (start and end), C = L.
  """
  head, kind = model.head, model.config.head
  if kind == "token":
    return head.classify(head.transform(x_BLD))
  elif kind == "span":
    scores_BLR = head.classify(head.transform(x_BLD))
    inside_BL = batch["segment_ids"] == 1
    scores_BLR = jnp.where(inside_BL[:, :, None], scores_BLR, -1e30)
    return jnp.swapaxes(scores_BLR, 1, 2)
  elif kind == "choice":
    starts_BC = batch["starts"]
    x_BCD = jnp.take_along_axis(x_BLD, jnp.maximum(starts_BC, 0)[:, :, None], axis=1)
    scores_BC = head.classify(head.transform(x_BCD))[:, :, 0]
    return jnp.where(starts_BC >= 0, scores_BC, -1e30)[:, None]
  elif kind == "sequence":
    x_BD = pool(x_BLD, batch["segment_ids"], model.config.pooling)
    return head.classify(head.transform(x_BD))[:, None]
  else:
    raise ConfigError("config.model.head", kind, "sequence, token, span or choice")


def best_spans(
  scores_B2L: jax.Array, token_types_BL: jax.Array, max_answer: int = _MAX_ANSWER
) -> tuple[jax.Array, jax.Array]:
  """Finds the most likely answer in each row, which is a window of a context.

  A span lies in the text of type 1, without the token that ends that text, and has at
  most `max_answer` tokens. Spans l..l+d are tried for one d after another: L x
  `max_answer` sums, not L x L.

  Args:
    scores_B2L: how likely each column is the answer's first, and its last.
  Returns:
    (columns B2, int32; scores B2, float32: of the span, and of column 0, "no answer").
    If no span is possible, the columns are 0 and the score is -inf.
  """
  L = scores_B2L.shape[2]
  inside_BL = token_types_BL == 1
  inside_BL &= jnp.roll(inside_BL, -1, axis=1).at[:, -1].set(False)
  first_BL, last_BL = jnp.where(inside_BL[:, None], scores_B2L, -jnp.inf).swapaxes(0, 1)

  def try_length(best, d):
    # The score of the last column, for each first column; -inf beyond L.
    ends_BL = jnp.where(jnp.arange(L)[None] < L - d, jnp.roll(last_BL, -d, 1), -jnp.inf)
    total_BL = first_BL + ends_BL
    at_B = jnp.argmax(total_BL, axis=1)
    score_B = jnp.max(total_BL, axis=1)
    better_B = score_B > best[0]
    found_B2 = jnp.stack([at_B, at_B + d], axis=1)
    spans_B2 = jnp.where(better_B[:, None], found_B2, best[1])
    return (jnp.where(better_B, score_B, best[0]), spans_B2.astype(jnp.int32)), None

  none_B = jnp.full(scores_B2L.shape[0], -jnp.inf, scores_B2L.dtype)
  start = none_B, jnp.zeros((scores_B2L.shape[0], 2), jnp.int32)
  lengths = jnp.arange(min(max_answer, L))
  (score_B, spans_B2), _ = jax.lax.scan(try_length, start, lengths)
  no_answer_B = scores_B2L[:, 0, 0] + scores_B2L[:, 1, 0]
  return spans_B2, jnp.stack([score_B, no_answer_B], axis=1).astype(jnp.float32)
