"""Tokenises a source and writes it in units, so that a killed preparation can continue.

A unit is a run of whole documents, about `shard_tokens` tokens, with one shard per
split. Its JSON file is written after its shards, so a unit that has one is complete,
and the next call continues after the last of these.
"""

import collections
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from ml_collections import ConfigDict

from flaxlm import errors, files
from flaxlm.data.store.manifest import SPLITS, broken, check_of, dtype_of, dump
from flaxlm.data.store.progress import BuildProgress
from flaxlm.data.store.shards import ShardWriter
from flaxlm.data.store.splits import first_documents
from flaxlm.data.text.documents import Corpus, TextPiece, split_of
from flaxlm.data.text.formats import BAD_JSON, CORRUPT, EMPTY
from flaxlm.json_files import read_json
from flaxlm.tokenizer.files import AnyTokenizer
from flaxlm.tokenizer.pieces import Decoder

ENCODED_TOGETHER = 1 << 21  # characters that are tokenised together
NO_IDS = np.zeros(0, np.int32)
CHECKS = 32  # texts per batch that are decoded again and compared
# Of a source, with config.data.on_corrupt=skip: documents, or this part of all.
MOST_LOST, MOST_LOST_FRACTION = 100, 0.01
UNKNOWN_LOST = "unknown character, lost"


def write_source(
  root: pathlib.Path,
  name: str,
  corpus: Corpus,
  tokenizer: AnyTokenizer,
  data: ConfigDict,
  progress: BuildProgress,
  checks: collections.Counter,
) -> list[dict]:
  """Writes the units of source `name` that do not exist yet; returns all of them.

  Args:
    data: config.data.
    checks: counts the texts that were "checked" by decoding them again, and those of
      them that came back "changed".
  """
  folder = root / name
  folder.mkdir(exist_ok=True)
  units, position = [], (0, 0)
  while (path := folder / f"{len(units):06}.json").exists():
    units.append(read_unit(path, root, tokenizer))
    position = tuple(units[-1]["next"])
  most = data.sources[name].max_documents
  count = sum(unit["documents"] for unit in units)
  if most and most <= count:
    return units
  pieces = first_documents(corpus.read(position), most and most - count)
  progress.begin(name, position[0])
  stream = encode_stream(pieces, tokenizer, progress, checks)
  fraction = data.validation_fraction
  while True:
    number = len(units)
    unit = write_unit(
      stream, f"{name}/{number:06}", root, tokenizer, fraction, data.shard_tokens
    )
    if unit is None:
      return units
    unit["tokenizer"] = tokenizer.sha256
    unit["check"] = check_of(unit)
    files.write_atomically(folder / f"{number:06}.json", dump(unit))
    units.append(unit)
    check_lost(name, units)


def read_unit(path: pathlib.Path, root: pathlib.Path, tokenizer: AnyTokenizer) -> dict:
  """Returns the unit that a JSON file describes.

  Raises:
    DataError: the file or a shard of the unit is damaged, or another tokenizer made it.
  """
  fields = {"next": list, "documents": int, "problems": dict, "shards": dict}
  unit = read_json(path, fields)
  # Units of older versions have no check, and do not name their tokenizer.
  if unit.get("check", check_of(unit)) != check_of(unit):
    raise broken(path, "its contents do not match their check")
  if unit.get("tokenizer", tokenizer.sha256) != tokenizer.sha256:
    raise broken(path, f"another tokenizer made it, not that of {root}")
  try:
    sizes = {shard["name"]: shard["tokens"] for shard in unit["shards"].values()}
  except (KeyError, TypeError) as error:
    raise broken(path, f"no unit of a store ({error})") from None
  for name, tokens in sizes.items():
    file = root / f"{name}.ids"
    size = tokens * np.dtype(dtype_of(tokenizer)).itemsize
    found = file.stat().st_size if file.exists() else "missing"
    if found != size or not file.with_suffix(".index").exists():
      raise broken(file, f"{found} bytes with its index, not {size}")
  return unit


