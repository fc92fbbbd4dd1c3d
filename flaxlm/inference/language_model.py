"""A trained model with its tokenizer: what commands, evaluations and users ask.

`flaxlm.load` makes one. Texts and ids go in as Python values and NumPy arrays come out:
the mesh, padding and compiled programs stay inside. What the model was not trained for
is refused by name.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.data.tasks.encode import lay_out_texts, text_frame
from flaxlm.errors import ConfigError, DataError
from flaxlm.inference.decoding import for_decoding, round_up
from flaxlm.inference.sampling import Sampling
from flaxlm.inference.text import (
  Writing,
  beginning,
  end_of_turn,
  text_ids,
  tokenize_prompt,
)
from flaxlm.models.config import TransformerConfig
from flaxlm.models.heads import label_scores, pool
from flaxlm.models.moe import without_capacity
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.sharding import use_mesh
from flaxlm.tokenizer.chat_template import ChatTemplate, encode_prompt
from flaxlm.tokenizer.files import AnyTokenizer

_BATCH_TEXTS = 16  # that are written at once
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
    end_ids: that end a text, besides the tokenizer's.

  The first text that is written turns `model` into the form of `for_decoding`.
  """

  model: Transformer
  tokenizer: AnyTokenizer | None
  mesh: jax.sharding.Mesh
  rules: dict
  template: ChatTemplate | None = None
  labels: tuple[str, ...] = ()
  step: int | None = None
  end_ids: tuple[int, ...] = ()

  def __post_init__(self):
    self.model = without_capacity(self.model)

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
      logits_LV = _logits(self.model, *batch, None)[0]
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
    documents, or else the one that ends them.

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
    first = beginning(tokenizer) + first
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i >= 0]
    return first or ends[:1], after

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
    with self._on_mesh():
      for group, length in self._groups([len(ids) - 1 for ids, _ in rows]):
        scores = self._score_batch([rows[i] for i in group], length)
        for i, likelihood in zip(group, scores, strict=True):
          found[i] = likelihood
    return found

  def _score_batch(
    self, rows: list[tuple[np.ndarray, int]], length: int
  ) -> list[Likelihood]:
    """Scores the last tokens of each row in one call; rows are (ids, how many)."""
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

  def generate(self, prompts: Sequence[str | Sequence[int]], **options) -> list[str]:
    """Returns what the model writes after each prompt, which is not repeated.

    Args:
      options: those of `stream`.
    """
    texts: list[str] = []
    for first in range(0, len(prompts), _BATCH_TEXTS):
      group = prompts[first : first + _BATCH_TEXTS]
      pieces = self.stream(group, first_index=first, **options)
      texts += map("".join, zip(*pieces, strict=True))
    return texts

  def stream(
    self,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    end_ids: Sequence[int] = (),
    when_full: str = "stop",
    specials: bool = False,
    begins: bool = False,
    first_index: int = 0,
  ) -> Writing:
    """Returns an iterator over what is new of each text; see `Writing`.

    Args:
      prompts: texts, which the model continues; or ids, which are taken as they are.
      max_tokens: new tokens per text.
      temperature: 0 takes the likeliest token.
      top_k: only among the k likeliest; 0 is all.
      top_p: only among the likeliest that together have this probability.
      seed: of the random choices.
      stop: texts at which writing ends; they are not part of the result.
      end_ids: tokens at which it ends, besides those of the model.
      when_full: when prompt and text fill the context: "stop", or "continue" from the
        last half.
      specials: the name of a special token in a prompt is that token, not text.
      begins: the texts begin after the prompts, as answers do, and continue none: a
        space that the tokenizer puts before every text is left out.
      first_index: of the texts: equal prompts differ in it.
    Raises:
      ConfigError: the model is not causal, or an argument cannot be used.
    """
    self._require_causal("generate", self._instead_of_generate())
    tokenizer = self._tokenizer()
    if isinstance(prompts, str):
      raise ConfigError("prompts", f"{prompts!r:.60}", "a list of texts", "[prompt]")
    rows = [
      tokenize_prompt(tokenizer, prompt, specials)
      if isinstance(prompt, str)
      else self._check_ids(prompt, len(prompt)).tolist()
      for prompt in prompts
    ]
    sampling = Sampling(temperature, top_k, top_p, seed)
    self.model = for_decoding(self.model)
    return Writing(
      self.model,
      tokenizer,
      rows,
      max_tokens,
      [dataclasses.replace(sampling, index=first_index + i) for i in range(len(rows))],
      (*self.end_ids, *end_ids),
      _as_texts(stop),
      when_full,
      begins,
    )

  def chat(self, messages: list[dict[str, str]], **options) -> str:
    """Returns the assistant's answer to a conversation.

    Args:
      messages: dicts with the texts role and content.
      options: those of `chat_stream`.
    """
    return "".join(new for (new,) in self.chat_stream(messages, **options))

  def chat_stream(self, messages: list[dict[str, str]], **options) -> Writing:
    """Returns an iterator over what is new of the answer, in lists of one text.

    Args:
      options: those of `stream`; max_tokens is the length of the context by default.
        With when_full="continue", a conversation that fills the context loses its
        oldest turns, but not what the system says.
    Raises:
      ConfigError: the model has no chat template, or as `stream`.
      DataError: the messages are malformed, or the template refuses them.
    """
    if self.template is None:
      needed = "a model with a chat template"
      raise ConfigError("chat", "a model without one", needed, "generate(prompts)")
    tokenizer = self._tokenizer()
    ids = encode_prompt(messages, tokenizer, self.template)
    if len(ids) >= self.config.max_len and options.get("when_full") == "continue":
      ids = self._forget_oldest(messages)
    end_ids, stop = end_of_turn(tokenizer, self.template)
    options = {"max_tokens": self.config.max_len, "stop": ()} | options
    options["stop"] = (*_as_texts(options["stop"]), *stop)
    return self.stream([ids], end_ids=end_ids, begins=True, **options)

  def _forget_oldest(self, messages: list[dict[str, str]]) -> np.ndarray:
    """Returns the ids of what fits half of the context: the last turns, or one."""
    kept = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    while True:
      ids = encode_prompt(kept + turns, self._tokenizer(), self.template)
      if len(ids) <= self.config.max_len // 2 or len(turns) < 3:
        return ids
      turns = turns[2:]

  def embed(self, texts: Sequence[str], pooling: str = "mean") -> np.ndarray:
    """Returns a vector per text, float32 ND, from the features after the last norm.

    The special tokens around a text are part of it, as in sentence-transformers.

    Args:
      pooling: mean | first | last, of the tokens.
    Raises:
      ConfigError: a text is longer than the model's context.
    """
    rows = [self._framed(text) for text in texts]
    found = self._run_batches(rows, lambda *batch: _embed(*batch, pooling))
    return (
      np.stack(found) if found else np.zeros((0, self.config.embed_dim), np.float32)
    )

  def fill_mask(self, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
    """Returns the likeliest tokens, with probabilities, for each mask in a text.

    Names of special tokens in the text are those tokens; at least one is the mask.

    Raises:
      ConfigError: the model fills no masks, there is no mask in the text, or the text
        is longer than the model's context.
    """
    self._require("fill_mask", self.config.head == "mlm", "one with model.head=mlm")
    tokenizer = self._tokenizer()
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    if tokenizer.mask_id < 0 or names[tokenizer.mask_id] not in text:
      needed = f"{names.get(tokenizer.mask_id, 'a mask token')} in the text"
      raise ConfigError("fill_mask", f"{text!r:.60}", needed)
    ids, types = self._framed(text, specials=True)
    (logits_LV,) = self._run_batches([(ids, types)], _logits)
    is_text_V = text_ids(tokenizer, self.config.vocab_size)
    found = []
    for row_V in logits_LV[: len(ids)][ids == tokenizer.mask_id]:
      p_V = np.exp(row_V - row_V.max(), dtype=np.float64)
      p_V = np.where(is_text_V, p_V / p_V.sum(), 0)
      best = np.argsort(-p_V, kind="stable")[:top_k].tolist()
      found.append([(tokenizer.decode([i]).strip(), float(p_V[i])) for i in best])
    return found

  def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, float]]:
    """Returns the probability of each class, by name, for each text or pair of texts.

    Raises:
      ConfigError: the model has no classes of texts, or a text is longer than its
        context.
    """
    self._require(
      "classify", self.config.head == "sequence", "one of model.head=sequence"
    )
    pairs = [(text,) if isinstance(text, str) else text for text in texts]
    found = self._run_batches([self._framed(*pair) for pair in pairs], _classify)
    names = self.labels or tuple(map(str, range(self.config.num_labels)))
    return [dict(zip(names, p_C.tolist(), strict=True)) for p_C in found]

  # What the methods share --------------------------------------------------------

  def _on_mesh(self):
    return use_mesh(self.mesh, self.rules)

  def _padded(self, length: int) -> int:
    """Returns the length of the rows that hold so many tokens: few are compiled."""
    return max(length, min(max(round_up(length), 16), self.config.max_len))

  def _framed(self, text: str, second: str | None = None, specials: bool = False):
    """Returns (ids, token types) of one text or two, inside special tokens."""
    tokenizer = self._tokenizer()
    texts = (text,) if second is None else (text, second)
    given = [tokenizer.encode(text, specials) for text in texts]
    ids, types = lay_out_texts(text_frame(tokenizer, self.config.causal), *given)
    if len(ids) > self.config.max_len:
      needed = f"at most {self.config.max_len}, special tokens included"
      raise ConfigError("a text", f"{len(ids)} tokens: {text!r:.60}", needed)
    return self._check_ids(ids), types

  def _run_batches(self, rows: list[tuple], function: Callable) -> list[np.ndarray]:
    """Returns `function(model, tokens, segment ids, types)` of each row, an array.

    Args:
      rows: (ids, token types) of each text.
    """
    found: list[np.ndarray | None] = [None] * len(rows)
    with self._on_mesh():
      for group, length in self._groups([len(ids) for ids, _ in rows]):
        ids, types = zip(*(rows[i] for i in group), strict=True)
        size = round_up(len(group))
        types_BL, _ = _pad(types, length, size)
        types_BL = types_BL if self.config.num_segment_types else None
        out = np.asarray(function(self.model, *_pad(ids, length, size), types_BL))
        for i, row in zip(group, out, strict=False):  # the rest is padding
          found[i] = row
    return found

  def _groups(self, lengths: list[int]) -> Iterator[tuple[list[int], int]]:
    """Yields (numbers of the rows, padded length) of batches for one call each."""
    padded = [self._padded(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: padded[i])
    for length, same in itertools.groupby(order, lambda i: padded[i]):
      rows, size = list(same), max(_BATCH_TOKENS // length, 1)
      yield from ((rows[i : i + size], length) for i in range(0, len(rows), size))

  def _instead_of_generate(self) -> str:
    if self.config.head == "mlm":
      return "fill_mask(text) or embed(texts)"
    elif self.config.head == "sequence":
      return "classify(texts) or embed(texts)"
    else:
      return "embed(texts)"

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


def _as_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
  return (stop,) if isinstance(stop, str) else tuple(stop)


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
  positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
  out = model(tokens_BL, positions_BL, segment_ids_BL, token_types_BL=token_types_BL)
  return out.features


@jax.jit
def _logits(model: Transformer, tokens_BL, segment_ids_BL, token_types_BL):
  return model.logits(_features(model, tokens_BL, segment_ids_BL, token_types_BL))


@functools.partial(jax.jit, static_argnames="pooling")
def _embed(model: Transformer, tokens_BL, segment_ids_BL, token_types_BL, pooling):
  x_BLD = _features(model, tokens_BL, segment_ids_BL, token_types_BL)
  return pool(x_BLD, segment_ids_BL, pooling).astype(jnp.float32)


@jax.jit
def _classify(model: Transformer, tokens_BL, segment_ids_BL, token_types_BL):
  x_BLD = _features(model, tokens_BL, segment_ids_BL, token_types_BL)
  scores_BRC = label_scores(model, x_BLD, {"segment_ids": segment_ids_BL})
  return jax.nn.softmax(scores_BRC[:, 0])


@jax.jit
def _score_tokens(model: Transformer, tokens_BL, segment_ids_BL, places_T, targets_T):
  """Returns (log p of the targets, likeliest ids), T, at places of the flat batch."""
  x_BLD = _features(model, tokens_BL, segment_ids_BL)
  x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])[places_T]  # before the output matrix
  logits_TV = model.logits(x_TD[None])[0]
  log_p_TV = jax.nn.log_softmax(logits_TV)
  log_p_T = jnp.take_along_axis(log_p_TV, targets_T[:, None], axis=1)[:, 0]
  return log_p_T, jnp.argmax(logits_TV, axis=1)
