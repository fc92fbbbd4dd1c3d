"""Files that are written whole or not at all."""

import os
import pathlib


def write_atomically(path: pathlib.Path, content: bytes) -> None:
  part = path.with_name(path.name + ".tmp")
  with open(part, "wb") as file:
    file.write(content)
    sync(file)
  os.replace(part, path)
  folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a crash
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def sync(file) -> None:
  file.flush()
  os.fsync(file.fileno())
  file.close()