def check_lost(source: str, units: list[dict]) -> None:
  """Raises DataError if too many documents of a source are damaged."""
  lost = sum(unit["problems"].get(CORRUPT, 0) for unit in units)
  documents = sum(unit["documents"] for unit in units)
  if lost > max(MOST_LOST, documents * MOST_LOST_FRACTION):
    raise errors.DataError(
      f"source {source} is damaged", f"{lost:,} of {documents:,} documents lost",
      f"at most {MOST_LOST}, or {MOST_LOST_FRACTION:.0%} of its documents",
      "copy or prepare its files again",
    )  # fmt: skip


def encode_stream(
  pieces: Iterable[TextPiece],
  tokenizer: AnyTokenizer,
  progress: BuildProgress,
  checks: collections.Counter,
) -> Iterator[tuple[TextPiece, np.ndarray]]:
  """Yields (piece, ids), tokenised in batches on all cores, and checks round trips.

  Documents are encoded whole. The ids of a document come with some of its pieces, in
  their order.
  """
  threads = os.cpu_count() or 1
  if hasattr(os, "sched_getaffinity"):
    threads = len(os.sched_getaffinity(0))
  batch, document, size = [], [], 0
  pieces = iter(pieces)
  for piece in pieces:
    document.append(piece)
    size += len(piece.text)
    if piece.end:
      batch.append(document)
      document = []
    if size >= ENCODED_TOGETHER:
      yield from encode_documents(batch, tokenizer, threads, progress, checks)
      batch, size = [], sum(len(piece.text) for piece in document)
    if size >= ENCODED_TOGETHER:
      rest = itertools.chain(document, pieces)
      yield from encode_long_document(rest, tokenizer, threads, progress, checks)
      document, size = [], 0
  yield from encode_documents(batch, tokenizer, threads, progress, checks)


def encode_documents(
  batch: list[list[TextPiece]],
  tokenizer: AnyTokenizer,
  threads: int,
  progress: BuildProgress,
  checks: collections.Counter,
) -> Iterator[tuple[TextPiece, np.ndarray]]:
  """Yields (piece, ids) of some documents; the ids come with the last piece."""
  texts = ["".join([piece.text for piece in document]) for document in batch]
  ids = tokenizer.encode_batch(texts, threads)
  check_round_trip(texts, ids, tokenizer, checks)
  if batch:
    num_bytes = sum(len(text.encode()) for text in texts)
    progress.update(batch[-1][-1].position[0], num_bytes, sum(map(len, ids)))
  for document, row in zip(batch, ids, strict=True):
    yield from [(piece, NO_IDS) for piece in document[:-1]]
    yield document[-1], row


def encode_long_document(
  pieces: Iterator[TextPiece],
  tokenizer: AnyTokenizer,
  threads: int,
  progress: BuildProgress,
  checks: collections.Counter,
) -> Iterator[tuple[TextPiece, np.ndarray]]:
  """Yields (piece, ids) of the first document of `pieces`, as it is read."""
  taken, trip = collections.deque(), RoundTrip(tokenizer)

  def texts():
    for piece in pieces:
      taken.append(piece)
      trip.add_text(piece.text)
      yield piece.text
      if piece.end:
        return

  held = [NO_IDS]
  for ids in tokenizer.encode_long(texts(), threads):
    trip.add_ids(ids)
    held.append(ids)
    while len(taken) > 1:  # the last piece comes after all ids
      yield count_piece(taken.popleft(), held, progress)
      held = [NO_IDS]
  trip.end(checks)
  yield count_piece(taken.popleft(), held, progress)


def count_piece(piece: TextPiece, held: list[np.ndarray], progress: BuildProgress):
  """Counts a piece of a long document as tokenised; returns (piece, ids)."""
  ids = np.concatenate(held)
  progress.update(piece.position[0], len(piece.text.encode()), len(ids))
  return piece, ids


