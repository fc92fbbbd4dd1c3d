"""Builds a token store: trains the tokenizer, tokenises each source, writes the shards.

A source is written in units, each a run of whole documents with about `shard_tokens`
tokens and a shard for either split. Files get their names when they are whole, the
unit's json after its shards, manifest.json last: killed anywhere, the next call goes on
after the last finished unit, and the store comes out the same to the byte.
"""

import collections
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from flaxlm import errors, files
from flaxlm.data.store import copies
from flaxlm.data.store.progress import BuildProgress
from flaxlm.data.store.recipe import check_recipe, make_recipe
from flaxlm.data.store.shards import (
  SPLITS,
  STORE_FORMAT,
  WORDS,
  ShardWriter,
  Store,
  dump,
  fingerprint_of,
)
from flaxlm.data.text import formats, remote
from flaxlm.data.text.documents import Corpus, TextPiece, open_source, split_of
from flaxlm.data.text.tfds import open_tfds_corpus
from flaxlm.tokenizer.files import (
  JSON,
  MODEL,
  AnyTokenizer,
  file_name,
  find_tokenizer,
  load_tokenizer,
  open_tokenizer,
)
from flaxlm.tokenizer.pieces import continues_word
from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer

ENCODED_TOGETHER = 1 << 21  # characters that are tokenised together
CHECKS = 32  # texts a batch that are decoded again and compared
UNKNOWN_LOST = "unknown character, lost"


class Report(NamedTuple):
  """What `build` did."""

  store: Store
  tokenizer: AnyTokenizer
  reused: bool
  checked: int  # texts that were decoded again
  changed: int  # of those, the ones that came back different
  rate: float  # MB/s of tokenising alone


def build_store(config: ConfigDict, log: Callable[[str], None]) -> Report:
  """Prepares config.data.store, or reuses it if it has been prepared by this recipe."""
  address = config.data.store
  check_sources(config)
  try:
    corpora = open_corpora(config)
    recipe = make_recipe(config, corpora)
    if not remote.is_remote(address):
      return build_in(pathlib.Path(address).expanduser(), config, corpora, recipe, log)
    if remote.exists(f"{address}/manifest.json"):
      return reuse(address, recipe, log)
    root = copies.building_directory(address)
    report = build_in(root, config, corpora, recipe, log)
    log(f"copying {root} to {address}")
    copies.upload(root, address)
    copies.keep_copy(root, report.store.fingerprint)
    return report._replace(store=Store(address))
  except OSError as error:
    raise cannot_write(address, error) from error


def build_in(
  root: pathlib.Path,
  config: ConfigDict,
  corpora: dict[str, Corpus],
  recipe: dict,
  log: Callable[[str], None],
) -> Report:
  """Prepares the store in the directory `root`, which one process at a time may do."""
  if (root / "manifest.json").exists():
    return reuse(root, recipe, log)
  with locked(root):
    if (root / "manifest.json").exists():
      return reuse(root, recipe, log)
    begin(root, recipe, log)
    tokenizer = make_tokenizer(root, config, corpora, log)
    checks = collections.Counter()
    units = {}
    sizes = {name: corpus.sizes for name, corpus in corpora.items()}
    with BuildProgress(sizes, log) as bar:
      for name, corpus in corpora.items():
        units[name] = write_source(root, name, corpus, tokenizer, config, bar, checks)
    words = continues_word(tokenizer).tobytes()
    manifest = make_manifest(recipe, tokenizer, words, units)
    check_sizes(manifest, config, root)
    files.write_atomically(root / WORDS, words)
    files.write_atomically(root / "manifest.json", dump(manifest))
  counts = checks["checked"], checks["changed"]
  return Report(Store(root), tokenizer, False, *counts, bar.rate)


def check_sources(config: ConfigDict) -> None:
  for name, source in config.data.sources.items():
    if not re.fullmatch(r"[\w-]+", name):
      raise errors.ConfigError(
        "config.data.sources", name, "a name of letters and digits"
      )
    if source.kind != "stdlib" and not source.path:
      raise errors.ConfigError(
        f"config.data.sources.{name}.path", "''",
        f"where the {source.kind} documents are", "'texts/**/*.txt'",
      )  # fmt: skip
    if config.data.split == "tail" and source.kind not in ("text", "stdlib"):
      raise errors.ConfigError(
        "config.data.split", f"tail, with {name}.kind={source.kind}",
        "sources of kind text: tail is the end of each text file", "hash",
      )  # fmt: skip


def open_corpora(config: ConfigDict) -> dict[str, Corpus]:
  tail = config.data.validation_fraction if config.data.split == "tail" else 0.0
  opened = {}
  for name, source in sorted(config.data.sources.items()):
    if source.kind == "tfds":
      opened[name] = open_tfds_corpus(name, source)
    else:
      opened[name] = open_source(name, source, tail)
  return opened


