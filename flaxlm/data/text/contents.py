"""Identifies the files of a source by their contents, so that an edit is noticed.

The sha256 of a file decides. To read every byte again takes long, so a store keeps what
was seen: a file whose size, times and sampled bytes are the same is not read again. An
object at a remote address cannot be edited in place: size and time identify it.
"""

import concurrent.futures
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import IO, NamedTuple

from flaxlm import errors
from flaxlm.data.text import remote

SAMPLE_BYTES = 4096  # at the beginning, in the middle and at the end of a file
# The times of some file systems are coarse: within this long after a change, another
# change may leave them as they are.
SETTLED_NS = 2_000_000_000
WORTH_A_LINE = 2_000_000_000  # bytes to read, about a second per GB


class Seen(NamedTuple):
  """A file as it was when it was read to its end."""

  size: int  # bytes
  mtime: int  # ns
  ctime: int  # ns; unlike mtime, no program can set it
  sample: str  # sha256 of the sampled bytes; "" if the file had just changed
  sha256: str  # of its bytes; of its size and time if it is remote


def see_files(
  paths: list[str], known: dict[str, Seen], log: Callable[[str], None]
) -> list[Seen]:
  """Returns what identifies each file; reads those that `known` lacks or that changed.

  Raises:
    MissingInputError, StorageError: a file cannot be read.
  """
  new = [path for path in paths if path not in known and not remote.is_remote(path)]
  size = sum(map(size_of, new))
  if size > WORTH_A_LINE:
    log(f"reading {len(new):,} files of {size / 1e9:.1f} GB for their sha256")
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return list(pool.map(lambda path: see(path, known.get(path)), paths))


def see(path: str, known: Seen | None = None) -> Seen:
  """Returns what identifies a file: `known`, if it has not changed since."""
  if remote.is_remote(path):
    with remote.reaching(path):
      status = remote.path(path).stat()
    size, mtime = status.length, int((status.mtime or 0) * 1_000_000_000)
    sha256 = hashlib.sha256(f"{size} {mtime}".encode()).hexdigest()
    return Seen(size, mtime, 0, "", sha256)
  try:
    with open(path, "rb") as file:
      now = time.time_ns()
      found = _status(file)
      if known and found == known[:4]:
        return known
      if now - max(found[1:3]) < SETTLED_NS:
        found = (*found[:3], "")
      file.seek(0)
      return Seen(*found, hashlib.file_digest(file, "sha256").hexdigest())
  except OSError as error:
    raise unreadable_source(path, error) from error


def size_of(path: str) -> int:
  """Returns the size of a file in bytes, without reading it."""
  if remote.is_remote(path):
    with remote.reaching(path):
      return remote.path(path).stat().length
  try:
    return os.path.getsize(path)
  except OSError as error:
    raise unreadable_source(path, error) from error


def check_unchanged(path: str, seen: Seen) -> None:
  """Raises DataError if a file is not what it was when it was `seen`."""
  if not remote.is_remote(path):
    try:
      status = os.stat(path)
    except OSError as error:
      raise unreadable_source(path, error) from error
    if (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == seen[:3]:
      return
  if see(path).sha256 != seen.sha256:
    raise errors.DataError(
      f"{path} changed while it was being prepared", "other bytes than at the start",
      "sources that stay as they are", "run again, into a new config.data.store",
    )  # fmt: skip


def fingerprint_of_contents(names: list[str], seen: list[Seen]) -> str:
  """Returns the sha256 of the names, sizes and contents of files, in their order."""
  listing = [(n, s.size, s.sha256) for n, s in zip(names, seen, strict=True)]
  return hash_listing(listing)


def hash_listing(listing: Iterable) -> str:
  """Returns the sha256 of what JSON can hold."""
  return hashlib.sha256(json.dumps(list(listing)).encode()).hexdigest()


def unreadable_source(path: str, error: OSError) -> errors.UserError:
  """Returns the error for a source file that the system will not open or read."""
  missing = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
  kind = errors.MissingInputError if missing else errors.StorageError
  return kind(f"{path} cannot be read", error.strerror or error, "a readable file")


def _status(file: IO[bytes]) -> tuple[int, int, int, str]:
  """Returns the first four fields of `Seen`."""
  status, sample = os.fstat(file.fileno()), hashlib.sha256()
  for start in (0, status.st_size // 2, max(status.st_size - SAMPLE_BYTES, 0)):
    file.seek(start)
    sample.update(file.read(SAMPLE_BYTES))
  times = status.st_mtime_ns, status.st_ctime_ns
  return status.st_size, *times, sample.hexdigest()
