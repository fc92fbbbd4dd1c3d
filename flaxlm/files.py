"""Files that are written whole or not at all, and that survive a loss of power.

Content goes to a draft beside the file, which is then renamed. A rename is atomic on
the local and network file systems that a run may use (POSIX). fsync makes content
durable, and fsync of the directory makes the name durable.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

from flaxlm.errors import OutputError, storage_failure

RETRY_SECONDS = (1.0, 4.0, 16.0)  # waits before what failed is tried again
_PASSING = {  # reasons that time may mend
  *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT),
  *(errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.EHOSTDOWN),
}
_DRAFT_LOCK = ".draft.lock"  # held by the process that fills a draft of a directory


def write_atomically(
  path: str | os.PathLike, content: bytes | str, shared: bool = False
) -> None:
  """Writes `content`, text as UTF-8, to `path`.

  A reader sees the old file or all of the new one, even if this process is killed.
  On return the new file survives a loss of power.

  Args:
    shared: several processes may write `path` at the same time; the last one wins.
      Without it they would share a draft, `path` with .tmp added.
  """
  with open_atomically(path, shared) as file:
    file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(
  path: str | os.PathLike, shared: bool = False
) -> Iterator[BinaryIO]:
  """Opens a draft that becomes `path` when the block ends, as in `write_atomically`.

  An exception in the block leaves `path` as it was and removes the draft.
  """
  path = pathlib.Path(path)
  writer = f".{socket.gethostname()}.{os.getpid()}" if shared else ""
  draft = path.with_name(f"{path.name}{writer}.tmp")
  try:
    with draft.open("wb") as file:
      yield file
      sync(file)
    rename(draft, path)
  except BaseException:
    draft.unlink(missing_ok=True)
    raise


def rename(draft: str | os.PathLike, path: str | os.PathLike) -> None:
  """Gives a file or directory its final name; on return the name is durable."""
  os.replace(draft, path)
  sync_directory(pathlib.Path(path).parent)


def sync(file: BinaryIO) -> None:
  """Makes what was written to an open file durable."""
  file.flush()
  os.fsync(file.fileno())


def sync_directory(path: str | os.PathLike) -> None:
  """Makes the names in a directory durable."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def writing(name: object) -> Iterator[None]:
  """Says which output cannot be written, if the block fails to write it.

  Args:
    name: as the user knows it, such as --html=FILE.
  Raises:
    OutputError: the place does not exist, is no directory or is read-only.
    StorageError: the disk is full or fails.
  """
  try:
    yield
  except OSError as error:
    raise storage_failure(name, error, writing=True) from error


def write_output(path: str | os.PathLike, text: str, name: object) -> None:
  """Writes a file that a user names, whole or not at all.

  A device or a pipe, such as /dev/stdout, is written to and stays what it is; so does
  a link.

  Args:
    name: as in `writing`.
  """
  path = pathlib.Path(path)
  with writing(name):
    if _is_device(path):
      with path.open("a", encoding="utf-8") as file:
        file.write(text)
    else:
      write_atomically(path.resolve(), text)


def _is_device(path: pathlib.Path) -> bool:
  """Returns whether a path is no place for a file; /dev/stdout may stand for one."""
  if str(path) in ("/dev/stdout", "/dev/stderr") or path.is_relative_to("/dev/fd"):
    return True
  return path.exists() and not path.is_file() and not path.is_dir()


def check_output(path: str | os.PathLike, name: object, parents: bool = False) -> None:
  """Raises OutputError unless `path` can be written; for use before long work.

  Args:
    name: as in `writing`.
    parents: missing directories will be made.
  """
  path = pathlib.Path(path).absolute()
  with writing(name):
    if _is_device(path):
      with path.open("a"):
        return
    if not parents and path.is_dir():
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = path if parents else path.resolve().parent
    while parents and not os.path.lexists(folder):
      folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell
      pass


@contextlib.contextmanager
def write_directory(path: str | os.PathLike, name: object) -> Iterator[pathlib.Path]:
  """Yields a draft directory that becomes `path` when the block ends.

  An exception in the block removes the draft. A draft that a killed process left is
  removed by the next call.

  Args:
    path: does not exist, or is an empty directory.
    name: as in `writing`.
  Raises:
    OutputError, StorageError: `path` or its draft holds something, or cannot be
      written.
  """
  import filelock

  path = pathlib.Path(path).absolute()
  draft = path.with_name(f"{path.name}.unfinished")
  needed = "a new or empty directory"
  with writing(name):
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      has = [entry.name for entry in path.iterdir()] if path.is_dir() else ["a file"]
      given = f"{path}, not empty: {' '.join(sorted(has)[:3])}"
      raise OutputError(f"{name} cannot be written", given, needed)
    draft.mkdir(parents=True, exist_ok=True)
    left = [entry.name for entry in draft.iterdir()]
    if left and _DRAFT_LOCK not in left:
      given, hint = f"{draft}, not empty", f"delete {draft}"
      raise OutputError(f"{name} cannot be written", given, needed, hint)
    lock = filelock.FileLock(draft / _DRAFT_LOCK, timeout=0)
    try:
      lock.acquire()
    except filelock.Timeout:
      given = f"{draft}, which another process is writing"
      raise OutputError(f"{name} cannot be written", given, needed) from None
  try:
    with writing(name):
      _empty(draft)
    yield draft
    with writing(name):
      if path.exists():
        path.rmdir()
      rename(draft, path)
      (path / _DRAFT_LOCK).unlink(missing_ok=True)
  except BaseException:
    shutil.rmtree(draft, ignore_errors=True)
    raise
  finally:
    lock.release()


def _empty(draft: pathlib.Path) -> None:
  """Removes what a killed process left in a draft, but not the lock."""
  for entry in draft.iterdir():
    if entry.is_dir() and not entry.is_symlink():
      shutil.rmtree(entry)
    elif entry.name != _DRAFT_LOCK:
      entry.unlink()


def try_again(action: Callable[[], None], name: object) -> None:
  """Runs `action`; runs it again, after each of RETRY_SECONDS, if the storage fails.

  A full disk may be emptied, and storage that is mounted over a network comes back.

  Args:
    name: of what is written, for the warnings.
  Raises:
    OSError: it failed every time, or for a reason that time does not mend.
  """
  for delay in (*RETRY_SECONDS, None):
    try:
      return action()
    except OSError as error:
      if delay is None or error.errno not in _PASSING:
        raise
      reason = error.strerror or error
      print(
        f"flaxlm: warning: {name}: {reason}; trying again in {delay:g} s",
        file=sys.stderr,
      )
      time.sleep(delay)