class RoundTrip:
  """Compares a long text with the text of its ids, as both arrive."""

  def __init__(self, tokenizer: AnyTokenizer):
    self._is_lossless, self._decode = tokenizer.is_lossless, Decoder(tokenizer)
    self._text, self._back, self._changed = "", "", False

  def add_text(self, text: str) -> None:
    self._text = "" if self._changed else self._text + text

  def add_ids(self, ids: np.ndarray, final: bool = False) -> None:
    if self._changed:
      return
    self._back += self._decode(ids, final)
    size = len(self._text if final else self._back)
    if self._text[:size] != self._back:
      self._changed = True
      if self._is_lossless:
        raise changed_text(self._text, self._back)
    self._text, self._back = self._text[size:], ""

  def end(self, checks: collections.Counter) -> None:
    """Compares what is left; counts the text as "checked", and perhaps "changed"."""
    self.add_ids(NO_IDS, final=True)
    checks["checked"] += 1
    checks["changed"] += self._changed


def check_round_trip(
  texts: list[str],
  ids: list[np.ndarray],
  tokenizer: AnyTokenizer,
  checks: collections.Counter,
) -> None:
  """Decodes some documents; DataError if a lossless tokenizer changes one."""
  size = 0
  for number in range(0, len(texts), max(1, -(-len(texts) // CHECKS))):
    text, back = texts[number], tokenizer.decode(ids[number])
    size += len(text)
    checks["checked"] += 1
    checks["changed"] += text != back
    if text != back and tokenizer.is_lossless:
      raise changed_text(text, back)
    if size > ENCODED_TOGETHER // 32:  # a few long texts are enough
      return


def changed_text(text: str, back: str) -> errors.DataError:
  """Returns the error for a text that does not survive a lossless tokenizer."""
  pairs = enumerate(zip(text, back, strict=False))
  at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
  return errors.DataError(
    "the tokenizer changes a text",
    f"{text[max(at - 20, 0) : at + 20]!r}",
    f"the same, not {back[max(at - 20, 0) : at + 20]!r}",
  )


def write_unit(
  stream: Iterator[tuple[TextPiece, np.ndarray]],
  stem: str,
  root: pathlib.Path,
  tokenizer: AnyTokenizer,
  fraction: float,
  shard_tokens: int,
) -> dict | None:
  """Writes the next documents of `stream` to shards named `stem`-SPLIT.

  Returns:
    the contents of the unit's JSON file; None if no document is left.
  """
  dtype = np.dtype(dtype_of(tokenizer))
  names = {split: f"{stem}-{split}" for split in SPLITS}
  shards = {s: ShardWriter(root, name, dtype) for s, name in names.items()}
  try:
    return fill_shards(stream, shards, tokenizer, fraction, shard_tokens)
  finally:
    for shard in shards.values():
      shard.close()


def fill_shards(
  stream: Iterator[tuple[TextPiece, np.ndarray]],
  shards: dict[str, ShardWriter],
  tokenizer: AnyTokenizer,
  fraction: float,
  shard_tokens: int,
) -> dict | None:
  """Moves documents from `stream` to the shards of a unit until they are large enough.

  Empty documents are counted as problems and written to no shard.
  """
  problems, documents, following = collections.Counter(), 0, None
  found, shard = set(), None
  for piece, ids in stream:
    found.update(piece.problems)
    text = piece.text.encode()
    if not tokenizer.byte_fallback:
      problems[UNKNOWN_LOST] += int((ids == tokenizer.unk_id).sum())
    if shard is None and text:
      shard = shards[piece.split or split_of(text, fraction)]
      shard.begin(tokenizer.bos_id)
    if shard is not None:
      shard.add(ids, len(text))
    elif piece.end and not found & {BAD_JSON, CORRUPT}:
      found.add(EMPTY)
    if not piece.end:
      continue
    if shard is not None:
      shard.end(tokenizer.eos_id)
    documents, following = documents + 1, piece.position
    problems.update(found)
    found, shard = set(), None
    if sum(shard.tokens for shard in shards.values()) >= shard_tokens:
      break
  if not documents:
    return None
  return {
    "next": list(following),
    "documents": documents,
    "problems": {key: count for key, count in sorted(problems.items()) if count},
    "shards": {
      split: shard.finish() for split, shard in shards.items() if shard.tokens
    },
  }
