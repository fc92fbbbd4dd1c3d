"""Copies of remote token stores (gs://, s3://) in a directory of this host.

A store is built and read through its copy. The copy of a finished store is named after
its fingerprint, so it can be neither stale nor mixed up with another. A store that is
being built is named after its address, so a killed preparation continues.
"""

import hashlib
import os
import pathlib
import shutil

from flaxlm import files
from flaxlm.data.text import remote


def copies_directory() -> pathlib.Path:
  """Returns where this host keeps copies of stores."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "flaxlm" / "stores"


def building_directory(address: str) -> pathlib.Path:
  """Returns where the store that will be at `address` is built."""
  name = hashlib.sha256(address.encode()).hexdigest()[:16]
  return copies_directory() / f"building-{name}"


def download(address: str, to: pathlib.Path, sha256: str) -> bool:
  """Copies one file; deletes the copy and returns False if its sha256 is wrong."""
  to.parent.mkdir(parents=True, exist_ok=True)
  part = to.with_name(f"{to.name}.{os.getpid()}.part")  # processes may share `to`
  with remote.reaching(address):
    remote.path(address).copy(part, overwrite=True)
  with open(part, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != sha256:
    part.unlink()
    return False
  files.rename(part, to)
  return True


def upload(root: pathlib.Path, address: str) -> None:
  """Copies a finished store, the manifest last: without it there is no store."""
  names = [f.relative_to(root) for f in sorted(root.rglob("*")) if f.is_file()]
  names = [name for name in names if not name.name.startswith(".")]
  last = pathlib.Path("manifest.json")
  with remote.reaching(address):
    for name in [*(name for name in names if name != last), last]:
      target = remote.path(f"{address}/{name.as_posix()}")
      target.parent.mkdir(parents=True, exist_ok=True)
      remote.path(root / name).copy(target, overwrite=True)


def keep_copy(root: pathlib.Path, fingerprint: str) -> None:
  """Makes the store that was built at `root` the copy that this host reads."""
  target = copies_directory() / fingerprint
  if target.exists():
    shutil.rmtree(root)
  else:
    files.rename(root, target)
