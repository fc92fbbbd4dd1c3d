"""Text to ids and back: train and run a SentencePiece model.

A tokenizer trained here is lossless: decode(encode(x)) == x for every valid text. That
takes no normalisation, no dummy prefix, byte fallback, and one thing that SentencePiece
does not do: its space marker U+2581, found in text, is spelt in bytes. Newline and tab
are pieces of their own, so a text cut after a newline has the ids of the whole.
"""

import codecs
import hashlib
import io
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from flaxlm import errors
from flaxlm.machine import quiet_stderr

# Their order is their id in tokenizers trained here; user symbols follow.
SPECIAL = ("pad", "bos", "eos", "unk", "mask", "cls", "sep")
PIECE = 1 << 16  # characters encoded as one string; bounds the memory of long documents
SPACE_MARK = "\u2581"  # SentencePiece's space
LINE_CHARACTERS = (
  4096  # characters of a training line: BPE training slows down on long ones
)
# The unigram trainer adds up per thread: with another number comes another vocabulary.
TRAIN_THREADS = 8
LOSS_PROBES = {  # text that shows what a foreign model changes
  "a": "it loses letters",
  " a  b ": "it changes spaces",
  "a\nb\t\r\n": "it changes newlines or tabs",
  "\ufb01\u2460A\u030a\u3000\uff76": "its normaliser changes characters",
  "\U0001f9ea\u0000\ue000": "unknown characters are lost: it has no byte fallback",
  f"a{SPACE_MARK}b": "it turns U+2581 into a space",
}


