"""A trained model with its tokenizer: what commands, evaluations and users ask.

`flaxlm.load` makes one. Texts and ids go in as Python values and NumPy arrays come out:
the mesh, padding and compiled programs stay inside. What the model was not trained for
is refused by name.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError, DataError
from flaxlm.inference.decoding import round_up
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.sharding import use_mesh
from flaxlm.tokenizer.chat_template import ChatTemplate
from flaxlm.tokenizer.files import AnyTokenizer

_BATCH_TOKENS = 2048  # in a compiled call over several texts, padding included


class Likelihood(NamedTuple):
  """How likely a continuation is after its context."""

  log_p: float  # the sum over its tokens, in nats
  is_greedy: bool  # each token is the likeliest; of equals, that of the lowest id
  tokens: int


@dataclasses.dataclass
class LanguageModel:
  """What `flaxlm.load` returns.

  Args:
    mesh, rules: where the weights are, for programs that use them.
    labels: the names of the classes, by number; () if the model has none.
    step: of the checkpoint; None for Hugging Face files.
  """

  model: Transformer
  tokenizer: AnyTokenizer | None
  mesh: jax.sharding.Mesh
  rules: dict
  template: ChatTemplate | None = None
  labels: tuple[str, ...] = ()
  step: int | None = None

  @property
  def config(self) -> TransformerConfig:
    """The shape of the model."""
    return self.model.config

  def encode(self, text: str, specials: bool = False) -> list[int]:
    """Returns the ids of a text alone: nothing is put before or after it.

    Args:
      specials: the name of a special token in the text is that token, not text.
    """
    return self._tokenizer().encode(text, specials)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; special tokens have none."""
    return self._tokenizer().decode(ids)

  def logits(self, ids: Sequence[int]) -> np.ndarray:
    """Returns the scores of every id at every position, float32 LV.

    V counts all rows of the model's vocabulary, as in training and in transformers; it
    may be more than the tokenizer has.

    Raises:
      ConfigError: the model predicts no tokens, or its context is shorter than `ids`.
    """
    self._require(
      "logits", self.config.head in ("lm", "mlm"), "one that predicts tokens"
    )
    ids = self._check_ids(ids)
    with self._on_mesh():
      batch = _pad([ids], self._padded(len(ids)))
      logits_LV = _logits(self.model, *batch)[0]
    return np.asarray(logits_LV)[: len(ids)]

  def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """Returns how likely each (context, continuation) is; see `encode_pair`.

    A pair that is longer than the model's context loses the beginning of its context.

    Raises:
      ConfigError: the model is not causal, or a continuation alone is too long.
    """
    self._require_causal("loglikelihood")
    return self.score([self.encode_pair(*pair) for pair in pairs])

  def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of what follows it, which may not be empty.

    The two are encoded together. Spaces at the end of the context belong to the
    continuation, as in lm-eval. If one token spans the whole continuation and the end
    of the context, the two are encoded apart. An empty context is the token that begins
    a text, or else the one that ends it.

    Raises:
      DataError: the continuation has no tokens.
    """
    tokenizer, text = self._tokenizer(), context + continuation
    context = context.rstrip()
    whole, before = tokenizer.encode(text), tokenizer.encode(context)
    first, after = whole[: len(before)], whole[len(before) :]
    if not after:
      first, after = before, tokenizer.encode(text[len(context) :])
    if not after:
      raise DataError("a continuation has no tokens", f"{continuation!r:.60}", "a text")
    begin = tokenizer.bos_id if tokenizer.bos_id >= 0 or first else tokenizer.eos_id
    return [begin] * (begin >= 0) + first, after

  def score(
    self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
  ) -> list[Likelihood]:
    """Returns how likely the ids of each continuation are after those of its context.

    Raises:
      ConfigError: the model is not causal, an id is not in its vocabulary, a context is
        empty, or a continuation is longer than the model's context.
    """
    self._require_causal("score")
    longest, rows = self.config.max_len, []
    for context, continuation in pairs:
      if not len(context) or not 0 < len(continuation) <= longest:
        given = f"{len(context)} and {len(continuation)} tokens"
        needed = f"1 or more in the context, 1 to {longest} in the continuation"
        raise ConfigError("a pair", given, needed)
      ids = np.array([*context, *continuation], np.int32)[-longest - 1 :]
      rows.append((self._check_ids(ids, longest + 1), len(continuation)))
    found: list[Likelihood | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    with self._on_mesh():
      for group in _groups(order, [self._padded(len(ids) - 1) for ids, _ in rows]):
        for i, likelihood in zip(
          group, self._score_batch([rows[i] for i in group]), strict=True
        ):
          found[i] = likelihood
    return found

  def _score_batch(self, rows: list[tuple[np.ndarray, int]]) -> list[Likelihood]:
    """Scores the last tokens of each row in one call; rows are (ids, how many)."""
    length = self._padded(max(len(ids) for ids, _ in rows) - 1)
    counts = [count for _, count in rows]
    places = np.zeros(round_up(sum(counts)), np.int32)  # in the flattened batch
    targets = np.zeros(len(places), np.int32)
    ends = np.cumsum(counts)
    for row, ((ids, count), end) in enumerate(zip(rows, ends, strict=True)):
      first = row * length + len(ids) - 1 - count
      places[end - count : end] = np.arange(first, first + count)
      targets[end - count : end] = ids[-count:]
    batch = _pad([ids[:-1] for ids, _ in rows], length, round_up(len(rows)))
    log_p, likeliest = _score_tokens(self.model, *batch, places, targets)
    log_p = np.split(np.asarray(log_p, np.float64)[: ends[-1]], ends[:-1])
    is_best = np.split((np.asarray(likeliest) == targets)[: ends[-1]], ends[:-1])
    return [
      Likelihood(float(p.sum()), bool(best.all()), len(p))
      for p, best in zip(log_p, is_best, strict=True)
    ]

  # What the methods share --------------------------------------------------------

  def _on_mesh(self):
    return use_mesh(self.mesh, self.rules)

  def _padded(self, length: int) -> int:
    """Returns the length of the rows that hold so many tokens: few are compiled."""
    return max(length, min(max(round_up(length), 16), self.config.max_len))

  def _tokenizer(self) -> AnyTokenizer:
    if self.tokenizer is None:
      raise ConfigError("a text", "a model without a tokenizer", "ids", "logits(ids)")
    return self.tokenizer

  def _check_ids(self, ids: Sequence[int], most: int = 0) -> np.ndarray:
    """Returns the ids as an array, if the model takes them."""
    ids, most = np.asarray(ids), most or self.config.max_len
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 0 < len(ids) <= most:
      given = f"an array of {ids.dtype}, {list(ids.shape)}"
      raise ConfigError("ids", given, f"1 to {most} ids: the context of this model")
    if not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
      needed = f"ids in 0..{self.config.vocab_size - 1}"
      raise ConfigError("ids", f"{ids.min()}..{ids.max()}", needed)
    return ids.astype(np.int32)

  def _require_causal(self, method: str, hint: str = "") -> None:
    is_causal = self.config.causal and self.config.head == "lm"
    self._require(method, is_causal, "a causal language model (model.head=lm)", hint)

  def _require(self, method: str, can: bool, needed: str, hint: str = "") -> None:
    """Raises ConfigError, with what this model is, unless it `can` do what is asked."""
    if not can:
      kind = "a causal model" if self.config.causal else "an encoder"
      given = f"{kind} with model.head={self.config.head}"
      raise ConfigError(method, given, needed, hint)


def _groups(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
  """Yields the rows, which are in order of length, as batches for one call each."""
  for length, same in itertools.groupby(order, lambda i: lengths[i]):
    rows, size = list(same), max(_BATCH_TOKENS // length, 1)
    yield from (rows[i : i + size] for i in range(0, len(rows), size))


def _pad(rows: Sequence[Sequence[int]], length: int, size: int = 0):
  """Returns (tokens, segment ids), int32 BL: padding is segment 0, and 0s.

  Args:
    size: of the batch; 0 is as many as there are rows.
  """
  tokens_BL = np.zeros((size or len(rows), length), np.int32)
  segment_ids_BL = np.zeros_like(tokens_BL)
  for i, row in enumerate(rows):
    tokens_BL[i, : len(row)] = row
    segment_ids_BL[i, : len(row)] = 1
  return tokens_BL, segment_ids_BL


def _features(model: Transformer, tokens_BL, segment_ids_BL, token_types_BL=None):
  positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
  out = model(tokens_BL, positions_BL, segment_ids_BL, token_types_BL=token_types_BL)
  return out.features


@jax.jit
def _logits(model: Transformer, tokens_BL, segment_ids_BL):
  return model.logits(_features(model, tokens_BL, segment_ids_BL))


@jax.jit
def _score_tokens(model: Transformer, tokens_BL, segment_ids_BL, places_T, targets_T):
  """Returns (log p of the targets, likeliest ids), T, at places of the flat batch."""
  x_BLD = _features(model, tokens_BL, segment_ids_BL)
  x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])[places_T]  # before the output matrix
  logits_TV = model.logits(x_TD[None])[0]
  log_p_TV = jax.nn.log_softmax(logits_TV)
  log_p_T = jnp.take_along_axis(log_p_TV, targets_T[:, None], axis=1)[:, 0]
  return log_p_T, jnp.argmax(logits_TV, axis=1)
