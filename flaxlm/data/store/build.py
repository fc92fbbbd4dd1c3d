"""Builds a token store, or reuses one that the same recipe has built.

Files get their final names once they are complete, and manifest.json is written last.
A preparation that was killed continues after its last finished unit (units.py), and the
store is the same to the byte.
"""

import collections
import contextlib
import errno
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from flaxlm import errors, files
from flaxlm.data.store import copies
from flaxlm.data.store.manifest import WORDS_FILE, dump, make_manifest
from flaxlm.data.store.progress import BuildProgress
from flaxlm.data.store.recipe import check_recipe, make_recipe
from flaxlm.data.store.shards import Store
from flaxlm.data.store.tokenizer import make_tokenizer
from flaxlm.data.store.units import write_source
from flaxlm.data.text import remote
from flaxlm.data.text.documents import Corpus, open_source
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
  try:
    corpora = open_corpora(data)
    recipe = make_recipe(data, tokenizer, corpora)
    if not remote.is_remote(address):
      root = pathlib.Path(address).expanduser()
      return build_locally(root, data, tokenizer, corpora, recipe, log)
    if remote.exists(f"{address}/manifest.json"):
      return reuse(address, recipe, log)
    root = copies.building_directory(address)
    report = build_locally(root, data, tokenizer, corpora, recipe, log)
    log(f"copying {root} to {address}")
    copies.upload(root, address)
    copies.keep_copy(root, report.store.fingerprint)
    return report._replace(store=Store(address))
  except OSError as error:
    raise cannot_write(address, error) from error


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
    return reuse(root, recipe, log)
  with locked(root):
    if (root / "manifest.json").exists():
      return reuse(root, recipe, log)
    begin(root, recipe, log)
    tokenizer = make_tokenizer(root, knobs, data.sources, corpora, log)
    checks = collections.Counter()
    units = {}
    sizes = {name: corpus.sizes for name, corpus in corpora.items()}
    with BuildProgress(sizes, log) as bar:
      for name, corpus in corpora.items():
        units[name] = write_source(root, name, corpus, tokenizer, data, bar, checks)
    words = continues_word(tokenizer).tobytes()
    manifest = make_manifest(recipe, tokenizer, words, units)
    check_sizes(manifest, data, root)
    files.write_atomically(root / WORDS_FILE, words)
    files.write_atomically(root / "manifest.json", dump(manifest))
  counts = checks["checked"], checks["changed"]
  return Report(Store(root), tokenizer, False, *counts, bar.rate)


def check_sources(data: ConfigDict) -> None:
  """Raises ConfigError if a source has a bad name, no path or an impossible split."""
  for name, source in data.sources.items():
    if not re.fullmatch(r"[\w-]+", name):
      raise errors.ConfigError(
        "config.data.sources", name, "a name of letters and digits"
      )
    if source.kind != "stdlib" and not source.path:
      raise errors.ConfigError(
        f"config.data.sources.{name}.path", "''",
        f"where the {source.kind} documents are", "'texts/**/*.txt'",
      )  # fmt: skip
    if data.split == "tail" and source.kind not in ("text", "stdlib"):
      raise errors.ConfigError(
        "config.data.split", f"tail, with {name}.kind={source.kind}",
        "sources of kind text: tail is the end of each text file", "hash",
      )  # fmt: skip


def open_corpora(data: ConfigDict) -> dict[str, Corpus]:
  """Opens all sources, sorted by name."""
  if data.split == "tail":
    tail = data.validation_fraction
  elif data.split == "hash":
    tail = 0.0
  else:
    raise errors.ConfigError("config.data.split", data.split, "hash or tail")
  opened = {}
  for name, source in sorted(data.sources.items()):
    if source.kind == "tfds":
      opened[name] = open_tfds_corpus(name, source)
    else:
      opened[name] = open_source(name, source, tail)
  return opened


def reuse(root: pathlib.Path | str, recipe: dict, log: Callable[[str], None]) -> Report:
  """Opens the finished store at `root`; ConfigError if its recipe is another."""
  found = Store(root)
  check_recipe(root, found.manifest["recipe"], recipe)
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


def begin(root: pathlib.Path, recipe: dict, log: Callable[[str], None]) -> None:
  """Claims an empty directory for this recipe, or continues what the recipe began."""
  path = root / "recipe.json"
  if path.exists() and find_tokenizer(root):
    check_recipe(root, json.loads(path.read_text()), recipe)
    log(f"continuing {root}")
    return
  # Without a tokenizer there is nothing to keep: a corrected recipe replaces the old.
  ours = (".lock", "recipe.json", "recipe.json.tmp", f"{MODEL}.tmp", f"{JSON}.tmp")
  strange = [file.name for file in root.iterdir() if file.name not in ours]
  if strange:
    raise errors.OutputError(
      f"config.data.store={root} holds something else",
      f"{strange[0]} in it",
      "an empty or a new directory",
    )
  files.write_atomically(path, dump(recipe))


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
    found = ", ".join(f"{count} {what}" for what, count in entry["problems"].items())
    raise errors.DataError(
      f"the {empty} split of source {name} has no tokens",
      f"{train['documents']} train and {validation['documents']} validation "
      f"documents{' (' + found + ')' if found else ''}",
      "text in both",
      "a larger config.data.validation_fraction, smaller documents "
      f"(config.data.sources.{name}.document), or config.data.split=tail",
    )


def cannot_write(root: str, error: OSError) -> errors.UserError:
  """Returns a StorageError if the device is full or bad, otherwise an OutputError."""
  full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
  kind = errors.StorageError if full else errors.OutputError
  more = "; then run the same command, it continues" if full else ""
  return kind(
    f"config.data.store={root} cannot be written",
    error,
    f"a directory of yours with enough free space{more}",
  )
