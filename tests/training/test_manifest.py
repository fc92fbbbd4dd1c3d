"""A manifest is written only when what it lists is on the disk."""

import hashlib
import os

import pytest

from flaxlm.training.manifest import hash_files


@pytest.mark.parametrize("sync", [True, False])
def test_every_file_and_directory_is_synced_before_it_is_listed(
  sync, tmp_path, monkeypatch
):
  (tmp_path / "a/b").mkdir(parents=True)
  for name in ("one", "a/two", "a/b/three"):
    (tmp_path / name).write_text(name)
  synced = set()
  monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino))
  found = hash_files(tmp_path, sync=sync)
  assert found == {
    name: [len(name), hashlib.sha256(name.encode()).hexdigest()]
    for name in ("a/b/three", "a/two", "one")
  }
  everything = {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}
  assert synced == (everything if sync else set())
