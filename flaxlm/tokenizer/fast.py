"""Runs a tokenizer.json with Hugging Face's `tokenizers` library.

Each file becomes two tokenizers of the library. The one for plain text gives special
tokens names that no text can hold, so "[MASK]" in a document stays text; the library's
own switch for this fails with unigram models. The one for chat templates is the file as
it is, and gives the ids that `transformers` gives.
"""

import hashlib
import itertools
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from flaxlm.machine import quiet_stderr
from flaxlm.tokenizer.long_texts import (
  BLOCK_CHARACTERS,
  Window,
  can_cut,
  join,
  overlapping,
)
from flaxlm.tokenizer.pieces import (
  CHUNK_CHARACTERS,
  LOSS_PROBES,
  Decoder,
  find_loss,
  require_unicode,
)
from flaxlm.tokenizer.rust_library import (
  import_tokenizers,
  library_errors,
  read_tokenizer_json,
  to_library,
  unreadable,
)

SPECIAL_ROLES = ("bos", "eos", "pad", "cls", "sep", "mask")
# Keys inside "model" for what other files say: the id of each role and the template.
# The library refuses unknown keys elsewhere, and a tokenizer is kept as one file.
SPECIAL_IDS = "special_ids"
CHAT_TEMPLATE = "chat_template"
# The usual names of each role, for files that do not say.
USUAL_NAMES = {
  "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|endoftext|>"),
  "eos": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
  "cls": ("[CLS]", "<cls>"),
  "sep": ("[SEP]", "<sep>"),
  "mask": ("[MASK]", "<mask>"),
}
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


