"""What identifies a file, on a disk and at an address."""

import os

import pytest
from etils import epath

from flaxlm import errors
from flaxlm.config.base import source
from flaxlm.data.text import contents, documents, remote


def test_every_byte_of_a_file_counts(tmp_path):
  path = tmp_path / "a"
  content = bytes(100_000)
  path.write_bytes(content)
  first = contents.see(str(path))
  for at in (0, 30_000, 50_000, 99_999):
    path.write_bytes(content[:at] + b"x" + content[at + 1 :])
    os.utime(path, ns=(first.mtime, first.mtime))
    assert contents.see(str(path), first).sha256 != first.sha256
    with pytest.raises(errors.DataError, match="changed while"):
      contents.check_unchanged(str(path), first)
  path.write_bytes(content)  # other times, the same bytes
  contents.check_unchanged(str(path), first)


def test_a_file_that_just_changed_is_read_again(tmp_path, monkeypatch):
  path = tmp_path / "a"
  path.write_bytes(b"one")
  assert not contents.see(str(path)).sample
  monkeypatch.setattr(contents, "SETTLED_NS", -1)
  seen = contents.see(str(path))
  assert seen.sample and contents.see(str(path), seen) is seen


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(errors.MissingInputError, match="gone cannot be read"):
    contents.see(str(tmp_path / "gone"))
  with pytest.raises(errors.MissingInputError, match="cannot be read"):
    contents.see(str(tmp_path))


def test_objects_are_known_by_size_and_time(tmp_path, monkeypatch):
  def path(address):
    return epath.Path(str(address).replace("gs://bucket", str(tmp_path)))

  monkeypatch.setattr(remote, "path", path)
  (tmp_path / "a.txt").write_text("text")

  def fingerprint():
    fields = source("text", "gs://bucket/a.txt")
    monkeypatch.setattr(documents, "find_files", lambda key, pattern: [pattern])
    return documents.open_source("main", fields).fingerprint

  first = fingerprint()
  os.utime(tmp_path / "a.txt", (1e9, 1e9))
  second = fingerprint()
  assert first != second == fingerprint()
  (tmp_path / "a.txt").unlink()
  with pytest.raises(errors.StorageError, match="be reached"):
    fingerprint()
