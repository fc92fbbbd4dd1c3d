"""Trains and runs SentencePiece models.

A tokenizer trained here is lossless: decode(encode(x)) == x for every valid text. It
does not normalise text, adds no dummy prefix, and falls back to bytes. SentencePiece's
space mark U+2581 is also encoded as bytes where a text contains it. Newline and tab are
pieces of their own, so a text that is cut after a newline keeps the ids of the whole.
"""

import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flaxlm import errors
from flaxlm.machine import quiet_stderr
from flaxlm.tokenizer.declared_tokens import NO_BOS
from flaxlm.tokenizer.long_texts import BLOCK_CHARACTERS, SafeCuts
from flaxlm.tokenizer.pieces import (
  CHUNK_CHARACTERS,
  SPACE_MARK,
  Decoder,
  cut,
  find_loss,
  find_special_names,
  require_unicode,
)

# In the order of their ids in tokenizers that are trained here; user symbols follow.
SPECIAL_NAMES = ("pad", "bos", "eos", "unk", "mask", "cls", "sep")
# The longest line to train on: BPE training slows down on longer ones.
LINE_CHARACTERS = 4096
# The unigram trainer sums per thread, so another number gives another vocabulary.
TRAIN_THREADS = 8


class _Chunk(NamedTuple):
  processor: object  # SentencePieceProcessor
  text: str
  after_mark: bool  # U+2581 stands before it


class Tokenizer:
  """One SentencePiece model, given as the bytes of its `.model` file."""

  def __init__(self, model: bytes):
    self.model = model
    self.sha256 = hashlib.sha256(model).hexdigest()
    self._sp = sp = _load(model)
    self.vocab_size: int = sp.vocab_size()
    self.pad_id: int = sp.pad_id()
    self.bos_id: int = sp.bos_id()
    self.eos_id: int = sp.eos_id()
    self.unk_id: int = sp.unk_id()
    self._adds_bos = not model.endswith(NO_BOS)
    # By name, as templates write them. A name in plain text stays text.
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
    # U+2581 is not a space in models that leave text as it is.
    self._keeps_marks = sp.normalize(" a  \ufb01 ") == "\u2581a\u2581\u2581\ufb01\u2581"
    self.splits_words, self.chat_template = False, ""  # as in FastTokenizer
    # Why decode(encode(text)) is not always the text; "" if it is.
    self.loss: str = find_loss(self)
    self.is_lossless = not self.loss

  @property
  def begin_ids(self) -> list[int]:
    """What is put before every text: bos, or nothing."""
    return [self.bos_id] if self._adds_bos and self.bos_id >= 0 else []

  def control_id(self, *names: str) -> int:
    """Returns the id of the first of these control symbols that exists, or -1."""
    found = [self.special_tokens[name] for name in names if name in self.special_tokens]
    return found[0] if found else -1

  def encode(self, text: str, specials: bool = False) -> list[int]:
    """Returns the ids of `text`, without bos and eos.

    With `specials`, the name of a control symbol becomes that symbol. This is for
    rendered chat templates alone: in plain text, a name is text.
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
    require_unicode(texts)
    return self._encode([self._chunks(text) for text in texts], num_threads)

  def encode_following(self, texts: Sequence[str], num_threads=1) -> list[np.ndarray]:
    """Returns the ids of texts that continue others: no space is put before them."""
    return self._encode(
      [self._chunks(text, first=False) for text in texts], num_threads
    )

  def encode_long(self, texts: Iterable[str], num_threads=1) -> Iterator[np.ndarray]:
    """Yields the ids (int32) of one text that arrives in parts; see long_texts.py."""
    rest, first = "", True
    for text in texts:
      rest += text
      if len(rest) >= BLOCK_CHARACTERS and self._cuts.before_normalizing:
        at = self._cuts.last(rest, max(len(rest) - CHUNK_CHARACTERS, 0), len(rest))
        if at:
          yield self._encode([self._chunks(rest[:at], first)], num_threads)[0]
          rest, first = rest[at:], False
    yield self._encode([self._chunks(rest, first)], num_threads)[0]

  def _chunks(self, text: str, first: bool = True) -> list["_Chunk"]:
    """Cuts a text where its ids stay the same; without `first`, it continues one."""
    processor = self._sp if first else self._continuing
    pieces = [text]
    if len(text) > CHUNK_CHARACTERS:
      if self._cuts.possible and not self._cuts.before_normalizing:
        text, processor = self._sp.normalize(text), self._plain
      pieces = self._cuts.chunks(text)
    chunks = []
    for number, piece in enumerate(pieces):
      if number and processor is self._sp:
        processor = self._continuing
      parts = piece.split(SPACE_MARK) if self._keeps_marks else [piece]
      chunks += [_Chunk(processor, part, i > 0) for i, part in enumerate(parts)]
    return chunks

  def _encode(self, texts: list[list["_Chunk"]], num_threads: int) -> list[np.ndarray]:
    """Returns the ids of each text, from its chunks."""
    ids: dict[int, np.ndarray] = {}
    flat = list(enumerate(itertools.chain.from_iterable(texts)))
    for processor in {
      id(chunk.processor): chunk.processor for _, chunk in flat
    }.values():
      own = [(i, chunk) for i, chunk in flat if chunk.processor is processor]
      rows = processor.encode(
        [chunk.text for _, chunk in own], num_threads=num_threads, return_type="numpy"
      )
      for (i, chunk), row in zip(own, rows, strict=True):
        mark = [np.array(self._mark, np.int32)] * chunk.after_mark
        ids[i] = np.concatenate([*mark, row]) if mark else row
    numbers = itertools.count()
    return [np.concatenate([ids[next(numbers)] for _ in chunks]) for chunks in texts]

  @functools.cached_property
  def _cuts(self) -> SafeCuts:
    return SafeCuts(self._proto())

  @functools.cached_property
  def _continuing(self):
    """The model for a text that continues another: no space is put before it."""
    proto = self._proto()
    if not proto.normalizer_spec.add_dummy_prefix:
      return self._sp
    proto.normalizer_spec.add_dummy_prefix = False
    return _load(proto.SerializeToString())

  @functools.cached_property
  def _plain(self):
    """The model for normalised text, which it leaves as it is."""
    proto = self._proto()
    spec = proto.normalizer_spec
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    spec.escape_whitespaces = False
    return _load(proto.SerializeToString())

  def _proto(self):
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(self.model)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`: none for control symbols, U+FFFD for bad UTF-8."""
    return Decoder(self)(ids, final=True)

  def piece(self, i: int) -> str:
    """Returns the piece of an id as the model writes it."""
    return self._sp.id_to_piece(i)

  def pieces(self) -> list[bytes]:
    """Returns the UTF-8 text of each id."""
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


