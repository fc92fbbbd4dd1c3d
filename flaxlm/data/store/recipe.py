"""The recipe of a token store: everything that decides its bytes.

It is kept in the store, which is reused only for the same recipe.
"""

import json
import pathlib

from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.config.tree import flatten
from flaxlm.data.text.documents import Corpus
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


def make_recipe(
  data: ConfigDict, tokenizer: ConfigDict, corpora: dict[str, Corpus]
) -> dict:
  """Returns the recipe of config.data and config.tokenizer, as JSON gives it back."""
  if tokenizer.path:
    recipe = {"sha256": load_tokenizer(tokenizer.path).sha256}
  else:
    recipe = {key: tokenizer[key] for key in TOKENIZER_KEYS}
  recipe = {
    "split": data.split,
    "validation_fraction": data.validation_fraction,
    "shard_tokens": data.shard_tokens,
    "tokenizer": recipe,
    "sources": {
      name: {key: data.sources[name][key] for key in SOURCE_KEYS}
      | {"files": corpus.fingerprint}
      for name, corpus in corpora.items()
    },
  }
  return json.loads(json.dumps(recipe))


def check_recipe(root: pathlib.Path | str, old: dict, new: dict) -> None:
  """Raises ConfigError, which names the differences, if two recipes differ."""
  old, new = flatten(old), flatten(new)
  keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
  if not keys:
    return
  other_files = [f"other files in {key.removesuffix('.files')}" for key in keys]
  changes = [
    f"{key}={old.get(key)!r} (now {new.get(key)!r})"
    for key in keys
    if not key.endswith(".files")
  ] or other_files
  raise errors.ConfigError(
    "config.data.store", f"{root}, prepared with {', '.join(changes[:3])}",
    "a store that this config prepared, or a new directory",
    f"--config.data.store={root}-2, or delete {root}",
  )  # fmt: skip
