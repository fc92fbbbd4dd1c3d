"""Encodes texts word by word and finds the characters that each token comes from.

Tokenizers report positions differently or not at all, so texts are encoded word by
word, each with the space before it. Pieces rarely cross that space, so the ids are
those of the whole text. The exceptions: byte-level models may join a full stop and a
newline, and unigram models may break ties between equally good splits differently.
Within a word, positions follow from the lengths of the pieces.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CACHED_WORDS = 1 << 20  # words whose ids are kept
SPACE_PROBE = ("it", "is", "as", "a", "word")
FOLLOWING = "\ufdd0"  # before a surface: never a character of a text
SPACED_WORD = re.compile(r"\s*\S+")
IDEOGRAPH = re.compile(
  "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"
)


class Located(NamedTuple):
  """The tokens of a text; token i comes from text[starts[i]:ends[i]].

  Tokens of nothing but spaces have an empty range.
  """

  ids: np.ndarray  # int32
  starts: np.ndarray  # int32
  ends: np.ndarray  # int32


class WordEncoder:
  """Encodes words and caches their ids: a few words make up most of any text."""

  def __init__(self, tokenizer, num_threads: int = 1):
    self.tokenizer, self.num_threads = tokenizer, num_threads
    self._ids: dict[str, np.ndarray] = {}
    self._pieces: list[bytes] | None = None
    whole = tokenizer.encode(" ".join(SPACE_PROBE))
    # The space that a word is encoded with: a SentencePiece model with a dummy prefix
    # adds it by itself.
    self.space = " "
    if whole != self._joined(" ") and whole == self._joined(""):
      self.space = ""
    # It would also be added before a word that follows a newline.
    lines = tokenizer.encode("it\nis") != tokenizer.encode("it") + tokenizer.encode(
      "\nis"
    )
    self._adds_to_lines = not self.space and lines

  def _joined(self, space: str) -> list[int]:
    words = [SPACE_PROBE[0], *(space + word for word in SPACE_PROBE[1:])]
    return [i for word in words for i in self.tokenizer.encode(word)]

  def encode(self, words: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids (int32) of each word of a sentence: words with single spaces."""
    surfaces = [(self.space if i else "") + word for i, word in enumerate(words)]
    self.learn(surfaces)
    return [self._ids[surface] for surface in surfaces]

  def learn(self, surfaces: Sequence[str]) -> None:
    """Encodes new words into the cache; call it with the words of many sentences."""
    if len(self._ids) > CACHED_WORDS:
      self._ids = {}
    new = [surface for surface in dict.fromkeys(surfaces) if surface not in self._ids]
    following = [s for s in new if s.startswith(FOLLOWING)]
    first = [s for s in new if not s.startswith(FOLLOWING)]
    if first:
      self._keep(first, self.tokenizer.encode_batch(first, self.num_threads))
    if following:
      texts = [surface[len(FOLLOWING) :] for surface in following]
      ids = self.tokenizer.encode_following(texts, self.num_threads)
      self._keep(following, ids)

  def _keep(self, surfaces: list[str], ids: Sequence) -> None:
    for surface, row in zip(surfaces, ids, strict=True):
      self._ids[surface] = np.asarray(row, np.int32)

  def surfaces(self, text: str) -> list[str]:
    """Returns the words of a text as they are encoded: with the space before them."""
    found = SPACED_WORD.findall(text)
    if self.space:
      return found
    mark = FOLLOWING if self._adds_to_lines else ""
    return found[:1] + [
      word[1:] if word.startswith(" ") else mark + word for word in found[1:]
    ]

  def locate(self, text: str) -> Located:
    """Encodes a text; spaces after the last word have no tokens."""
    matches = list(SPACED_WORD.finditer(text))
    surfaces = self.surfaces(text)
    self.learn(surfaces)
    ids, starts, ends = [], [], []
    for match, surface in zip(matches, surfaces, strict=True):
      row = self._ids[surface]
      word = surface.removeprefix(FOLLOWING).lstrip()
      begin = match.end() - len(word)
      spans = self._locate_pieces(row.tolist(), word)
      ids.append(row)
      starts += [begin + start for start, _ in spans]
      ends += [begin + end for _, end in spans]
    joined = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return Located(joined, np.array(starts, np.int32), np.array(ends, np.int32))

  def _locate_pieces(self, ids: list[int], word: str) -> list[tuple[int, int]]:
    """Returns the range of characters of `word` that each token stands for.

    In order: by the bytes of the pieces; by their lengths, where the tokenizer changes
    letters (WordPiece's lower case); atom by atom; or the whole word for each token.
    """
    if len(ids) == 1:
      return [(0, len(word))]
    pieces = self._piece_bytes(ids)
    whole = b"".join(pieces)
    before = whole.removesuffix(word.encode()).decode(errors="replace")
    if whole.endswith(word.encode()) and not before.strip():
      return byte_ranges(pieces, word)
    texts = [
      piece.decode(errors="replace").strip().removeprefix("##") for piece in pieces
    ]
    if sum(map(len, texts)) == len(word):
      stops = np.cumsum(list(map(len, texts))).tolist()
      return list(zip([0, *stops[:-1]], stops, strict=True))
    atoms = split_atoms(word)
    rows = [self.tokenizer.encode(atom) for atom in atoms] if len(atoms) > 1 else []
    if not rows or [i for row in rows for i in row] != ids:
      return [(0, len(word))] * len(ids)
    spans, begin = [], 0
    for atom, row in zip(atoms, rows, strict=True):
      spans += [(begin + a, begin + b) for a, b in self._locate_pieces(row, atom)]
      begin += len(atom)
    return spans

  def _piece_bytes(self, ids: list[int]) -> list[bytes]:
    if self._pieces is None:
      self._pieces = self.tokenizer.pieces()
    return [self._pieces[i] for i in ids]


def byte_ranges(pieces: list[bytes], word: str) -> list[tuple[int, int]]:
  """Returns the range of characters of each piece; spaces may precede the word."""
  stop = len(word.encode()) - sum(map(len, pieces))
  # The character that each byte belongs to.
  character = [i for i, char in enumerate(word) for _ in char.encode()] + [len(word)]
  spans = []
  for piece in pieces:
    start, stop = max(stop, 0), stop + len(piece)
    last = character[max(stop - 1, 0)] + 1 if stop > start else character[start]
    spans.append((character[start], last))
  return spans


def split_atoms(word: str) -> list[str]:
  """Splits a word as BERT's pre-tokenizer does: around punctuation and ideographs."""
  atoms, inside = [], False
  for char in word:
    ascii_mark = char.isascii() and char.isprintable() and not char.isalnum()
    alone = ascii_mark or unicodedata.category(char)[0] == "P" or IDEOGRAPH.match(char)
    if inside and not alone:
      atoms[-1] += char
    else:
      atoms.append(char)
    inside = not alone
  return atoms