def _load(model: bytes):
  """Returns the library's processor; DataError if it cannot read the model."""
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
    processor.id_to_piece(list(range(processor.vocab_size())))  # each is UTF-8
  except (RuntimeError, UnicodeDecodeError) as error:
    reason = str(error).rpartition("] ")[2] or "not what SentencePiece writes"
    raise errors.DataError(
      "a SentencePiece model cannot be read",
      f"{len(model)} bytes: {reason}",
      "an undamaged .model file of SentencePiece",
    ) from error
  return processor


def sample_lines(texts: Iterable[str], num_bytes: int) -> list[str]:
  """Returns about `num_bytes` of `texts` as lines, spread evenly over all of them.

  One pass in bounded memory: every n-th snippet is kept, and n doubles as they add up.
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
  # The trainer takes NUL for the end of a line and U+2581 for a space.
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

  names = [f"<{name}>" for name in SPECIAL_NAMES]
  for symbol in user_symbols:
    if not symbol.strip() or symbol in names or list(user_symbols).count(symbol) > 1:
      raise errors.ConfigError(
        "config.tokenizer.user_symbols", repr(symbol), "new, distinct names", "<user>"
      )
  if not lines:
    raise errors.DataError(
      "there is no text to train a tokenizer on",
      "0 bytes of text",
      "sources with text, see config.data.sources",
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
        # With byte fallback, the rarest 0.05% of characters need no piece of their own.
        character_coverage=0.9995 if byte_fallback else 1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\t"],
        control_symbols=names[4:] + list(user_symbols),
        **{f"{name}_id": i for i, name in enumerate(SPECIAL_NAMES[:4])},
        **{f"{name}_piece": f"<{name}>" for name in SPECIAL_NAMES[:4]},
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
  """Returns the error that says which vocab_size would do, from SentencePiece's."""
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
