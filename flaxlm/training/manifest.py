"""The manifest of a checkpoint, which tells a whole checkpoint from a damaged one.

`MANIFEST.json` holds the size and sha256 of each file under `state/`, the name, dtype
and shape of each leaf, and the caller's `meta`. Its last line is the sha256 of the
lines before it, so that a flipped bit in the manifest itself is found too.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re

from flaxlm.files import sync_directory, write_atomically
from flaxlm.json_files import check_fields, parse_json

MANIFEST = "MANIFEST.json"
_FIELDS = {"step": int, "files": dict, "meta": dict}  # of a checkpoint
CHECKPOINT_FORMAT = 1


def find_damage(path: pathlib.Path) -> str | None:
  """Returns what is wrong with the checkpoint at `path`; None if it is whole."""
  try:
    if not path.is_dir():
      return "not a directory"
    if not any(path.iterdir()):
      return "empty"
    if not (path / MANIFEST).exists():
      return f"unfinished: it has no {MANIFEST}"
    manifest = read_manifest(path)
    if manifest["step"] != int(path.name):
      return f"its {MANIFEST} is of step {manifest['step']}"
    damage = find_changed(path / "state", manifest["files"])
    return damage and f"state/{damage}"
  except (OSError, ValueError) as error:
    return " ".join(str(error).split())


def find_changed(directory: pathlib.Path, files: dict[str, list]) -> str | None:
  """Returns which file is not as `hash_files` found it, and how; None if all are.

  Sizes are compared first: a truncated file is found without reading the rest.
  """
  for name, (size, _) in files.items():
    file = directory / name
    if not file.is_file():
      return f"{name} is missing"
    if file.stat().st_size != size:
      return f"{name} has {file.stat().st_size} bytes, not {size}"
  found = hash_files(directory, sync=False, names=files)
  for name, (_, digest) in files.items():
    if found[name][1] != digest:
      return f"{name} does not match its sha256"
  return None


def list_steps(directory: str | os.PathLike) -> list[int]:
  """Returns the steps that seem to have a finished checkpoint, ascending."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return []
  names = (entry.name for entry in directory.iterdir())
  return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))


def newest_meta(directory: str | os.PathLike) -> dict | None:
  """Returns the `meta` of the newest manifest that is whole; None if there is none.

  The arrays beside it are not looked at.
  """
  for step in list_steps(directory)[::-1]:
    with contextlib.suppress(OSError, ValueError):
      return read_manifest(pathlib.Path(directory) / str(step))["meta"]
  return None


def read_manifest(path: pathlib.Path, fields: dict[str, type] = _FIELDS) -> dict:
  """Returns what `write_manifest` wrote.

  Args:
    fields: that it must have, besides its format.
  Raises:
    ValueError: it does not match its own sha256, or has another format.
    OSError: it cannot be read.
  """
  data = (path / MANIFEST).read_bytes()
  body, _, last = data.removesuffix(b"\n").rpartition(b"\n")
  if not data.endswith(b"\n") or hashlib.sha256(body).hexdigest().encode() != last:
    raise ValueError(f"{MANIFEST} does not match its own sha256")
  manifest = parse_json(body, MANIFEST, {"format": int})
  if manifest["format"] != CHECKPOINT_FORMAT:
    raise ValueError(
      f"{MANIFEST} has format {manifest['format']}; this reads {CHECKPOINT_FORMAT}"
    )
  check_fields(manifest, MANIFEST, fields)
  for name, entry in manifest.get("files", {}).items():
    if not isinstance(entry, list) or [*map(type, entry)] != [int, str]:
      raise ValueError(f"{MANIFEST} has no size and sha256 of {name}")
  return manifest


def write_manifest(path: pathlib.Path, manifest: dict) -> None:
  """Writes MANIFEST.json, and the sha256 of its text as the last line."""
  body = json.dumps(manifest, indent=1)
  digest = hashlib.sha256(body.encode()).hexdigest()
  write_atomically(path / MANIFEST, f"{body}\n{digest}\n")


def hash_files(path: pathlib.Path, sync: bool, names=None) -> dict[str, list]:
  """Returns {relative name: [size, sha256]} of the files in `path`.

  Args:
    sync: makes each file and directory durable before it is read.
    names: of the files; None takes all.
  """
  if names is None:
    names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
    folders = [path, *(f for f in path.rglob("*") if f.is_dir())]
  else:
    folders = []

  def digest(name: str) -> list:
    with (path / name).open("rb") as file:
      if sync:
        os.fsync(file.fileno())
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      return [file.tell(), digest]

  with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
    found = dict(zip(names, pool.map(digest, names), strict=True))
  if sync:
    for folder in folders:
      sync_directory(folder)
  return found
