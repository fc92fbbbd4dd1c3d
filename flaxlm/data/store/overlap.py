"""Finds documents that a store both trains and validates on.

A hash of the text keeps equal documents in one split, so only splits that are given can
overlap: the tail of each file, and those of TFDS.
"""

import hashlib
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from flaxlm.data.store.shards import Shard


def count_overlap(
  root: pathlib.Path, units: dict[str, list], dtype: np.dtype
) -> dict[str, int]:
  """Returns how many validation documents of each source some source trains on.

  Documents are equal if their ids are. It takes 60 bytes of memory per validation
  document.

  Args:
    units: what `write_source` returns, by source.
  """
  held_out = {
    name: list(_hashes(root, own, "validation", dtype)) for name, own in units.items()
  }
  wanted = {document for own in held_out.values() for document in own}
  found = set()
  for own in units.values():
    found.update(h for h in _hashes(root, own, "train", dtype) if h in wanted)
  return {name: sum(h in found for h in own) for name, own in held_out.items()}


def _hashes(
  root: pathlib.Path, units: list[dict], split: str, dtype: np.dtype
) -> Iterator[bytes]:
  """Yields a hash of the ids of each document."""
  for unit in units:
    if entry := unit["shards"].get(split):
      stem = root / entry["name"]
      shard = Shard(stem.with_suffix(".ids"), stem.with_suffix(".index"), entry, dtype)
      bounds = [*shard.starts.tolist(), entry["tokens"]]
      for start, stop in itertools.pairwise(bounds):
        yield hashlib.blake2b(shard.read(start, stop), digest_size=8).digest()
