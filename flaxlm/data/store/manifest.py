"""The manifest of a token store: what the store holds, with a checksum of every file.

It is written last, so a store without one is not finished. The fingerprint of a store
is the sha256 of its manifest.
"""

import collections
import hashlib
import json

from flaxlm import errors
from flaxlm.json_files import parse_json
from flaxlm.tokenizer.files import AnyTokenizer, file_name

STORE_FORMAT = 1
MANIFEST_LIMIT = 1 << 30  # bytes; a shard takes 300
SPLITS = ("train", "validation")
IN_BOTH_SPLITS = "validation document that is a training document too"  # a problem
SOURCES_FILE = "sources.json"  # name, size and sha256 of each file that was read
WORDS_FILE = "words.u1"  # one byte per id of the vocabulary: 1 if it continues a word


def make_manifest(
  recipe: dict,
  tokenizer: AnyTokenizer,
  words: bytes,
  units: dict[str, list],
  overlap: dict[str, int],
) -> dict:
  """Returns the manifest of a store.

  Args:
    words: the contents of WORDS_FILE.
    units: what `write_source` returns, by source.
    overlap: what `count_overlap` returns, by source.
  """
  entries = {}
  for name, unit_list in units.items():
    problems = collections.Counter()
    for unit in unit_list:
      problems.update(unit["problems"])
    if overlap.get(name):
      problems[IN_BOTH_SPLITS] = overlap[name]
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


def dtype_of(tokenizer: AnyTokenizer) -> str:
  """Returns the numpy type that ids are stored in: uint16 if they fit."""
  return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def fingerprint_of(manifest: dict) -> str:
  """Returns the sha256 of a manifest without its fingerprint."""
  body = {key: value for key, value in manifest.items() if key != "fingerprint"}
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def dump(tree: dict) -> bytes:
  """Returns a tree as JSON with sorted keys, so that equal trees are equal bytes."""
  return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()


def check_of(content: dict) -> str:
  """Returns the sha256 of a tree without its key "check", which holds it."""
  body = {key: value for key, value in content.items() if key != "check"}
  return hashlib.sha256(dump(body)).hexdigest()


def read_store_manifest(path) -> dict:
  """Returns the manifest at `path`; DataError if it is damaged or of another format."""
  fields = {"format": int, "fingerprint": str}
  try:
    manifest = parse_json(path.read_bytes(), path, fields, MANIFEST_LIMIT)
  except OSError as error:
    raise broken(path, error.strerror or str(error)) from error
  version, fingerprint = manifest["format"], manifest["fingerprint"]
  if version != STORE_FORMAT:
    raise errors.DataError(
      "the token store has another format",
      f"{path}: format {version}",
      f"format {STORE_FORMAT}",
      "prepare again, into a new directory",
    )
  if fingerprint != fingerprint_of(manifest):
    raise broken(path, "its contents do not match its fingerprint")
  return manifest


def broken(path: object, what: str) -> errors.DataError:
  """Returns the error that says what is wrong with a file of a store."""
  return errors.DataError(
    "a file of the token store is damaged",
    f"{path}: {what}",
    "the bytes that flaxlm.prepare wrote",
    "delete the store and prepare again, or copy it again",
  )
