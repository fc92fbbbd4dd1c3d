"""Builds a token store, or reuses one that the same recipe has built.

Files get their final names once they are complete, and manifest.json is written last.
A preparation that was killed continues after its last finished unit (units.py), and the
store is the same to the byte.
"""

import collections
import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from flaxlm import errors, files
from flaxlm.data.store import copies
from flaxlm.data.store.manifest import (
  SOURCES_FILE,
  SPLITS,
  WORDS_FILE,
  dtype_of,
  dump,
  make_manifest,
)
from flaxlm.data.store.overlap import count_overlap
from flaxlm.data.store.progress import BuildProgress
from flaxlm.data.store.recipe import (
  SEEN_FILE,
  check_recipe,
  list_sources,
  make_recipe,
  read_recipe,
  read_seen,
  upgrade,
  write_recipe,
  write_seen,
)
from flaxlm.data.store.shards import Store
from flaxlm.data.store.splits import (
  check_documents,
  choose_splits,
  count_shared_files,
  describe_split,
  no_tokens,
)
from flaxlm.data.store.tokenizer import make_tokenizer
from flaxlm.data.store.units import write_source
from flaxlm.data.text import remote
from flaxlm.data.text.contents import unreadable_source
from flaxlm.data.text.documents import Corpus, open_source, with_tail
from flaxlm.data.text.tfds import open_tfds_corpus
from flaxlm.tokenizer.files import (
  JSON,
  MODEL,
  AnyTokenizer,
  find_tokenizer,
  open_tokenizer,
)
from flaxlm.tokenizer.pieces import continues_word


class Report(NamedTuple):
  """What `build_store` did."""

  store: Store
  tokenizer: AnyTokenizer
  reused: bool
  checked: int  # texts that were decoded again
  changed: int  # those of them that differed from the original
  rate: float  # MB/s while tokenising


def build_store(
  data: ConfigDict, tokenizer: ConfigDict, log: Callable[[str], None]
) -> Report:
  """Builds the token store data.store, or reuses it if its recipe is the same.

  Args:
    data: config.data.
    tokenizer: config.tokenizer.

  Raises:
    ConfigError: a knob cannot be used, or another recipe built this store.
    MissingInputError, DataError: a source is missing, damaged or empty.
    OutputError, StorageError: the directory cannot be written.
  """
  address = data.store
  check_sources(data)
  is_remote = remote.is_remote(address)
  if is_remote:
    root = copies.building_directory(address)
  else:
    root = pathlib.Path(address).expanduser()
  try:
    stored = stored_recipe(address, root)
    corpora = open_corpora(data, root, log)
    splits = choose_splits(data, corpora, stored)
    corpora = split_corpora(data, corpora, splits)
    recipe = make_recipe(data, tokenizer, corpora, splits)
    if not is_remote:
      return build_locally(root, data, tokenizer, corpora, recipe, log)
    if remote.exists(f"{address}/manifest.json"):
      return reuse(address, recipe, corpora, log)
    report = build_locally(root, data, tokenizer, corpora, recipe, log)
    log(f"copying {root} to {address}")
    copies.upload(root, address)
    copies.keep_copy(root, report.store.fingerprint)
    return report._replace(store=Store(address))
  except OSError as error:
    raise cannot_write(address, root, error) from error


def split_corpora(
  data: ConfigDict, corpora: dict[str, Corpus], splits: dict[str, str]
) -> dict[str, Corpus]:
  """Returns the corpora, those of which the tail is for validation with their tails."""
  split = dict(corpora)
  for name, corpus in corpora.items():
    if splits[name] == "tail":
      fraction, source = data.validation_fraction, data.sources[name]
      split[name] = with_tail(corpus, source, fraction, data.on_corrupt)
  return split


