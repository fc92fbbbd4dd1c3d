"""The recipe of a token store: everything that decides its bytes.

It is kept in the store, which is reused only for the same recipe. Stores of older
versions recorded the names and sizes of their sources, not their contents.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from flaxlm import errors, json_files
from flaxlm.config.tree import flatten
from flaxlm.data.store.manifest import SOURCES_FILE, broken, check_of, dump
from flaxlm.data.text.contents import Seen
from flaxlm.data.text.documents import Corpus
from flaxlm.files import write_atomically
from flaxlm.tokenizer.files import load_tokenizer

# The knobs of a source that decide what is in a store; its weight does not.
SOURCE_KEYS = (
  "kind",
  "field",
  "document",
  "split",
  "validation_split",
  "max_documents",
)
TOKENIZER_KEYS = ("kind", "vocab_size", "byte_fallback", "user_symbols", "train_bytes")
# What this host saw of the sources; other hosts see other times.
SEEN_FILE = ".seen.json"
SOURCES_LIMIT = 1 << 30  # bytes of a list of all files


def make_recipe(
  data: ConfigDict,
  tokenizer: ConfigDict,
  corpora: dict[str, Corpus],
  splits: dict[str, str],
) -> dict:
  """Returns the recipe of config.data and config.tokenizer, as JSON gives it back.

  Args:
    splits: what `choose_splits` returns.
  """
  if tokenizer.path:
    recipe = {"sha256": load_tokenizer(tokenizer.path).sha256}
  else:
    recipe = {key: tokenizer[key] for key in TOKENIZER_KEYS}
  recipe = {
    "validation_fraction": data.validation_fraction,
    "shard_tokens": data.shard_tokens,
    "on_corrupt": data.on_corrupt,
    "tokenizer": recipe,
    "sources": {
      name: {key: data.sources[name][key] for key in SOURCE_KEYS}
      | {"validation": splits[name], "files": corpus.old_fingerprint}
      | {"contents": corpus.fingerprint}
      for name, corpus in corpora.items()
    },
  }
  return json.loads(json.dumps(recipe))


def write_recipe(path: pathlib.Path, recipe: dict) -> None:
  """Writes what `read_recipe` reads."""
  write_atomically(path, dump(recipe | {"check": check_of(recipe)}))


def read_recipe(path: pathlib.Path) -> dict:
  """Returns the recipe in a file; DataError if it is damaged."""
  recipe = json_files.read_json(path, {"sources": dict, "tokenizer": dict})
  # Recipes of older versions have no check.
  if recipe.pop("check", check_of(recipe)) != check_of(recipe):
    raise broken(path, "its contents do not match their check")
  if not all(isinstance(source, dict) for source in recipe["sources"].values()):
    raise broken(path, "a source without settings")
  return upgrade(recipe)


def upgrade(recipe: dict) -> dict:
  """Returns a recipe, maybe of an older version, as this version writes them."""
  recipe = {"on_corrupt": "stop"} | recipe
  split = recipe.pop("split", "hash")
  recipe["sources"] = {
    name: {"validation": split} | source for name, source in recipe["sources"].items()
  }
  return recipe


def check_recipe(
  root: pathlib.Path | str,
  old: dict,
  new: dict,
  corpora: dict[str, Corpus],
  log: Callable[[str], None],
) -> None:
  """Raises ConfigError, which names the differences, if two recipes differ.

  Args:
    old: the recipe of the store, as `upgrade` returns it.
    log: is told about sources whose contents the old recipe does not record.
  """
  new = json.loads(json.dumps(new))
  for name, source in old["sources"].items():
    mine = new["sources"].get(name, {})
    if "contents" in source:  # names and sizes are in it
      mine["files"] = source.get("files")
    elif mine:
      mine.pop("contents", None)
      log(
        f"warning: {root} is of an older version, which recorded no contents: of "
        f"source {name}, only names and sizes of files were compared"
      )
  old, new = flatten(old), flatten(new)
  keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
  if not keys:
    return
  changes = [
    f"{key}={old.get(key)!r} (now {new.get(key)!r})"
    for key in keys
    if not key.endswith((".files", ".contents"))
  ]
  if not changes:
    groups = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    changes = [f"other files in {group}" for group in groups]
    changes += describe_changes(root, corpora)
  raise errors.ConfigError(
    "config.data.store", f"{root}, prepared with {', '.join(changes[:3])}",
    "a store that this config prepared, or a new directory",
    f"--config.data.store={root}-2, or delete {root}",
  )  # fmt: skip


def list_sources(corpora: dict[str, Corpus]) -> bytes:
  """Returns the contents of SOURCES_FILE: name, size and sha256 of each file."""
  listing = {
    name: [
      [file.encode(errors="backslashreplace").decode(), seen.size, seen.sha256]
      for file, seen in zip(corpus.names, corpus.seen.values(), strict=True)
    ]
    for name, corpus in corpora.items()
  }
  return dump(listing)


def describe_changes(root: pathlib.Path | str, corpora: dict[str, Corpus]) -> list[str]:
  """Returns the files that are not as SOURCES_FILE lists them, in a list of one text.

  The list is empty for a store at an address, or of an older version.
  """
  path = pathlib.Path(root) / SOURCES_FILE
  if not path.exists():
    return []
  listing = json_files.read_json(path, limit=SOURCES_LIMIT)
  changed = {}
  for name, files in json.loads(list_sources(corpora)).items():
    sets = [set(map(tuple, found)) for found in (listing.get(name, []), files)]
    changed |= dict.fromkeys(file for file, *_ in sorted(sets[0] ^ sets[1]))
  return [f"which are {' '.join([*changed][:5])}{' …' * (len(changed) > 5)}"]


def read_seen(root: pathlib.Path) -> dict[str, Seen]:
  """Returns what this host saw of the sources of the store at `root`, if it did."""
  try:
    found = json_files.read_json(root / SEEN_FILE, limit=SOURCES_LIMIT)
    return {path: Seen(*values) for path, values in found.items()}
  except (OSError, TypeError, errors.DataError):
    return {}  # the files are read again


def write_seen(root: pathlib.Path, corpora: dict[str, Corpus]) -> None:
  """Keeps what this host saw of the sources, where it may write."""
  seen = {
    path: file for corpus in corpora.values() for path, file in corpus.seen.items()
  }
  if seen == read_seen(root):
    return
  with contextlib.suppress(OSError):  # the files are read again
    write_atomically(root / SEEN_FILE, dump(seen))