def reuse(root: pathlib.Path | str, recipe: dict, log: Callable[[str], None]) -> Report:
  found = Store(root)
  check_recipe(root, found.manifest["recipe"], recipe)
  log(f"reusing {root}: prepared by the same recipe")
  return Report(found, open_tokenizer(found.tokenizer), True, 0, 0, 0.0)


@contextlib.contextmanager
def locked(root: pathlib.Path) -> Iterator[None]:
  import filelock

  root.mkdir(parents=True, exist_ok=True)
  try:
    with filelock.FileLock(root / ".lock", timeout=0):
      yield
  except filelock.Timeout as error:
    raise errors.OutputError(
      f"config.data.store={root} is being prepared by another process\n"
      f"  given:  {root / '.lock'}, held\n  needed: one flaxlm.prepare at a time"
    ) from error


def begin(root: pathlib.Path, recipe: dict, log: Callable[[str], None]) -> None:
  """Claims the directory for this recipe, or goes on with what it began."""
  path = root / "recipe.json"
  if path.exists() and find_tokenizer(root):
    check_recipe(root, json.loads(path.read_text()), recipe)
    log(f"continuing {root}")
    return
  # Before the tokenizer there is nothing to keep: a corrected recipe replaces the old.
  ours = (".lock", "recipe.json", "recipe.json.tmp", f"{MODEL}.tmp", f"{JSON}.tmp")
  strange = [file.name for file in root.iterdir() if file.name not in ours]
  if strange:
    raise errors.OutputError(
      f"config.data.store={root} holds something else\n  given:  {strange[0]} in it\n"
      "  needed: an empty or a new directory"
    )
  files.write_atomically(path, dump(recipe))


def make_tokenizer(
  root: pathlib.Path,
  config: ConfigDict,
  corpora: dict[str, Corpus],
  log: Callable[[str], None],
) -> AnyTokenizer:
  """The tokenizer of the store: found there, brought along, or trained now."""
  knobs = config.tokenizer
  if path := find_tokenizer(root):
    return open_tokenizer(path.read_bytes())
  if knobs.path:
    tokenizer = load_tokenizer(knobs.path)
  else:
    log(f"training a {knobs.kind} tokenizer of {knobs.vocab_size} pieces")
    texts = sample_texts(config, corpora)
    lines = sample_lines(texts, knobs.train_bytes)
    model = train_tokenizer(
      lines, knobs.kind, knobs.vocab_size, knobs.byte_fallback, knobs.user_symbols
    )
    tokenizer = Tokenizer(model)
  for symbol in knobs.user_symbols:
    if tokenizer.control_id(symbol) < 0:
      needed = f"control symbols that {knobs.path} has"
      raise errors.ConfigError("config.tokenizer.user_symbols", symbol, needed, "()")
  if max(tokenizer.bos_id, tokenizer.eos_id) < 0:
    raise errors.ConfigError(
      "config.tokenizer.path", knobs.path, "a model with a bos or eos to part documents"
    )
  files.write_atomically(root / file_name(tokenizer.model), tokenizer.model)
  return tokenizer


