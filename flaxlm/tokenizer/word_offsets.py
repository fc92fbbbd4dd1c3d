"""Texts encoded word by word, so that it is known where each token comes from.

Tokenizers differ in what they tell of positions: SentencePiece models here give the
bytes of each piece, WordPiece lowercases and strips accents. Few pieces lie across the
space before a word, so the ids of the words, each with the space before it, are those
of the whole text. (Not where a byte-level model joins a full stop and a newline, and
unigram models choose freely between equally good ways to part a word.) Within a word,
tokens are laid along it by their lengths.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CACHE = 1 << 20  # words whose ids are kept
PROBE = ("it", "is", "as", "a", "word")
WORD = re.compile(r"\s*\S+")
ATOM = re.compile(
  "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"
)


class Located(NamedTuple):
  """The tokens of a text; token i comes from text[starts[i]:ends[i]].

  Tokens that are nothing but space have an empty range.
  """

  ids: np.ndarray  # int32
  starts: np.ndarray  # int32
  ends: np.ndarray  # int32


class WordEncoder:
  """Encodes words and remembers them: few words make up most of any text."""

  def __init__(self, tokenizer, num_threads: int = 1):
    self.tokenizer, self.num_threads = tokenizer, num_threads
    self._ids: dict[str, np.ndarray] = {}
    self._pieces: list[bytes] | None = None
    whole = tokenizer.encode(" ".join(PROBE))
    # SentencePiece models with a dummy prefix put the space there themselves.
    self.space = " "
    if whole != self._joined(" ") and whole == self._joined(""):
      self.space = ""

  def _joined(self, space: str) -> list[int]:
    words = [PROBE[0], *(space + word for word in PROBE[1:])]
    return [i for word in words for i in self.tokenizer.encode(word)]

  def encode(self, words: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids (int32) of each word of a sentence, parted by single spaces."""
    surfaces = [(self.space if i else "") + word for i, word in enumerate(words)]
    self.learn(surfaces)
    return [self._ids[surface] for surface in surfaces]

  def learn(self, surfaces: Sequence[str]) -> None:
    """Encodes those that are new, in one call: do it for many sentences at once."""
    if len(self._ids) > CACHE:
      self._ids = {}
    new = [surface for surface in dict.fromkeys(surfaces) if surface not in self._ids]
    if new:
      ids = self.tokenizer.encode_batch(new, self.num_threads)
      for surface, row in zip(new, ids, strict=True):
        self._ids[surface] = np.asarray(row, np.int32)

  def surfaces(self, text: str) -> list[str]:
    """The words of a text as they are encoded: with the space before them."""
    found = WORD.findall(text)
    if self.space:
      return found
    return found[:1] + [word.removeprefix(" ") for word in found[1:]]

  def locate(self, text: str) -> Located:
    """Encodes a text; space after the last word has no tokens."""
    matches = list(WORD.finditer(text))
    surfaces = self.surfaces(text)
    self.learn(surfaces)
    ids, starts, ends = [], [], []
    for match, surface in zip(matches, surfaces, strict=True):
      row = self._ids[surface]
      word = surface.lstrip()
      begin = match.end() - len(word)
      spans = self._lay(row.tolist(), word)
      ids.append(row)
      starts += [begin + start for start, _ in spans]
      ends += [begin + end for _, end in spans]
    joined = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return Located(joined, np.array(starts, np.int32), np.array(ends, np.int32))

  def _lay(self, ids: list[int], word: str) -> list[tuple[int, int]]:
    """Returns the range of characters of `word` that each token stands for."""
    if len(ids) == 1:
      return [(0, len(word))]
    pieces = self._piece_bytes(ids)
    whole = b"".join(pieces)
    before = whole.removesuffix(word.encode()).decode(errors="replace")
    if whole.endswith(word.encode()) and not before.strip():
      return lay_bytes(pieces, word)
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
      spans += [(begin + a, begin + b) for a, b in self._lay(row, atom)]
      begin += len(atom)
    return spans

  def _piece_bytes(self, ids: list[int]) -> list[bytes]:
    if self._pieces is None:
      self._pieces = self.tokenizer.pieces()
    return [self._pieces[i] for i in ids]


def lay_bytes(pieces: list[bytes], word: str) -> list[tuple[int, int]]:
  """Ranges of tokens whose bytes are those of the word, spaces before it aside."""
  stop = len(word.encode()) - sum(map(len, pieces))
  # Of each byte, the character that it belongs to.
  of_byte = [i for i, char in enumerate(word) for _ in char.encode()] + [len(word)]
  spans = []
  for piece in pieces:
    start, stop = max(stop, 0), stop + len(piece)
    last = of_byte[max(stop - 1, 0)] + 1 if stop > start else of_byte[start]
    spans.append((of_byte[start], last))
  return spans


def split_atoms(word: str) -> list[str]:
  """Parts a word where BERT's pre-tokenizer does: around punctuation and ideographs."""
  atoms, inside = [], False
  for char in word:
    ascii_mark = char.isascii() and char.isprintable() and not char.isalnum()
    alone = ascii_mark or unicodedata.category(char)[0] == "P" or ATOM.match(char)
    if inside and not alone:
      atoms[-1] += char
    else:
      atoms.append(char)
    inside = not alone
  return atoms
