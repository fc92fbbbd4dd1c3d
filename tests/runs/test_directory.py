"""A run's directory: one owner at a time, and addresses of its checkpoints."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from flaxlm.errors import OutputError
from flaxlm.runs.directory import RunLock, split_address

HOLDER = """
import sys, time
from flaxlm.runs.directory import RunLock
with RunLock(sys.argv[1]):
  print("locked")
  time.sleep(60)
"""


@pytest.mark.faults
def test_a_second_run_is_refused_and_a_killed_owner_lets_go(tmp_path):
  workdir = tmp_path / "runs" / "a"
  child = subprocess.Popen(
    [sys.executable, "-u", "-c", HOLDER, str(workdir)], stdout=subprocess.PIPE
  )
  assert child.stdout.readline() == b"locked\n"
  owner = json.loads((workdir / "owner.json").read_text())
  assert owner["pid"] == child.pid and owner["host"] == socket.gethostname()
  with pytest.raises(OutputError) as caught, RunLock(workdir):
    pass
  message = str(caught.value)
  assert f"in use by process {child.pid} on {socket.gethostname()} since 20" in message
  assert len(message.splitlines()) <= 5
  child.kill()
  child.communicate()
  with RunLock(workdir):
    assert json.loads((workdir / "owner.json").read_text())["pid"] == os.getpid()
  assert not (workdir / "owner.json").exists()
  with RunLock(workdir):
    pass


@pytest.mark.faults
def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.write_text("")
  for workdir, reason in {
    file: "File exists",
    file / "below": "Not a directory",
    "/proc/flaxlm": "No such file",
    "gs://bucket/run": "a remote address",
  }.items():
    with pytest.raises(OutputError, match=reason) as caught, RunLock(workdir):
      pass
    assert len(str(caught.value).splitlines()) <= 5
  readonly = tmp_path / "readonly"
  readonly.mkdir()

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("filelock.FileLock.acquire", refuse)  # root ignores file modes
  with pytest.raises(OutputError, match="Permission denied"), RunLock(readonly):
    pass


def test_a_checkpoint_is_addressed_through_its_run():
  run = pathlib.Path("runs/x")
  assert split_address("runs/x") == (run, None)
  assert split_address("runs/x/checkpoints/500") == (run, 500)
  for other in ("runs/x/checkpoints", "runs/x/500", "runs/x/checkpoints/500.bad-1"):
    assert split_address(other) == (pathlib.Path(other), None)
