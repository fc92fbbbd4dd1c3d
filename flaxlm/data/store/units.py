"""Tokenises a source and writes it in units, so that a killed preparation can continue.

A unit is a run of whole documents, about `shard_tokens` tokens, with one shard per
split. Its JSON file is written after its shards, so a unit that has one is complete,
and the next call continues after the last of these.
"""

import collections
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from ml_collections import ConfigDict

from flaxlm import errors, files
from flaxlm.data.store.manifest import SPLITS, broken, dtype_of, dump
from flaxlm.data.store.progress import BuildProgress
from flaxlm.data.store.shards import ShardWriter
from flaxlm.data.store.splits import first_documents
from flaxlm.data.text.documents import Corpus, TextPiece, split_of
from flaxlm.data.text.formats import BAD_JSON, CORRUPT, EMPTY
from flaxlm.json_files import read_json
from flaxlm.tokenizer.files import AnyTokenizer

ENCODED_TOGETHER = 1 << 21  # characters that are tokenised together
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
  for shard in unit["shards"].values():
    file = root / f"{shard['name']}.ids"
    size = shard["tokens"] * np.dtype(dtype_of(tokenizer)).itemsize
    found = file.stat().st_size if file.exists() else "missing"
    if found != size or not file.with_suffix(".index").exists():
      raise broken(file, f"{found} bytes with its index, not {size}")
  return unit


def check_of(unit: dict) -> str:
  """Returns the sha256 of the contents of a unit's JSON file."""
  content = {key: value for key, value in unit.items() if key != "check"}
  return hashlib.sha256(dump(content)).hexdigest()


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
  """Yields (piece, ids), tokenised in batches on all cores, and checks round trips."""
  threads = os.cpu_count() or 1
  if hasattr(os, "sched_getaffinity"):
    threads = len(os.sched_getaffinity(0))
  batch, size = [], 0

  def run():
    ids = tokenizer.encode_batch([piece.text for piece in batch], threads)
    check_round_trip(batch, ids, tokenizer, checks)
    num_bytes = sum(len(piece.text.encode()) for piece in batch)
    progress.update(batch[-1].position[0], num_bytes, sum(map(len, ids)))
    return zip(batch, ids, strict=True)

  for piece in pieces:
    batch.append(piece)
    size += len(piece.text)
    if size >= ENCODED_TOGETHER:
      yield from run()
      batch, size = [], 0
  if batch:
    yield from run()


def check_round_trip(
  batch: list, ids: list, tokenizer: AnyTokenizer, checks: collections.Counter
) -> None:
  """Decodes some texts of a batch; DataError if a lossless tokenizer changes one."""
  size = 0
  for number in range(0, len(batch), -(-len(batch) // CHECKS)):
    text, back = batch[number].text, tokenizer.decode(ids[number])
    size += len(text)
    checks["checked"] += 1
    checks["changed"] += text != back
    if text != back and tokenizer.is_lossless:
      raise errors.DataError(
        "the tokenizer changes a text",
        f"{text[:40]!r}",
        f"the same, not {back[:40]!r}",
      )
    if size > ENCODED_TOGETHER // 32:  # a few long texts are enough
      return


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
