"""What is scored, as token ids: a context, and the continuation whose tokens count.

Context and continuation are encoded together, as a model sees text. Where one token
spans their join, they are encoded apart: the ids then still spell the text, and every
character of the continuation counts. Such pairs are counted.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flaxlm.errors import DataError
from flaxlm.inference.text import beginning
from flaxlm.tokenizer.files import AnyTokenizer
from flaxlm.tokenizer.pieces import continues_word


class ScoreRequest(NamedTuple):
  """Asks for log p(continuation | context)."""

  context: list[int]
  continuation: list[int]


class TextSegment(NamedTuple):
  """A text to run, and the predictions in it that count."""

  tokens: np.ndarray  # int32
  places: np.ndarray  # of the tokens whose features predict
  targets: np.ndarray  # the token to predict at each place


def empty_context(tokenizer: AnyTokenizer) -> list[int]:
  """Returns what the first token of a text is predicted from.

  That is what begins every text of this tokenizer, or else bos, or else eos.

  Raises:
    DataError: the tokenizer has none of these.
  """
  known = [[i] for i in (tokenizer.bos_id, tokenizer.eos_id) if i >= 0]
  first = next(filter(None, [beginning(tokenizer), *known]), None)
  if first is None:
    needed = "a token to predict the first one from"
    raise DataError(
      "a text without a context cannot be scored", "no bos, no eos", needed
    )
  return first


def with_prefix(tokenizer: AnyTokenizer, request: ScoreRequest) -> ScoreRequest:
  """Returns the request of a whole text for a causal model: nothing comes before it."""
  context = beginning(tokenizer) + request.context
  return request._replace(context=context or empty_context(tokenizer))


def encode_pairs(
  tokenizer: AnyTokenizer, pairs: Sequence[tuple[str, str]]
) -> tuple[list[ScoreRequest], int]:
  """Returns (the request of each pair, pairs in which a token spanned the join).

  Spaces at the end of a context belong to the continuation, as in lm-eval. Contexts may
  be empty.

  Raises:
    DataError: a continuation is empty.
  """
  moved, merged, requests = [], 0, []
  for context, continuation in pairs:
    stripped = context.rstrip()
    moved.append((stripped, context[len(stripped) :] + continuation))
  contexts = tokenizer.encode_batch([context for context, _ in moved])
  wholes = tokenizer.encode_batch([context + rest for context, rest in moved])
  for (text, rest), context, whole in zip(moved, contexts, wholes, strict=True):
    size = len(context)
    if len(whole) > size and np.array_equal(whole[:size], context):
      continuation = whole[size:].tolist()
    else:
      continuation = encode_after(tokenizer, rest)
      merged += bool(text and rest)
    if not continuation:
      raise DataError(
        "a continuation is empty", f"{rest!r} after {text[-40:]!r}", "text"
      )
    requests.append(ScoreRequest(context.tolist(), continuation))
  return requests, merged


def encode_after(tokenizer: AnyTokenizer, text: str) -> list[int]:
  """Returns the ids of a text that continues another one.

  Some tokenizers put a space before every text. Here it replaces the one that the text
  begins with, or is removed together with a mark that is put before the text.
  """
  if not tokenizer.adds_prefix or not text:
    return tokenizer.encode(text) if text else []
  if text.startswith(" "):
    return tokenizer.encode(text[1:])
  for mark in ("\n", "(", "0"):  # some tokenizers drop newlines
    alone, ids = tokenizer.encode(mark), tokenizer.encode(mark + text)
    if alone and len(ids) > len(alone) and ids[: len(alone)] == alone:
      return ids[len(alone) :]
  return tokenizer.encode(text)


def rolling_requests(
  ids: Sequence[int], start: Sequence[int], length: int
) -> list[ScoreRequest]:
  """Returns requests that score each of `ids` once, in windows of `length` tokens.

  The first window sees `start`; the last one keeps a full context (lm-eval's windows
  with a context of 1).
  """
  text, first = [*start, *ids], len(start)
  requests = []
  for begin in range(0, len(ids), length):
    end = min(begin + length, len(ids))
    seen = max(0, end + first - 1 - length)
    context, continuation = (
      text[seen : begin + first],
      text[begin + first : end + first],
    )
    requests.append(ScoreRequest(context, continuation))
  return requests


def causal_segments(
  request: ScoreRequest, length: int, where: str = "a continuation"
) -> list[TextSegment]:
  """Returns the one segment of a request; a long context loses its beginning.

  Args:
    where: what is scored, for messages.

  Raises:
    DataError: the continuation alone is longer than `length` tokens.
  """
  size = len(request.continuation)
  if size > length:
    needed = f"at most the {length} tokens of a row"
    raise DataError(f"{where} is too long to score", f"{size} tokens", needed)
  ids = [*request.context, *request.continuation][-(length + 1) :]
  places = np.arange(len(ids) - 1 - size, len(ids) - 1)
  targets = np.array(request.continuation, np.int32)
  return [TextSegment(np.array(ids[:-1], np.int32), places, targets)]


class MaskedWords:
  """Makes the segments of masked models: one per token of the continuation.

  PLL-word-l2r: a token is predicted with itself and the later tokens of its word
  masked, or words of several tokens would look too likely (Kauf & Ivanova 2023).
  """

  def __init__(self, tokenizer: AnyTokenizer):
    if tokenizer.mask_id < 0:
      raise DataError("a masked model cannot be scored", "a tokenizer without a mask")
    starts = [i for i in (tokenizer.cls_id, tokenizer.bos_id) if i >= 0]
    stops = [i for i in (tokenizer.sep_id, tokenizer.eos_id) if i >= 0]
    self.tokenizer, self.start, self.stop = tokenizer, starts[:1], stops[:1]
    self._continues_V = continues_word(tokenizer)

  def segments(
    self, request: ScoreRequest, length: int, where: str = "a continuation"
  ) -> list[TextSegment]:
    """Returns the segments of a request, as `causal_segments` does.

    Raises:
      DataError: the continuation alone does not fit into `length` tokens.
    """
    room = length - len(self.start) - len(self.stop)
    words, size = request.continuation, len(request.continuation)
    if size > room:
      needed = f"at most {room}, in a row of {length}"
      raise DataError(f"{where} is too long to score", f"{size} tokens", needed)
    text = [*request.context, *words][-room:]
    ids = np.array([*self.start, *text, *self.stop], np.int32)
    first = len(self.start) + len(text) - size
    segments = []
    for i, target in enumerate(words):
      continues = (self._continues_V[token] for token in words[i + 1 :])
      rest = len(list(itertools.takewhile(bool, continues)))
      masked = ids.copy()
      masked[first + i : first + i + 1 + rest] = self.tokenizer.mask_id
      place = np.array([first + i])
      segments.append(TextSegment(masked, place, np.array([target], np.int32)))
    return segments
