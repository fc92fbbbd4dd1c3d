"""A file is written completely or not at all, and its content reaches disk first."""

import os

import pytest

from flaxlm import files


def test_text_is_utf_8_and_bytes_are_as_given(tmp_path):
  path = tmp_path / "a"
  files.write_atomically(path, "ä\n")
  assert path.read_bytes() == b"\xc3\xa4\n"
  files.write_atomically(path, b"\xff")
  assert path.read_bytes() == b"\xff"
  assert os.listdir(tmp_path) == ["a"]


def test_a_failure_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
  path = tmp_path / "a"
  files.write_atomically(path, "old")
  with pytest.raises(KeyboardInterrupt), files.open_atomically(path) as file:
    file.write(b"half of the n")
    raise KeyboardInterrupt
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
    patch.setattr(os, "fsync", fail)
    files.write_atomically(path, "new")
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_reader_sees_the_old_file_until_the_block_ends(tmp_path):
  path = tmp_path / "a"
  path.write_text("old")
  with files.open_atomically(path) as file:
    file.write(b"new")
    file.flush()
    assert path.read_text() == "old"
  assert path.read_text() == "new"


def test_the_content_is_on_disk_before_the_name_and_the_name_at_the_end(
  tmp_path, monkeypatch
):
  log, replace, sync = [], os.replace, os.fsync
  draft = tmp_path / "a.tmp"

  def synced(descriptor):
    of_directory = os.path.samestat(os.fstat(descriptor), os.stat(tmp_path))
    if not of_directory:
      assert draft.read_text() == "new"  # nothing is left in a buffer
    log.append("directory" if of_directory else "content")
    sync(descriptor)

  def replaced(old, new):
    log.append("name")
    replace(old, new)

  monkeypatch.setattr(os, "fsync", synced)
  monkeypatch.setattr(os, "replace", replaced)
  files.write_atomically(tmp_path / "a", "new")
  assert log == ["content", "name", "directory"]


def test_processes_that_share_a_path_have_drafts_of_their_own(tmp_path, monkeypatch):
  path = tmp_path / "a"
  with files.open_atomically(path, shared=True) as mine:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with files.open_atomically(path, shared=True) as other:
      other.write(b"other")
      mine.write(b"mine")
    assert path.read_text() == "other"
  assert path.read_text() == "mine" and os.listdir(tmp_path) == ["a"]


def test_a_directory_gets_its_name_in_one_step(tmp_path):
  draft = tmp_path / "draft"
  draft.mkdir()
  (draft / "file").write_text("x")
  files.rename(draft, tmp_path / "final")
  assert os.listdir(tmp_path) == ["final"]
  assert (tmp_path / "final/file").read_text() == "x"
