"""Stores at an address (gs://, s3://): built and read through a directory of this host.

The copy of a store is called by its fingerprint, so it can be neither stale nor mixed
up; what is being built is called by its address, so a killed preparation continues.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from flaxlm import errors
from flaxlm.machine import quiet_stderr


def is_remote(address: str) -> bool:
  return "://" in address


def path(address: str | os.PathLike):
  from etils import epath  # only remote stores need it

  return epath.Path(address)


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
  """Raises StorageError for whatever the library behind the address raises."""
  try:
    yield
  except Exception as error:
    reason = " ".join(str(error).split())[:300]
    raise errors.StorageError(
      f"{address} cannot be reached\n  given:  {type(error).__name__}: {reason}\n"
      "  needed: a network, permission, and its library: TensorFlow or gcsfs for gs://"
    ) from None


def exists(address: str) -> bool:
  # The first contact, where libraries log most. Copies are not quiet: they are long,
  # and run in threads, while stderr belongs to the whole process.
  with quiet_stderr(), reaching(address):
    return path(address).exists()


def cache() -> pathlib.Path:
  """Where this host keeps copies of stores."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "flaxlm" / "stores"


def building(address: str) -> pathlib.Path:
  """Where the store that will be at `address` is prepared."""
  return cache() / f"building-{hashlib.sha256(address.encode()).hexdigest()[:16]}"


def download(address: str, to: pathlib.Path, sha256: str) -> bool:
  """Copies one file; returns False, and keeps nothing, if it is not what it was."""
  to.parent.mkdir(parents=True, exist_ok=True)
  part = to.with_name(f"{to.name}.{os.getpid()}.part")
  with reaching(address):
    path(address).copy(part, overwrite=True)
  with open(part, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != sha256:
    part.unlink()
    return False
  part.rename(to)
  return True


def upload(root: pathlib.Path, address: str) -> None:
  """Copies a finished store, the manifest last: without it there is no store."""
  names = [f.relative_to(root) for f in sorted(root.rglob("*")) if f.is_file()]
  names = [name for name in names if not name.name.startswith(".")]
  last = pathlib.Path("manifest.json")
  with reaching(address):
    for name in [*(name for name in names if name != last), last]:
      target = path(f"{address}/{name.as_posix()}")
      target.parent.mkdir(parents=True, exist_ok=True)
      path(root / name).copy(target, overwrite=True)


def keep(root: pathlib.Path, fingerprint: str) -> None:
  """Makes the store that was built here the copy that this host reads."""
  target = cache() / fingerprint
  if target.exists():
    shutil.rmtree(root)
  else:
    root.rename(target)