def stored_recipe(address: str, root: pathlib.Path) -> dict | None:
  """Returns the recipe of the store that is there, or that was begun; else None."""
  if remote.is_remote(address) and remote.exists(f"{address}/manifest.json"):
    return upgrade(Store(address).manifest["recipe"])
  if (root / "manifest.json").exists():
    return upgrade(Store(root).manifest["recipe"])
  if (root / "recipe.json").exists() and find_tokenizer(root):
    return read_recipe(root / "recipe.json")
  return None


def build_locally(
  root: pathlib.Path,
  data: ConfigDict,
  knobs: ConfigDict,
  corpora: dict[str, Corpus],
  recipe: dict,
  log: Callable[[str], None],
) -> Report:
  """Builds the store in the directory `root`; one process at a time may do so.

  Args:
    knobs: config.tokenizer.
  """
  if (root / "manifest.json").exists():
    return reuse(root, recipe, corpora, log)
  with locked(root):
    if (root / "manifest.json").exists():
      return reuse(root, recipe, corpora, log)
    recipe = begin(root, recipe, corpora, log)
    if not find_tokenizer(root):
      check_documents(data, corpora, recipe)
      describe_sources(data, corpora, recipe, log)
    tokenizer = make_tokenizer(root, knobs, data.sources, corpora, log)
    checks = collections.Counter()
    units = {}
    sizes = {name: corpus.sizes for name, corpus in corpora.items()}
    with BuildProgress(sizes, log) as bar:
      for name, corpus in corpora.items():
        units[name] = write_source(root, name, corpus, tokenizer, data, bar, checks)
    overlap = {}
    if any(splits_are_given(source) for source in recipe["sources"].values()):
      overlap = count_overlap(root, units, np.dtype(dtype_of(tokenizer)))
    words = continues_word(tokenizer).tobytes()
    manifest = make_manifest(recipe, tokenizer, words, units, overlap)
    check_sizes(manifest, data, root)
    files.write_atomically(root / WORDS_FILE, words)
    files.write_atomically(root / "manifest.json", dump(manifest))
  counts = checks["checked"], checks["changed"]
  return Report(Store(root), tokenizer, False, *counts, bar.rate)


def splits_are_given(source: dict) -> bool:
  """Returns whether equal documents of a source may be in both splits."""
  return source["validation"] == "tail" or bool(source["validation_split"])


def describe_sources(
  data: ConfigDict, corpora: dict[str, Corpus], recipe: dict, log: Callable[[str], None]
) -> None:
  """Says what each source is validated on, and which files sources share."""
  for name, corpus in corpora.items():
    if data.validation_fraction and not data.sources[name].validation_split:
      kind = recipe["sources"][name]["validation"]
      log(describe_split(name, kind, corpus, data.validation_fraction))
  for (one, other), count in count_shared_files(corpora).items():
    log(f"warning: {count:,} files of source {one} are files of source {other} too")


def check_sources(data: ConfigDict) -> None:
  """Raises ConfigError if a source has no path or an impossible split."""
  for name, source in data.sources.items():
    if source.kind != "stdlib" and not source.path:
      raise errors.ConfigError(
        f"config.data.sources.{name}.path", "''",
        f"where the {source.kind} documents are", "'texts/**/*.txt'",
      )  # fmt: skip
    if data.split == "tail" and source.kind == "tfds":
      raise errors.ConfigError(
        "config.data.split", f"tail, with {name}.kind=tfds",
        "sources in files: tail is the end of each file", "auto",
      )  # fmt: skip


def open_corpora(
  data: ConfigDict, root: pathlib.Path, log: Callable[[str], None]
) -> dict[str, Corpus]:
  """Opens all sources, sorted by name.

  Args:
    root: where the store is, with what was seen of the sources when it was built.
  """
  opened, known = {}, read_seen(root)
  for name, source in sorted(data.sources.items()):
    if source.kind == "tfds":
      opened[name] = open_tfds_corpus(name, source, data.on_corrupt, known, log)
    else:
      opened[name] = open_source(name, source, 0.0, data.on_corrupt, known, log)
  return opened


