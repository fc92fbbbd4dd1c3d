"""A manifest is written only when what it lists is on the disk."""

import hashlib
import os

import pytest

from flaxlm.training.manifest import (
  MANIFEST,
  find_damage,
  hash_files,
  read_manifest,
  write_manifest,
)


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


def seal(path, **changes):
  """Writes the manifest of a checkpoint with one file, sealed whatever it says."""
  (path / "state").mkdir(parents=True, exist_ok=True)
  (path / "state/w").write_text("weights")
  manifest = {"format": 1, "step": 7, "meta": {"step": 7}, "leaves": {}}
  manifest["files"] = hash_files(path / "state", sync=False)
  write_manifest(path, manifest | changes)


def test_a_checkpoint_is_whole_until_something_differs(tmp_path):
  path = tmp_path / "7"
  assert find_damage(path) == "not a directory"
  path.mkdir()
  assert find_damage(path) == "empty"
  seal(path)
  assert find_damage(path) is None and read_manifest(path)["meta"] == {"step": 7}
  (path / "state/w").write_text("w")
  assert find_damage(path) == "state/w has 1 bytes, not 7"
  (path / "state/w").write_text("Weights")
  assert find_damage(path) == "state/w does not match its sha256"
  (path / "state/w").unlink()
  assert find_damage(path) == "state/w is missing"
  (path / MANIFEST).unlink()
  assert "unfinished" in find_damage(path)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"format": 2}, "format 2; this reads 1"),
    ({"step": 8}, "of step 8"),
    ({"files": []}, "files"),
    ({"meta": 5}, "meta"),
  ],
)
def test_a_sealed_manifest_of_another_kind_is_refused(changes, said, tmp_path):
  seal(tmp_path / "7", **changes)
  assert said in find_damage(tmp_path / "7")