class FastTokenizer:
  """One tokenizer.json, given as its bytes, with the interface of `Tokenizer`."""

  def __init__(self, model: bytes):
    import_tokenizers()
    self.model = model
    self.sha256 = hashlib.sha256(model).hexdigest()
    tree = read_tokenizer_json(model)
    with library_errors():
      hidden = hide_specials(tree)
      self._text = to_library(hidden)
      self._template = None  # parsed when it is needed
      check_numbers(hidden["added_tokens"], self._text)
      self._read_vocabulary(tree)
      self._can_cut = can_cut(tree)
      self._find_losses(tree["added_tokens"] or [])

  def _read_vocabulary(self, tree: dict) -> None:
    """Sets the pieces, and the ids of each role."""
    pieces, added = read_vocabulary(tree), tree["added_tokens"] or []
    self.special_tokens: dict[str, int] = {
      token["content"]: token["id"] for token in added if token["special"]
    }
    self.vocab_size: int = 1 + max(max(pieces), *(token["id"] for token in added), 0)
    self._pieces = token_bytes(tree, pieces, added, self.vocab_size)
    ids = tree["model"].get(SPECIAL_IDS) or guess_roles(self.special_tokens)
    self.bos_id: int = ids.get("bos", -1)
    self.eos_id: int = ids.get("eos", -1)
    self.pad_id: int = ids.get("pad", -1)
    self.mask_id: int = ids.get("mask", -1)
    self.cls_id: int = ids.get("cls", -1)
    self.sep_id: int = ids.get("sep", -1)
    self.begin_ids: list[int] = ids_before(tree)
    self.chat_template: str = tree["model"].get(CHAT_TEMPLATE, "")
    self.unk_id: int = unknown_id(tree["model"], pieces)
    if self.unk_id in (self.bos_id, self.eos_id):  # GPT-2 uses <|endoftext|> for all
      self.unk_id = -1
    if self.unk_id >= 0:
      self._pieces[self.unk_id] = b"\xef\xbf\xbd"
    # In vocabularies without spaces, a piece begins a word or continues one.
    self.splits_words = decoder_steps(tree).keys() <= {"WordPiece"}
    singles = {piece for i, piece in enumerate(self._pieces) if i in pieces}
    self.byte_fallback = {bytes([byte]) for byte in range(256)} <= singles

  def _find_losses(self, added: list[dict]) -> None:
    """Tries what the tokenizer changes."""
    with quiet_stderr(), library_errors():
      first = self._text.encode("a", add_special_tokens=False).ids
      self.adds_prefix = self.splits_words or (
        bool(first) and self._pieces[first[0]].startswith(b" ")
      )
      # Other added tokens, such as tool tags, match in plain text and may take spaces.
      probes = {
        f"a {token['content']} b": f"it loses spaces around {token['content']}"
        for token in added
        if not token["special"]
      }
      self.loss: str = find_loss(self, LOSS_PROBES | probes)
      self.is_lossless = not self.loss

  def control_id(self, *names: str) -> int:
    """Returns the id of the first of these special tokens that exists, or -1."""
    found = [self.special_tokens[name] for name in names if name in self.special_tokens]
    return found[0] if found else -1

  def encode(self, text: str, specials: bool = False) -> list[int]:
    """Returns the ids of `text`, without bos and eos.

    With `specials`, the name of a special token becomes that token, as everywhere in
    `transformers`. This is for rendered chat templates alone.
    """
    if not specials:
      return self.encode_batch([text])[0].tolist()
    if self._template is None:
      self._template = to_library(read_tokenizer_json(self.model))
      self._template.no_padding()
      self._template.no_truncation()
    require_unicode([text])
    with library_errors():
      return self._template.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str], num_threads=1) -> list[np.ndarray]:
    """Returns the ids (int32) of each text, on all cores unless `num_threads` is 1.

    The library sizes its thread pool by the cores that it may use. One thread does not
    use that pool, which does not survive a fork.
    """
    require_unicode(texts)
    short = [text for text in texts if len(text) <= CHUNK_CHARACTERS]
    with library_errors():
      if num_threads == 1:
        found = [self._text.encode(text, add_special_tokens=False) for text in short]
      else:
        found = self._text.encode_batch_fast(short, add_special_tokens=False)
    rows = iter([np.array(encoding.ids, np.int32) for encoding in found])
    return [
      next(rows)
      if len(text) <= CHUNK_CHARACTERS
      else np.concatenate(list(self.encode_long([text], num_threads)))
      for text in texts
    ]

  def encode_following(self, texts: Sequence[str], num_threads=1) -> list[np.ndarray]:
    """Returns the ids of texts that continue others: no space is put before them.

    They are encoded after a newline, whose ids are removed. A text that joins it is
    encoded as if it were the first.
    """
    line = self.encode("\n")
    rows = self.encode_batch(["\n" + text for text in texts], num_threads)
    return [
      row[len(line) :]
      if row[: len(line)].tolist() == line
      else self.encode_batch([text])[0]
      for text, row in zip(texts, rows, strict=True)
    ]

  def encode_long(self, texts: Iterable[str], num_threads=1) -> Iterator[np.ndarray]:
    """Yields the ids (int32) of one text that arrives in parts; see long_texts.py."""
    if self._can_cut:
      yield from join(self._windows(texts, num_threads), self._window)
    else:
      yield self._window(0, "".join(texts)).ids

  def _windows(self, texts: Iterable[str], num_threads: int) -> Iterator[Window]:
    chunks = overlapping(texts)
    at_once = BLOCK_CHARACTERS // CHUNK_CHARACTERS if num_threads > 1 else 1
    while group := list(itertools.islice(chunks, at_once)):
      if num_threads == 1:
        yield from itertools.starmap(self._window, group)
        continue
      given = [text for _, text in group]
      with library_errors():
        found = self._text.encode_batch(given, add_special_tokens=False)
      for (start, text), encoding in zip(group, found, strict=True):
        yield make_window(start, text, encoding)

  def _window(self, start: int, text: str) -> Window:
    with library_errors():
      encoding = self._text.encode(text, add_special_tokens=False)
    return make_window(start, text, encoding)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`: none for special tokens, U+FFFD for bad UTF-8.

    WordPiece does not keep spaces: one is put between all words and punctuation.
    """
    return Decoder(self)(ids, final=True)

  def piece(self, i: int) -> str:
    """Returns the piece of an id as the file writes it."""
    names = {i: name for name, i in self.special_tokens.items()}
    return names.get(i) or self._text.id_to_token(i)

  def pieces(self) -> list[bytes]:
    """Returns the UTF-8 text of each id."""
    return self._pieces


def make_window(start: int, text: str, encoding) -> Window:
  """Returns what the library found in a chunk of a text."""
  spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
  return Window(start, text, np.array(encoding.ids, np.int32), spans)


def read_vocabulary(tree: dict) -> dict[int, str]:
  """Returns the piece of each id of the model, without the added tokens."""
  vocab = tree["model"]["vocab"]
  if isinstance(vocab, list):  # unigram: pieces and their scores
    return {i: piece for i, (piece, _) in enumerate(vocab)}
  return {i: piece for piece, i in vocab.items()}


def hide_specials(tree: dict) -> dict:
  """Returns a copy of tokenizer.json in which no text can name a special token."""
  model, secret = dict(tree["model"]), secrets.token_hex(16)
  added = [dict(token) for token in tree["added_tokens"] or []]
  names = {}
  for token in added:
    if token["special"]:
      names[token["content"]] = f"{secret}-{token['id']}"
      token["content"] = names[token["content"]]
  vocab = model["vocab"]
  if isinstance(vocab, list):
    model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
  else:
    model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
  if "unk_token" in model:
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
  if "merges" in model and any(name in vocab for name in names):
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
  changes = {"model": model, "added_tokens": added, "post_processor": None}
  return tree | changes | {"truncation": None, "padding": None}


def check_numbers(added: list[dict], loaded) -> None:
  """Raises DataError if the library does not give added tokens the ids of the file."""
  for token in added:
    found = loaded.token_to_id(token["content"])
    if found != token["id"]:
      raise unreadable(f"the added token {token['id']} becomes {found} when loaded")


def token_bytes(
  tree: dict, pieces: dict[int, str], added: list[dict], size: int
) -> list[bytes]:
  """Returns the UTF-8 text of each id, as the file's decoder makes it from pieces."""
  to_bytes = piece_speller(decoder_steps(tree))
  spelt = [b""] * size
  for i, piece in pieces.items():
    spelt[i] = to_bytes(piece)
  for token in added:
    spelt[token["id"]] = b"" if token["special"] else token["content"].encode()
  return spelt


def decoder_steps(tree: dict) -> dict[str, dict]:
  """Returns the steps of the decoder by type."""
  decoder = tree.get("decoder")
  if not decoder:
    return {}
  steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
  return {step["type"]: step for step in steps}


def piece_speller(steps: dict[str, dict]) -> Callable[[str], bytes]:
  """Returns the function that turns a piece into the bytes that it stands for."""
  known = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "WordPiece"}
  unknown = steps.keys() - known - {"Fuse", "Strip"}
  if unknown:
    raise unreadable(f"decoder {' '.join(sorted(unknown))}")
  if "ByteLevel" in steps:
    letters = byte_letters()
    return lambda piece: b"".join([letters.get(c, c.encode()) for c in piece])
  if not steps or "WordPiece" in steps:
    prefix = steps["WordPiece"]["prefix"] if steps else "\0"
    return lambda piece: (
      piece[len(prefix) :] if piece.startswith(prefix) else " " + piece
    ).encode()
  space, shown = "", ""
  if "Metaspace" in steps:
    space, shown = steps["Metaspace"]["replacement"], " "
  elif "Replace" in steps:
    space, shown = steps["Replace"]["pattern"]["String"], steps["Replace"]["content"]

  def to_bytes(piece: str) -> bytes:
    if "ByteFallback" in steps and (byte := BYTE_PIECE.fullmatch(piece)):
      return bytes([int(byte[1], 16)])
    return (piece.replace(space, shown) if space else piece).encode()

  return to_bytes


def byte_letters() -> dict[str, bytes]:
  """Returns the byte of each letter of byte-level BPE (Radford et al. 2019).

  Printable bytes are their own letters; the letters from U+0100 on are the others.
  """
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in shown]
  letters = {chr(byte): bytes([byte]) for byte in shown}
  return letters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(hidden)}


def ids_before(tree: dict) -> list[int]:
  """Returns what a tokenizer.json puts before every text: bos, [CLS], or nothing."""
  step = tree.get("post_processor") or {}
  ids = []
  for part in step.get("processors", [step] if step else []):
    if part["type"] == "TemplateProcessing":
      for item in part["single"]:
        if "Sequence" in item:
          break
        ids += part["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    elif part["type"] in ("BertProcessing", "RobertaProcessing"):
      ids.append(part["cls"][1])
  return ids


def unknown_id(model: dict, pieces: dict[int, str]) -> int:
  """Returns the id of what is not in the vocabulary, or -1."""
  if model.get("unk_id") is not None:
    return model["unk_id"]
  name = model.get("unk_token")
  return next((i for i, piece in pieces.items() if name and piece == name), -1)


def guess_roles(names: dict[str, int]) -> dict[str, int]:
  """Finds the special token of each role by its usual names; see `fill_roles`."""
  ids = {}
  for role, known in USUAL_NAMES.items():
    found = [names[name] for name in known if name in names]
    ids |= {role: found[0]} if found else {}
  return fill_roles(ids)


def fill_roles(ids: dict[str, int]) -> dict[str, int]:
  """Completes the tokens that begin and end a document of a token store.

  BERT's documents are [CLS] text [SEP]. GPT-2's both begin and end with <|endoftext|>,
  so a model that writes from nothing starts from it.
  """
  ids = {role: i for role, i in ids.items() if i >= 0}
  if "bos" not in ids and "cls" in ids:
    ids["bos"] = ids["cls"]
  if "eos" not in ids and "sep" in ids:
    ids["eos"] = ids["sep"]
  return ids
