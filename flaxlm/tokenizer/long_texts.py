"""Encodes texts of any length with the ids that the library gives the whole text.

A library takes the start of what it is given for the start of a text: it may put a
space there, or strip one. It also needs some hundred bytes per token. Long texts are
therefore encoded in chunks, but cut only where the ids are known to stay the same.

SentencePiece's BPE never joins two characters that no piece has side by side, so a text
may be cut between them (`SafeCuts`). The `tokenizers` library has steps of many kinds;
its chunks overlap, and are joined where both give the same tokens (`join`). In BPE, a
sequence of tokens is right if each pair of neighbours is: those of a join were found
side by side in one of the chunks.

Unigram models without words cannot be cut: sums over the whole text decide between
nearly equal ways to split it, and rounding differs by where a sum begins. Such texts
are encoded whole, in memory that grows with them.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flaxlm.tokenizer.pieces import CHUNK_CHARACTERS, SPACE_MARK

# Characters of a document that are held at once, where it can be cut at all.
BLOCK_CHARACTERS = 1 << 21
OVERLAP = 2048  # characters that two chunks of the `tokenizers` library share
_RUN = 3  # tokens that two chunks must share to be joined, at least
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5  # types of pieces in a SentencePiece model
_BPE, _CHAR = 2, 4  # types of SentencePiece models


class SafeCuts:
  """Where a text of a SentencePiece model may be cut: between which characters.

  Args:
    proto: a sentencepiece ModelProto.
  """

  def __init__(self, proto):
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    types = {piece.type for piece in proto.pieces}
    # An unused piece is split as it was first made, which another chunk may not see.
    self.possible = trainer.model_type in (_BPE, _CHAR) and _UNUSED not in types
    # Whether that also holds before the text is normalised.
    self.before_normalizing = self.possible and not (
      spec.precompiled_charsmap
      or (spec.add_dummy_prefix and trainer.treat_whitespace_as_suffix)
    )
    spaces = [" ", SPACE_MARK] if spec.escape_whitespaces else []
    pairs: set[str] = set()
    known: set[str] = set()
    for piece in proto.pieces if self.possible else ():
      if piece.type in (_NORMAL, _USER_DEFINED):
        text = piece.piece
        pairs.update(map("".join, itertools.pairwise(text)))
        known.update(text if len(text) == 1 else "")
    for pair in [pair for pair in pairs if spaces and SPACE_MARK in pair]:
      forms = [spaces if char == SPACE_MARK else [char] for char in pair]
      pairs.update(map("".join, itertools.product(*forms)))
    if SPACE_MARK in known:
      known.update(spaces)
    self._pairs, self._known = pairs, known
    # Spaces next to a cut would be stripped.
    self._stripped = set(" " + SPACE_MARK) if spec.remove_extra_whitespaces else set()

  def is_safe(self, text: str, at: int) -> bool:
    """Returns whether the ids of text[:at] and text[at:] are those of the whole.

    A piece of its own must begin the second part: unknown characters would be joined.
    """
    pair = text[at - 1 : at + 1]
    return (
      pair not in self._pairs
      and pair[1] in self._known
      and self._stripped.isdisjoint(pair)
    )

  def last(self, text: str, start: int, stop: int) -> int:
    """Returns the last safe place in start+1..stop, or 0."""
    places = range(min(stop, len(text) - 1), start, -1)
    return next((at for at in places if self.is_safe(text, at)), 0)

  def chunks(self, text: str) -> list[str]:
    """Returns `text` in chunks that are as short as CHUNK_CHARACTERS where possible."""
    chunks, start = [], 0
    while self.possible and len(text) - start > CHUNK_CHARACTERS:
      middle = start + CHUNK_CHARACTERS
      at = self.last(text, start, middle)
      at = at or next(
        (at for at in range(middle, len(text)) if self.is_safe(text, at)), 0
      )
      if not at:
        break
      chunks.append(text[start:at])
      start = at
    return [*chunks, text[start:]]


class Window(NamedTuple):
  """A chunk of a text, with the ids of its tokens and the characters they stand for."""

  start: int  # of the chunk in the text
  text: str
  ids: np.ndarray  # int32 L
  spans: np.ndarray  # int L x 2, in characters of the chunk


def overlapping(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
  """Yields (start, chunk) of a text that arrives in parts; chunks share OVERLAP."""
  start, text = 0, ""
  for more in texts:
    text += more
    while len(text) > CHUNK_CHARACTERS + OVERLAP:
      yield start, text[: CHUNK_CHARACTERS + OVERLAP]
      start, text = start + CHUNK_CHARACTERS, text[CHUNK_CHARACTERS:]
  yield start, text


def join(
  windows: Iterable[Window], encode: Callable[[int, str], Window]
) -> Iterator[np.ndarray]:
  """Yields the ids of a text, in order, from its overlapping windows.

  Windows that do not agree are encoded again as one. Doing so at double the length each
  time keeps the work linear.
  """
  windows = iter(windows)
  left, gap, skip = next(windows), "", 0  # tokens of `left` that were yielded
  for right in windows:
    found = None if gap else _meeting(left, right)
    if found:
      yield left.ids[skip : found[0]]
      left, skip = right, found[1]
      continue
    gap += right.text[OVERLAP:]
    if len(gap) >= len(left.text):
      left, gap = _extend(left, gap, skip, encode), ""
  if gap:
    left = _extend(left, gap, skip, encode)
  yield left.ids[skip:]


def _extend(left: Window, gap: str, skip: int, encode) -> Window:
  """Returns a window with more text; the tokens that were yielded must stay."""
  longer = encode(left.start, left.text + gap)
  stays = slice(skip, skip + _RUN) if skip else slice(0)
  if not np.array_equal(longer.ids[stays], left.ids[stays]):
    raise AssertionError("what follows a text changes how it was split")
  return longer


def _meeting(left: Window, right: Window) -> tuple[int, int] | None:
  """Returns the number, in each window, of a token from which on they agree.

  They must agree for at least half the overlap without its margins: chunks that split
  words at other places may still have some neighbouring tokens in common.
  """
  shift, margin = right.start - left.start, OVERLAP // 4
  first, stop = shift + margin, len(left.text) - margin
  a = np.column_stack([left.spans, left.ids])
  b = np.column_stack([right.spans + shift, right.ids])
  inside_a = np.flatnonzero((a[:, 0] >= first) & (a[:, 1] <= stop)).tolist()
  inside_b = np.flatnonzero((b[:, 0] >= first) & (b[:, 1] <= stop)).tolist()
  numbers = {tuple(b[j]): j for j in inside_b}
  for i in inside_a:
    if a[i, 0] > (first + stop) // 2:
      return None
    j, count = numbers.get(tuple(a[i])), inside_a[-1] + 1 - i
    if j is not None and count >= _RUN and np.array_equal(a[i:][:count], b[j:][:count]):
      return i, j
  return None


def can_cut(tree: dict) -> bool:
  """Returns whether the texts of a tokenizer.json may be encoded in chunks.

  Not those of unigram models without words, and those that are cut by length.
  """
  step = tree.get("pre_tokenizer") or {}
  steps: Sequence[dict] = step.get("pretokenizers", [step] if step else [])
  if any(step["type"] == "FixedLength" for step in steps):
    return False
  return tree["model"].get("type") != "Unigram" or any(
    step["type"] != "Metaspace" or step.get("split", True) for step in steps
  )
