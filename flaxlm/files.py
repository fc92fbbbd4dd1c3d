"""Files that are written whole or not at all, and that survive a loss of power.

Content goes to a draft beside the file, which is then renamed. A rename is atomic on
the local and network file systems that a run may use (POSIX). fsync makes content
durable, and fsync of the directory makes the name durable.
"""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import BinaryIO


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