def reuse(
  root: pathlib.Path | str,
  recipe: dict,
  corpora: dict[str, Corpus],
  log: Callable[[str], None],
) -> Report:
  """Opens the finished store at `root`; ConfigError if its recipe is another."""
  found = Store(root)
  check_recipe(root, upgrade(found.manifest["recipe"]), recipe, corpora, log)
  if isinstance(root, pathlib.Path):
    write_seen(root, corpora)  # times may be others: of a copy on another host
  log(f"reusing {root}: prepared by the same recipe")
  return Report(found, open_tokenizer(found.tokenizer), True, 0, 0, 0.0)


@contextlib.contextmanager
def locked(root: pathlib.Path) -> Iterator[None]:
  """Makes the directory `root` and holds its lock; OutputError if it is taken."""
  import filelock

  root.mkdir(parents=True, exist_ok=True)
  try:
    with filelock.FileLock(root / ".lock", timeout=0):
      yield
  except filelock.Timeout as error:
    raise errors.OutputError(
      f"config.data.store={root} is being prepared by another process",
      f"{root / '.lock'}, held",
      "one flaxlm.prepare at a time",
    ) from error


def begin(
  root: pathlib.Path,
  recipe: dict,
  corpora: dict[str, Corpus],
  log: Callable[[str], None],
) -> dict:
  """Claims an empty directory for this recipe, or continues what the recipe began.

  Returns:
    the recipe of the store: that which began it does not claim contents that an older
    version did not record.
  """
  path = root / "recipe.json"
  if path.exists() and find_tokenizer(root):
    begun = read_recipe(path)
    check_recipe(root, begun, recipe, corpora, log)
    log(f"continuing {root}")
    return begun
  # Without a tokenizer there is nothing to keep: a corrected recipe replaces the old.
  kept = ("recipe.json", SOURCES_FILE, SEEN_FILE, MODEL, JSON)
  ours = {".lock", *kept, *(f"{name}.tmp" for name in kept)} - {MODEL, JSON}
  strange = [file.name for file in root.iterdir() if file.name not in ours]
  if strange:
    raise errors.OutputError(
      f"config.data.store={root} holds something else",
      f"{strange[0]} in it",
      "an empty or a new directory",
    )
  write_seen(root, corpora)
  files.write_atomically(root / SOURCES_FILE, list_sources(corpora))
  write_recipe(path, recipe)
  return recipe


def check_sizes(manifest: dict, data: ConfigDict, root: pathlib.Path) -> None:
  """Deletes a store with nothing to train on or to validate on, and says so.

  Raises:
    DataError: a split that the config asks for has no tokens.
  """
  for name, entry in manifest["sources"].items():
    train, validation = entry["train"], entry["validation"]
    wanted = data.validation_fraction or data.sources[name].validation_split
    if train["tokens"] and (validation["tokens"] or not wanted):
      continue
    empty = "validation" if train["tokens"] else "train"
    for source in manifest["sources"]:
      shutil.rmtree(root / source)
    find_tokenizer(root).unlink()
    (root / "recipe.json").unlink()
    counts = {split: entry[split]["documents"] for split in SPLITS}
    raise no_tokens(name, empty, counts, entry["problems"])


def cannot_write(address: str, root: pathlib.Path, error: OSError) -> errors.UserError:
  """Returns the error for a file of the store, or of a source, that failed.

  It is a StorageError if the device is full or bad.
  """
  file = pathlib.Path(os.fsdecode(error.filename or root))
  if not file.is_relative_to(root) and file not in root.parents:
    return unreadable_source(str(file), error)
  full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
  kind = errors.StorageError if full else errors.OutputError
  more = "; then run the same command, it continues" if full else ""
  return kind(
    f"config.data.store={address} cannot be written",
    error,
    f"a directory of yours with enough free space{more}",
  )
