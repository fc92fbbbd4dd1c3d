"""Finds documents that a store both trains and validates on.

A hash of the text keeps equal documents in one split, so only splits that are given can
overlap: the tail of each file, and those of TFDS.
"""

import hashlib
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from flaxlm.data.store.manifest import SPLITS
from flaxlm.data.store.shards import Shard

IDS_TOGETHER = 1 << 18  # that are read at a time


def count_overlap(
  root: pathlib.Path, units: dict[str, list], dtype: np.dtype
) -> dict[str, int]:
  """Returns how many validation documents of each source some source trains on.

  Documents are equal if their ids are. Only those are read whose length occurs in both
  splits. It takes some 100 bytes of memory per validation document.

  Args:
    units: what `write_source` returns, by source.
  """
  lengths = {
    split: {
      stop - start
      for own in units.values()
      for _, start, stop in _bounds(root, own, split, dtype)
    }
    for split in SPLITS
  }
  both = lengths["train"] & lengths["validation"]
  held_out = {
    name: list(_hashes(root, own, "validation", dtype, both))
    for name, own in units.items()
  }
  wanted = set(itertools.chain.from_iterable(held_out.values()))
  found = set()
  for own in units.values():
    found |= {h for h in _hashes(root, own, "train", dtype, both) if h in wanted}
  return {name: sum(h in found for h in own) for name, own in held_out.items()}


def _bounds(
  root: pathlib.Path, units: list[dict], split: str, dtype: np.dtype
) -> Iterator[tuple[Shard, int, int]]:
  """Yields (shard, first id, end) of each document."""
  for unit in units:
    if entry := unit["shards"].get(split):
      stem = root / entry["name"]
      shard = Shard(stem.with_suffix(".ids"), stem.with_suffix(".index"), entry, dtype)
      bounds = [*shard.starts.tolist(), entry["tokens"]]
      for start, stop in itertools.pairwise(bounds):
        yield shard, start, stop


def _hashes(
  root: pathlib.Path,
  units: list[dict],
  split: str,
  dtype: np.dtype,
  lengths: set[int],
) -> Iterator[bytes]:
  """Yields a hash of the ids of each document that has one of these lengths."""
  for shard, start, stop in _bounds(root, units, split, dtype):
    if stop - start in lengths:
      whole = hashlib.blake2b(digest_size=8)
      for first in range(start, stop, IDS_TOGETHER):
        whole.update(shard.read(first, min(first + IDS_TOGETHER, stop)))
      yield whole.digest()
