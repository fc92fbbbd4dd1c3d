"""What stands on top of the transformer: masked-token, classification and span heads.

All are one module: perhaps a dense layer with activation and norm, then scores of the
vocabulary or of the labels. BERT's "pooler" is that layer, and ModernBERT's "head" too.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.models.layers import (
  ACTIVATIONS,
  TransformerConfig,
  add_bias,
  bias,
  make_norm,
  project,
  weight,
)


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
