"""The manifest of an exported model: a sha256 for each file, which imports check.

safetensors files have no checksum: a flipped bit in a weight would be read as another
weight. The manifest is that of our checkpoints. Other libraries ignore it, and a
directory without one is read as before.
"""

import pathlib
from collections.abc import Iterable

from flaxlm.errors import DataError
from flaxlm.training.manifest import (
  CHECKPOINT_FORMAT,
  MANIFEST,
  find_changed,
  hash_files,
  read_manifest,
  write_manifest,
)

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def seal_export(directory: pathlib.Path, step: int) -> None:
  """Writes the manifest of all files in `directory`, once they are complete.

  Args:
    step: of the checkpoint that was exported.
  """
  names = [path.name for path in directory.iterdir() if path.name[0] != "."]
  files = hash_files(directory, sync=True, names=sorted(names))
  manifest = {"format": CHECKPOINT_FORMAT, "step": step, "meta": {}, "files": files}
  write_manifest(directory, manifest)


def check_export(directory: pathlib.Path, names: Iterable[str] | None = None) -> None:
  """Raises DataError unless the files are as an export wrote them, if one did.

  Args:
    names: of the files to check, as far as the manifest has them; None checks all, and
      that there are no other weights beside them.
  """
  if not (directory / MANIFEST).is_file():
    return
  try:
    files = read_manifest(directory, {"files": dict})["files"]
  except (OSError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise _changed(directory, reason) from error
  if names is None:
    found = {path.name for pattern in _WEIGHTS for path in directory.glob(pattern)}
    if more := sorted(found - files.keys()):
      raise _changed(directory, f"{more[0]} is not in {MANIFEST}")
  else:
    files = {name: files[name] for name in names if name in files}
  if damage := find_changed(directory, files):
    raise _changed(directory, damage)


def _changed(directory: pathlib.Path, reason: str) -> DataError:
  return DataError(
    f"{directory} is not as it was exported",
    reason,
    f"the files that {MANIFEST} lists, unchanged",
    f"export it again, or delete {MANIFEST} if you changed it on purpose",
  )
