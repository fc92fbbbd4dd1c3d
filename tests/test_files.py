"""A file is written completely or not at all, and its content reaches disk first."""

import errno
import os
import pathlib

import pytest

from flaxlm import files
from flaxlm.errors import OutputError, StorageError


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


@pytest.fixture
def bad_places(tmp_path):
  """Paths that nobody can write, not even root."""
  (tmp_path / "file").write_text("")
  return [tmp_path / "absent" / "x", tmp_path / "file" / "x", tmp_path / ("x" * 300)]


@pytest.mark.faults
def test_places_that_cannot_be_written_are_named_before_the_work(tmp_path, bad_places):
  files.check_output(tmp_path / "x", "--html")
  files.check_output(tmp_path / "new" / "x", "--html", parents=True)
  for path in [*bad_places[:2], tmp_path]:
    with pytest.raises(OutputError, match="--html=x cannot be written"):
      files.check_output(path, "--html=x")
  with pytest.raises(OutputError):
    files.check_output(tmp_path / "file" / "a" / "b", "--to", parents=True)
  assert os.listdir(tmp_path) == ["file"]


def test_what_the_system_refuses_has_a_name_and_an_exit_code(bad_places):
  for path in bad_places:
    with (
      pytest.raises(OutputError, match="--html=x") as caught,
      files.writing("--html=x"),
    ):
      files.write_atomically(path, "")
    assert caught.value.exit_code == 73
  for number, kind in ((28, StorageError), (5, StorageError), (30, OutputError)):
    with pytest.raises(kind, match="x"), files.writing("x"):
      raise OSError(number, os.strerror(number))


def test_devices_and_links_stay_what_they_are(tmp_path, capfd):
  (tmp_path / "link").symlink_to(tmp_path / "file")
  for path in (tmp_path / "link", pathlib.Path("/dev/stdout")):
    files.check_output(path, path)
    files.write_output(path, "text", path)
    assert path.is_symlink()
  assert (tmp_path / "file").read_text() == "text"
  assert capfd.readouterr().out == "text"
  with pytest.raises(StorageError, match="No space left"):
    files.write_output("/dev/full", "x" * 100_000, "--html=/dev/full")
  assert pathlib.Path("/dev/full").is_char_device()


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
  out = tmp_path / "a" / "out"
  with pytest.raises(KeyboardInterrupt), files.write_directory(out, "x") as draft:
    (draft / "half").write_text("")
    raise KeyboardInterrupt
  assert os.listdir(out.parent) == []
  out.mkdir()
  with files.write_directory(out, "x") as draft:
    (draft / "whole").write_text("")
    with pytest.raises(OutputError, match="another process is writing"):
      files.write_directory(out, "x").__enter__()
    assert os.listdir(out) == []
  assert os.listdir(out) == ["whole"] and os.listdir(out.parent) == ["out"]
  with pytest.raises(OutputError, match="not empty"), files.write_directory(out, "x"):
    pass


@pytest.mark.faults
def test_a_draft_of_a_killed_process_is_replaced_and_no_other(tmp_path):
  draft = tmp_path / "out.unfinished"
  (draft / "folder").mkdir(parents=True)
  (draft / "folder" / "mine").write_text("")
  with pytest.raises(OutputError, match=r"delete .*unfinished"):
    files.write_directory(tmp_path / "out", "x").__enter__()
  assert (draft / "folder" / "mine").exists()
  (draft / ".draft.lock").write_text("")  # held by nobody
  with files.write_directory(tmp_path / "out", "x") as again:
    assert os.listdir(again) == [".draft.lock"]
    (again / "whole").write_text("")
  assert os.listdir(tmp_path / "out") == ["whole"]


@pytest.mark.faults
def test_what_time_mends_is_tried_again_and_nothing_else(monkeypatch, capsys):
  monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0))

  def failing(*numbers):
    left = list(numbers)

    def action():
      if left:
        raise OSError(left[0], os.strerror(left.pop(0)))

    return action

  files.try_again(failing(errno.EIO, errno.ENOSPC), "a.log")
  assert capsys.readouterr().err.splitlines() == [
    "flaxlm: warning: a.log: Input/output error; trying again in 0 s",
    "flaxlm: warning: a.log: No space left on device; trying again in 0 s",
  ]
  with pytest.raises(OSError, match="Input/output"):
    files.try_again(failing(*[errno.EIO] * 3), "a.log")
  with pytest.raises(PermissionError):
    files.try_again(failing(errno.EACCES), "a.log")
