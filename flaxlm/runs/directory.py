"""A run's directory: its file names, its lock, and the readers of its files."""

import json
import os
import pathlib
import shlex
import socket
import sys
import time
from typing import Self

from flaxlm.errors import OutputError

KERNEL = "attention.txt"  # in the directory of a run whose kernel was chosen
TEMPLATE = "chat_template.jinja"  # in the directory of a run


class RunLock:
  """Holds `workdir` for one run; the operating system lets go when the process dies.

  Raises:
    OutputError: the directory cannot be written, or another run holds it.
  """

  def __init__(self, workdir: str | os.PathLike):
    self.workdir = pathlib.Path(workdir)
    self.owner = self.workdir / "owner.json"

  def __enter__(self) -> Self:
    import filelock

    if "://" in str(self.workdir) or str(self.workdir).startswith("gs:/"):
      raise self._refuse(
        "a remote address", "mount the bucket (gcsfuse) and give its path"
      )
    try:
      self.workdir.mkdir(parents=True, exist_ok=True)
      self._lock = filelock.FileLock(self.workdir / ".lock", timeout=0)
      self._lock.acquire()
    except filelock.Timeout:
      raise self._refuse(
        self._describe_owner(), "wait for that run, or stop it"
      ) from None
    except (OSError, NotImplementedError) as error:
      reason = getattr(error, "strerror", None) or str(error)
      raise self._refuse(reason, "another --workdir, or other permissions") from None
    try:
      self._write_owner()
    except OSError as error:
      self._lock.release()
      raise self._refuse(error.strerror, "free space, or another --workdir") from None
    return self

  def __exit__(self, *_) -> None:
    self.owner.unlink(missing_ok=True)
    self._lock.release()

  def _refuse(self, given: str, hint: str) -> OutputError:
    return OutputError(
      f"--workdir={self.workdir} cannot be used\n  given:  {given}\n"
      f"  needed: a local directory that this run alone can write\n  try:    {hint}"
    )

  def _write_owner(self) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "started": started,
      "command": shlex.join(sys.orig_argv),
    }
    text = json.dumps(owner, indent=2) + "\n"
    draft = self.owner.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(self.owner)

  def _describe_owner(self) -> str:
    # The owner writes its name just after it takes the lock: give it a moment.
    for _ in range(5):
      try:
        owner = json.loads(self.owner.read_text())
        return (
          f"in use by process {owner['pid']} on {owner['host']} "
          f"since {owner['started']}: " + " ".join(owner["command"].split())[:120]
        )
      except (OSError, ValueError, KeyError):
        time.sleep(0.1)
    return "in use by another run"


def drop_lines_after(path: pathlib.Path, first_step: int) -> None:
  """Rewrites `metrics.jsonl` without the steps that will be logged again.

  A run that starts at step 0 keeps nothing. A torn line, which a kill leaves at the
  end, goes.
  """
  if not path.exists():
    return
  draft = path.with_suffix(".tmp")
  with path.open("rb") as old, draft.open("wb") as new:
    for line in old:
      try:
        kept = line.endswith(b"\n") and json.loads(line)["step"] <= first_step
      except (ValueError, KeyError, TypeError):
        kept = False
      if kept and first_step > 0:
        new.write(line)
    new.flush()
    os.fsync(new.fileno())
  os.replace(draft, path)


def is_logged(path: pathlib.Path, step: int, kind: str) -> bool:
  """Says whether `metrics.jsonl` has a line of this step and kind."""
  if not path.exists():
    return False
  for line in path.read_bytes().splitlines():
    try:
      record = json.loads(line)
    except ValueError:  # torn by a kill
      continue
    if (record.get("step"), record.get("kind")) == (step, kind):
      return True
  return False


def split_address(address: str) -> tuple[pathlib.Path, int | None]:
  """Returns (directory of the run, step or None) of `runs/x[/checkpoints/STEP]`."""
  path = pathlib.Path(address).expanduser()
  if path.parent.name == "checkpoints" and path.name.isdigit():
    return path.parents[1], int(path.name)
  return path, None
