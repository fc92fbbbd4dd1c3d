"""Tokenises a source and writes it in units, so that a killed preparation can continue.

A unit is a run of whole documents, about `shard_tokens` tokens, with one shard per
split. Its JSON file is written after its shards, so a unit that has one is complete,
and the next call continues after the last of these.
"""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from ml_collections import ConfigDict

from flaxlm import errors, files
from flaxlm.data.store.manifest import SPLITS, dtype_of, dump
from flaxlm.data.store.progress import BuildProgress
from flaxlm.data.store.shards import ShardWriter
from flaxlm.data.text.documents import Corpus, TextPiece, split_of
from flaxlm.data.text.formats import BAD_JSON, EMPTY
from flaxlm.tokenizer.files import AnyTokenizer

ENCODED_TOGETHER = 1 << 21  # characters that are tokenised together
CHECKS = 32  # texts per batch that are decoded again and compared
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
  units, position, count = [], (0, 0), 0
  while (path := folder / f"{len(units):06}.json").exists():
    units.append(json.loads(path.read_text()))
    position = tuple(units[-1]["next"])
    count += units[-1]["documents"]
  most = data.sources[name].max_documents
  pieces = corpus.read(position)
  if most:
    pieces = first_documents(pieces, most - count)
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
    files.write_atomically(folder / f"{number:06}.json", dump(unit))
    units.append(unit)


def first_documents(pieces: Iterable[TextPiece], count: int) -> Iterator[TextPiece]:
  """Yields the pieces of the first `count` documents."""
  if count > 0:
    for piece in pieces:
      yield piece
      count -= piece.end
      if not count:
        return


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
    elif piece.end and BAD_JSON not in found:
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
