"""What all tokenizers share: cutting long texts, decoding, and the pieces of words.

A text is cut here to be read in bounded memory, and at places where words begin.
Where a text may be cut without changing its ids is the business of long_texts.py.
"""

import codecs
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from flaxlm.errors import DataError

# Characters of a document that are read or encoded as one string, where possible.
CHUNK_CHARACTERS = 1 << 16
SPACE_MARK = "\u2581"  # SentencePiece's space
LOSS_PROBES = {  # texts that show what a tokenizer changes
  "a": "it loses letters",
  " a  b ": "it changes spaces",
  "a\nb\t\r\n": "it changes newlines or tabs",
  "\ufb01\u2460A\u030a\u3000\uff76": "its normaliser changes characters",
  "\U0001f9ea\u0000\ue000": "unknown characters are lost: it has no byte fallback",
  f"a{SPACE_MARK}b": "it turns U+2581 into a space",
}


def require_unicode(texts: Iterable[str]) -> None:
  """Raises DataError if a text has half of a surrogate pair, which no tokenizer reads.

  Python makes them of bytes on a command line that are no UTF-8, and of JSON's escapes.
  """
  for text in texts:
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise DataError(
        "a text cannot be tokenised",
        f"half of a surrogate pair at character {error.start}",
        "Unicode, such as UTF-8 on a command line",
      ) from None


def cut(text: str, limit: int, whole_lines: bool = False) -> Iterator[str]:
  """Yields `text` in chunks of at most `limit` characters, at least one chunk.

  The best place to cut is before a word that follows another word and one space (not
  with `whole_lines`), then after a newline, then before a run of spaces. If there is no
  such place in `limit` characters, the chunk ends after `limit` characters.
  """
  start = 0
  while len(text) - start > limit:
    end = 0 if whole_lines else last_word(text, start, start + limit)
    end = end or text.rfind("\n", start, start + limit) + 1
    if not end:
      space = text.rfind(" ", start, start + limit)
      end = start + len(text[start : max(space, start)].rstrip(" "))
      end = end if end > start else start + limit
    yield text[start:end]
    start = end
  yield text[start:]


def last_word(text: str, start: int, stop: int) -> int:
  """Returns where the last " word" of text[start:stop] begins; 0 if there is none."""
  while (at := text.rfind(" ", start + 1, stop)) > 0:
    around = text[at - 1 : at + 2]
    if len(around) == 3 and not (around[0].isspace() or around[2].isspace()):
      return at
    stop = at
  return 0


class Decoder:
  """Turns ids that arrive a few at a time into text, never half a character.

  Args:
    begins: the ids begin a text: the space that some tokenizers put there is left out.
  """

  def __init__(self, tokenizer, begins: bool = True):
    self._pieces = tokenizer.pieces()
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    self._strip = begins and tokenizer.adds_prefix

  def __call__(self, ids: Sequence[int], final: bool = False) -> str:
    """Returns the text that is complete now; `final` also flushes what is not."""
    parts = range(0, len(ids), CHUNK_CHARACTERS)  # lists of ids take much memory
    texts = [self._decode(ids[start : start + CHUNK_CHARACTERS]) for start in parts]
    return "".join(texts) + (self._decode([], True) if final else "")

  def _decode(self, ids: Sequence[int], final: bool = False) -> str:
    ids = np.asarray(ids).tolist()
    if ids and not 0 <= min(ids) <= max(ids) < len(self._pieces):
      raise ValueError(
        f"ids {min(ids)}..{max(ids)} are not in 0..{len(self._pieces) - 1}"
      )
    text = self._utf8.decode(b"".join([self._pieces[i] for i in ids]), final)
    if text and self._strip:
      self._strip = False
      text = text.removeprefix(" ")
    return text


def find_loss(tokenizer, probes: dict[str, str] = LOSS_PROBES) -> str:
  """Returns why some text does not survive this tokenizer; "" if all of it does."""
  for text, why in probes.items():
    if tokenizer.decode(tokenizer.encode(text)) != text:
      return why
  return ""


def find_special_names(text: str, names: Collection[str]) -> list[tuple[int, int]]:
  """Returns (start, end) of each of `names` in `text`; the longest match wins."""
  if not names:
    return []
  pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
  return [match.span() for match in re.finditer(pattern, text)]


def continues_word(tokenizer) -> np.ndarray:
  """Returns which tokens continue the word before them, bool V: for whole-word masks.

  WordPiece marks them (##). In other vocabularies they begin with a letter or a digit
  rather than a space. Ideographs and kana are written without spaces: each piece counts
  as a word of its own.
  """
  continues = np.zeros(tokenizer.vocab_size, bool)
  for i, piece in enumerate(tokenizer.pieces()):
    if not piece or i == tokenizer.unk_id:
      continue
    if tokenizer.splits_words:
      continues[i] = piece[:1] != b" "
      continue
    first = piece.decode(errors="replace")[0]
    if first == "\ufffd":
      # Part of a character: below 0xE2, UTF-8 spells alphabets rather than ideographs.
      continues[i] = piece[0] < 0xE2
    else:
      is_letter = unicodedata.category(first)[0] in "LMN"
      has_words = not "\u2e80" <= first <= "\ua4cf" and first < "\uf900"
      continues[i] = is_letter and has_words
  return continues
