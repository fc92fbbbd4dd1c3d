"""What stands on top of the transformer: masked-token, classification and span heads.

All are one module: perhaps a dense layer with activation and norm, then scores of the
vocabulary or of the labels. BERT's "pooler" is that layer, and ModernBERT's "head" too.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import ACTIVATIONS, add_bias, bias, make_norm, project, weight

MAX_ANSWER = 30  # tokens of an extracted answer (Devlin et al. 2018 use the same)


class Head(nnx.Module):
  """Features D to scores: of V words by the tied table (mlm), or of `num_labels`.

  num_labels 0 stops before the scores: an encoder whose pooler is kept for later.
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
    """The dense part, on the last dimension."""
    if self.dense is not None:
      x = add_bias(project(x, self.dense), self.dense_bias)
      x = ACTIVATIONS[self.activation](x)
    return x if self.norm is None else self.norm(x)

  def classify(self, x: jax.Array) -> jax.Array:
    """Scores of the labels, float32, from features of any rank."""
    weight_DC = self.classifier[...].astype(x.dtype)
    scores = jnp.einsum(
      "...D,DC->...C", x, weight_DC, preferred_element_type=jnp.float32
    )
    return add_bias(scores, self.classifier_bias)


def make_head(config: TransformerConfig, rngs: nnx.Rngs) -> Head | None:
  if config.head == "lm":
    return None
  if config.head == "mlm":
    return Head(config, rngs, 0, True, True, config.head_activation, vocabulary=True)
  labels = {"span": 2, "choice": 1}
  num_labels = labels.get(config.head, config.num_labels)
  dense, norm = config.head_dense, config.head_norm
  return Head(config, rngs, num_labels, dense, norm, config.head_activation)


def pool(x_BLD: jax.Array, segment_ids_BL: jax.Array, how: str) -> jax.Array:
  """One vector for each row's text, which is segment 1, as BD."""
  is_text_BL = segment_ids_BL == 1
  if how == "mean":
    weight_BL = is_text_BL.astype(jnp.float32)
    total_BD = jnp.einsum("BLD,BL->BD", x_BLD.astype(jnp.float32), weight_BL)
    count_B = jnp.maximum(jnp.sum(weight_BL, axis=1), 1.0)
    return (total_BD / count_B[:, None]).astype(x_BLD.dtype)
  if how == "first":
    at_B = jnp.argmax(is_text_BL, axis=1)
  else:
    L = is_text_BL.shape[1]
    at_B = L - 1 - jnp.argmax(is_text_BL[:, ::-1], axis=1)
  return jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)[:, 0]


def label_scores(model, x_BLD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """Scores of a head that classifies, float32 BRC, for labels BR.

  sequence: R = 1. token: R = L. choice: R = 1, C options, each of which begins at
  `starts_BC` (-1: no such option). span: R = 2 (start and end), C = L.
  """
  head, kind = model.head, model.config.head
  if kind == "token":
    return head.classify(head.transform(x_BLD))
  if kind == "span":
    scores_BLR = head.classify(head.transform(x_BLD))
    inside_BL = batch["segment_ids"] == 1
    scores_BLR = jnp.where(inside_BL[:, :, None], scores_BLR, -1e30)
    return jnp.swapaxes(scores_BLR, 1, 2)
  if kind == "choice":
    starts_BC = batch["starts"]
    x_BCD = jnp.take_along_axis(x_BLD, jnp.maximum(starts_BC, 0)[:, :, None], axis=1)
    scores_BC = head.classify(head.transform(x_BCD))[:, :, 0]
    return jnp.where(starts_BC >= 0, scores_BC, -1e30)[:, None]
  x_BD = pool(x_BLD, batch["segment_ids"], model.config.pooling)
  return head.classify(head.transform(x_BD))[:, None]


def best_spans(
  scores_B2L: jax.Array, token_types_BL: jax.Array, max_answer: int = MAX_ANSWER
) -> tuple[jax.Array, jax.Array]:
  """Finds the likeliest answer in each row; rows are windows of a context.

  A span lies in the text of type 1, without the token that ends it, is in order and has
  at most `max_answer` tokens. Span l..l+d is tried for one d after another: L x
  `max_answer` sums, not L x L.

  Args:
    scores_B2L: of each column to be the answer's first and last.
  Returns:
    (columns B2, int32; scores B2, float32: of the span, and of column 0, "no answer").
    Without any possible span the columns are 0 and the score is -inf.
  """
  L = scores_B2L.shape[2]
  inside_BL = token_types_BL == 1
  inside_BL &= jnp.roll(inside_BL, -1, axis=1).at[:, -1].set(False)
  first_BL, last_BL = jnp.where(inside_BL[:, None], scores_B2L, -jnp.inf).swapaxes(0, 1)

  def try_length(best, d):
    # The last column of a span of d + 1 tokens, for each first one; -inf beyond L.
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