def sample_texts(config: ConfigDict, corpora: dict[str, Corpus]) -> Iterator[str]:
  """Yields the text to train a tokenizer on: all of it, or a spread of a large corpus.

  Of more than 50 times `train_bytes`, every n-th file is read, and of each no more than
  that: more text would hardly change a vocabulary, and cost a pass over the disk.
  """
  most = 50 * config.tokenizer.train_bytes
  for name, corpus in corpora.items():
    step = max(1, sum(corpus.sizes) // most)
    left = config.data.sources[name].max_documents or float("inf")
    for number in range(0, len(corpus.files), step):
      size = 0
      for piece in corpus.read((number, 0)):
        if piece.position[0] != number or size > most or left <= 0:
          break
        size += len(piece.text)
        left -= piece.end
        yield piece.text


def write_source(
  root: pathlib.Path,
  name: str,
  corpus: Corpus,
  tokenizer: AnyTokenizer,
  config: ConfigDict,
  progress: BuildProgress,
  checks: collections.Counter,
) -> list[dict]:
  """Writes the units of one source that are not there yet; returns all of them."""
  folder = root / name
  folder.mkdir(exist_ok=True)
  units, position, count = [], (0, 0), 0
  while (path := folder / f"{len(units):06}.json").exists():
    units.append(json.loads(path.read_text()))
    position = tuple(units[-1]["next"])
    count += units[-1]["documents"]
  most = config.data.sources[name].max_documents
  pieces = corpus.read(position)
  if most:
    pieces = first_documents(pieces, most - count)
  progress.begin(name, position[0])
  stream = encoded(pieces, tokenizer, progress, checks)
  fraction = config.data.validation_fraction
  while True:
    number = len(units)
    unit = write_unit(
      stream, f"{name}/{number:06}", root, tokenizer, fraction, config.data.shard_tokens
    )
    if unit is None:
      return units
    files.write_atomically(folder / f"{number:06}.json", dump(unit))
    units.append(unit)


def first_documents(pieces: Iterable, count: int) -> Iterator[TextPiece]:
  if count > 0:
    for piece in pieces:
      yield piece
      count -= piece.end
      if not count:
        return


def encoded(
  pieces: Iterable[TextPiece],
  tokenizer: AnyTokenizer,
  progress: BuildProgress,
  checks: collections.Counter,
) -> Iterator[tuple[TextPiece, np.ndarray]]:
  """Yields (piece, ids), tokenised in batches on all cores; checks some round trips."""
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
  batch: list, ids: list, tokenizer: Tokenizer, checks: collections.Counter
) -> None:
  """Decodes some texts of a batch again; no loss where the tokenizer claims none."""
  size = 0
  for number in range(0, len(batch), -(-len(batch) // CHECKS)):
    text, back = batch[number].text, tokenizer.decode(ids[number])
    size += len(text)
    checks["checked"] += 1
    checks["changed"] += text != back
    if text != back and tokenizer.is_lossless:
      raise errors.DataError(
        f"a text does not survive the tokenizer\n  given:  {text[:40]!r}\n"
        f"  needed: the same, not {back[:40]!r}"
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
  """Writes the next documents of `stream`; returns None if there are none left."""
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
  """Moves documents from `stream` to the shards of a unit until it is large enough."""
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
    elif piece.end and formats.BAD_JSON not in found:
      found.add(formats.EMPTY)
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


def dtype_of(tokenizer: AnyTokenizer) -> str:
  return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def make_manifest(
  recipe: dict,
  tokenizer: AnyTokenizer,
  words: bytes,
  units: dict[str, list],
) -> dict:
  entries = {}
  for name, unit_list in units.items():
    problems = collections.Counter()
    for unit in unit_list:
      problems.update(unit["problems"])
    entries[name] = {"problems": dict(problems)}
    for split in SPLITS:
      shards = [unit["shards"][split] for unit in unit_list if split in unit["shards"]]
      entries[name][split] = {"shards": shards}
      for key in ("documents", "bytes", "tokens"):
        entries[name][split][key] = sum(shard[key] for shard in shards)
  manifest = {
    "format": STORE_FORMAT,
    "recipe": recipe,
    "tokenizer": {
      "file": file_name(tokenizer.model),
      "sha256": tokenizer.sha256,
      "words_sha256": hashlib.sha256(words).hexdigest(),
      "vocab_size": tokenizer.vocab_size,
      "is_lossless": tokenizer.is_lossless,
      "pad_id": tokenizer.pad_id,
      "bos_id": tokenizer.bos_id,
      "eos_id": tokenizer.eos_id,
      "unk_id": tokenizer.unk_id,
      "mask_id": tokenizer.mask_id,
      "cls_id": tokenizer.cls_id,
      "sep_id": tokenizer.sep_id,
      "special_tokens": tokenizer.special_tokens,
    },
    "dtype": dtype_of(tokenizer),
    "sources": entries,
  }
  return manifest | {"fingerprint": fingerprint_of(manifest)}


def check_sizes(manifest: dict, config: ConfigDict, root: pathlib.Path) -> None:
  """Refuses a store with nothing to train on or to validate on, and clears it away."""
  for name, entry in manifest["sources"].items():
    train, validation = entry["train"], entry["validation"]
    own_split = config.data.sources[name].validation_split
    wanted = config.data.validation_fraction or own_split
    if train["tokens"] and (validation["tokens"] or not wanted):
      continue
    empty = "validation" if train["tokens"] else "train"
    for source in manifest["sources"]:
      shutil.rmtree(root / source)
    find_tokenizer(root).unlink()
    (root / "recipe.json").unlink()
    found = ", ".join(f"{count} {what}" for what, count in entry["problems"].items())
    raise errors.DataError(
      f"the {empty} split of source {name} has no tokens\n"
      f"  given:  {train['documents']} train and {validation['documents']} validation "
      f"documents{' (' + found + ')' if found else ''}\n"
      "  needed: text in both\n"
      "  try:    a larger config.data.validation_fraction, smaller documents "
      f"(config.data.sources.{name}.document), or config.data.split=tail"
    )


def cannot_write(root: str, error: OSError) -> errors.UserError:
  full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
  kind = errors.StorageError if full else errors.OutputError
  more = "; then run the same command, it continues" if full else ""
  return kind(
    f"config.data.store={root} cannot be written\n  given:  {error}\n"
    f"  needed: a directory of yours with enough free space{more}"
  )