class Tokenizer:
  """One SentencePiece model, given as the bytes of its `.model` file."""

  def __init__(self, model: bytes):
    import sentencepiece

    self.model = model
    self.sha256 = hashlib.sha256(model).hexdigest()
    self._sp = sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(model)
    self.vocab_size: int = sp.vocab_size()
    self.pad_id: int = sp.pad_id()
    self.bos_id: int = sp.bos_id()
    self.eos_id: int = sp.eos_id()
    self.unk_id: int = sp.unk_id()
    # Their names in the text of a template; text proper cannot name them.
    self.special_tokens: dict[str, int] = {
      sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i)
    }
    self.mask_id: int = self.control_id("<mask>", "[MASK]")
    self.cls_id: int = self.control_id("<cls>", "[CLS]")
    self.sep_id: int = self.control_id("<sep>", "[SEP]")
    self._pieces: list[bytes] = []
    first = sp.encode("a")
    self.adds_prefix = bool(first) and sp.id_to_piece(first[0]).startswith(SPACE_MARK)
    mark = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    self.byte_fallback = all(map(sp.is_byte, mark))
    self._mark = mark if self.byte_fallback else [self.unk_id]
    self.splits_words, self.chat_template = False, ""  # as other tokenizers have
    # Why decode(encode(text)) is not always text; "" if it is.
    self.loss: str = find_loss(self)
    self.is_lossless = not self.loss

  def control_id(self, *names: str) -> int:
    """The id of the first of these control symbols that the model has, or -1."""
    found = [self.special_tokens[name] for name in names if name in self.special_tokens]
    return found[0] if found else -1

  def encode(self, text: str, specials: bool = False) -> list[int]:
    """Returns the ids of `text`, without bos and eos.

    With `specials`, the name of a control symbol in it is that symbol, which is for
    templates alone: in text, names are spelt like all else.
    """
    if not specials:
      return self.encode_batch([text])[0].tolist()
    ids, done = [], 0
    for start, end in [
      *find_special_names(text, self.special_tokens),
      (len(text),) * 2,
    ]:
      ids += self.encode(text[done:start]) if done < start else []
      ids += [self.special_tokens[text[start:end]]] if start < end else []
      done = end
    return ids

  def encode_batch(self, texts: Sequence[str], num_threads=1) -> list[np.ndarray]:
    """Returns the ids (int32) of each text, computed by `num_threads` threads."""
    chunks, marks, counts = [], [], []
    for text in texts:
      before = len(chunks)
      for piece in cut(text, PIECE):
        head, *rest = [piece] if self.adds_prefix else piece.split(SPACE_MARK)
        chunks.append(head)
        for part in rest:
          marks.append(len(chunks))
          chunks.append(part)
      counts.append(len(chunks) - before)
    ids = self._sp.encode(chunks, num_threads=num_threads, return_type="numpy")
    for number in marks:
      ids[number] = np.concatenate([np.array(self._mark, np.int32), ids[number]])
    batch, start = [], 0
    for count in counts:
      batch.append(np.concatenate(ids[start : start + count]))
      start += count
    return batch

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`; control symbols have none, bad UTF-8 is U+FFFD."""
    return Decoder(self)(ids, final=True)

  def piece(self, i: int) -> str:
    """The piece of an id as the model writes it."""
    return self._sp.id_to_piece(i)

  def pieces(self) -> list[bytes]:
    """The UTF-8 text of each id."""
    if not self._pieces:
      sp = self._sp
      for i in range(self.vocab_size):
        piece = sp.id_to_piece(i)
        if sp.is_control(i):
          self._pieces.append(b"")
        elif sp.is_byte(i):
          self._pieces.append(bytes([int(piece[3:5], 16)]))
        elif sp.is_unknown(i):
          self._pieces.append(b"\xef\xbf\xbd")
        else:
          self._pieces.append(piece.replace(SPACE_MARK, " ").encode())
    return self._pieces


class Decoder:
  """Turns ids that arrive a few at a time into text, never half a character."""

  def __init__(self, tokenizer):
    self._pieces = tokenizer.pieces()
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    self._strip = tokenizer.adds_prefix

  def __call__(self, ids: Sequence[int], final: bool = False) -> str:
    """Returns the text that is complete now; `final` also flushes what is not."""
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
  """Why some text does not survive this tokenizer; "" if all of it does."""
  for text, why in probes.items():
    if tokenizer.decode(tokenizer.encode(text)) != text:
      return why
  return ""


def find_special_names(text: str, names: Collection[str]) -> list[tuple[int, int]]:
  """(start, end) of each of `names` in `text`; the longest counts."""
  if not names:
    return []
  pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
  return [match.span() for match in re.finditer(pattern, text)]


def continues_word(tokenizer) -> np.ndarray:
  """Of each id, whether it continues the word before it, bool V: for whole-word masks.

  WordPiece says so itself (##). Elsewhere it is a piece that begins with a letter or
  digit, not a space. Ideographs and kana have no words: each piece is its own.
  """
  goes_on = np.zeros(tokenizer.vocab_size, bool)
  for i, piece in enumerate(tokenizer.pieces()):
    if not piece or i == tokenizer.unk_id:
      continue
    if tokenizer.splits_words:
      goes_on[i] = piece[:1] != b" "
      continue
    first = piece.decode(errors="replace")[0]
    if first == "\ufffd":  # part of a character: of an alphabet, if not that of one
      goes_on[i] = piece[0] < 0xE2
    else:
      is_letter = unicodedata.category(first)[0] in "LMN"
      goes_on[i] = is_letter and not "\u2e80" <= first <= "\ua4cf" and first < "\uf900"
  return goes_on


def cut(text: str, limit: int, whole_lines: bool = False) -> Iterator[str]:
  """Yields `text` in pieces of at most `limit` characters, at least one.

  Cuts fall before a word that one space parts from the word before it (not with
  `whole_lines`), else after a newline, else before spaces: where no trained piece can
  lie across, so the ids stay those of the whole text. Byte-level tokenizers join blank
  lines and indents: for them only the first is safe. A run of `limit` characters with
  none of these is cut hard. Elsewhere too the text stays the same, but ids may differ.
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
  """Where the last " word" of text[start:stop] begins; 0 if there is none."""
  while (at := text.rfind(" ", start + 1, stop)) > 0:
    around = text[at - 1 : at + 2]
    if len(around) == 3 and not (around[0].isspace() or around[2].isspace()):
      return at
    stop = at
  return 0


def sample_lines(texts: Iterable[str], num_bytes: int) -> list[str]:
  """Returns about `num_bytes` of `texts` as lines, spread evenly over all of it.

  One pass in bounded memory: every n-th snippet is kept, and n doubles as they pile up.
  """
  kept, total, stride, number = [], 0, 1, 0
  for text in texts:
    for snippet in cut(text, LINE_CHARACTERS, whole_lines=True):
      if number % stride == 0:
        kept.append(snippet)
        total += len(snippet.encode())
      number += 1
      if total > 2 * num_bytes and len(kept) > 1:
        kept, stride = kept[::2], stride * 2
        total = sum(len(snippet.encode()) for snippet in kept)
  size = max(1, round(len(kept) * min(1, num_bytes / max(total, 1))))
  kept = [kept[i * len(kept) // size] for i in range(size)] if kept else []
  # NUL ends a line for the trainer, and the mark would be taken for a space.
  lines = (line for snippet in kept for line in re.split("[\n\0\u2581]", snippet))
  return [line for line in lines if line]


def train_tokenizer(
  lines: Sequence[str],
  kind: str,
  vocab_size: int,
  byte_fallback: bool = True,
  user_symbols: Sequence[str] = (),
) -> bytes:
  """Trains on `lines`; returns the `.model` bytes, the same for the same arguments."""
  import sentencepiece

  names = [f"<{name}>" for name in SPECIAL]
  for symbol in user_symbols:
    if not symbol.strip() or symbol in names or list(user_symbols).count(symbol) > 1:
      raise errors.ConfigError(
        "config.tokenizer.user_symbols", repr(symbol), "new, distinct names", "<user>"
      )
  if not lines:
    raise errors.DataError(
      "there is no text to train a tokenizer on\n  given:  0 bytes of text\n"
      "  needed: sources with text, see config.data.sources"
    )
  model = io.BytesIO()
  try:
    with quiet_stderr():
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=byte_fallback,
        # With bytes to fall back on, the rarest 0.05% need no piece of their own.
        character_coverage=0.9995 if byte_fallback else 1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\t"],
        control_symbols=names[4:] + list(user_symbols),
        **{f"{name}_id": i for i, name in enumerate(SPECIAL[:4])},
        **{f"{name}_piece": f"<{name}>" for name in SPECIAL[:4]},
        unk_surface="\ufffd",
        max_sentence_length=4 * LINE_CHARACTERS,
        num_threads=TRAIN_THREADS,
        minloglevel=2,
      )
  except RuntimeError as error:
    least = len(names) + len(user_symbols) + 2 + 256 * byte_fallback + 1
    raise vocab_error(vocab_size, str(error), least) from error
  return model.getvalue()


def vocab_error(vocab_size: int, message: str, least: int) -> errors.UserError:
  """Says which vocab_size would do, from what SentencePiece says of this one."""
  key = "config.tokenizer.vocab_size"
  if found := re.search(r"too high.*<= (\d+)", message):
    most = found[1]
    return errors.ConfigError(
      key, vocab_size, f"at most {most} for this little text", most
    )
  if found := re.search(r"required_chars. \d+ vs (\d+)", message):
    need = f"at least {found[1]}: bytes, special tokens and each common character"
    return errors.ConfigError(key, vocab_size, need, found[1])
  if vocab_size < least:
    need = f"at least {least}: bytes, special tokens and one character"
    return errors.ConfigError(key, vocab_size, need, f"{max(least, 512)}")
  return errors.DataError(f"SentencePiece could not train a tokenizer: {message}")
