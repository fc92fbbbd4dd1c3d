"""The weights in a Hugging Face directory: found, renamed as in our tables, checked.

Files and layout must agree exactly: a tensor too many, too few or of another shape is
an error that names it.
"""

import math
import pathlib
import re

import ml_dtypes
import numpy as np

from flaxlm.errors import DataError, MissingInputError
from flaxlm.interop.family import Family
from flaxlm.interop.safetensors_files import (
  INDEX,
  Tensor,
  read_index,
  read_safetensors,
)
from flaxlm.interop.torch_files import read_torch
from flaxlm.interop.weight_layout import WeightPart

# In this order: safetensors are preferred where a directory has both.
_READERS = (
  ("model.safetensors", read_safetensors),
  ("pytorch_model.bin", read_torch),
)
_FLOATS = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))


def open_weights(directory: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors in a directory by name, without reading their numbers."""
  for name, read in _READERS:
    if (directory / name).is_file():
      return read(directory / name)
    if (directory / f"{name}{INDEX}").is_file():
      return read_index(directory / f"{name}{INDEX}", read)
  names = [f"{name} or {name}{INDEX}" for name, _ in _READERS]
  has = " ".join(sorted(p.name for p in directory.iterdir())[:6]) or "nothing"
  raise MissingInputError(f"{directory} holds no weights", has, ", ".join(names))


def rename_tensors(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
  """Renames tensors as in our tables: older names, and names without the prefix."""
  rows = [*family.rows, *family.old_rows]
  rows += [row for architecture in family.architectures for row in architecture.rows]
  patterns = [re.escape(row.name) for row in rows] + [*map(re.escape, family.copies)]
  number = r"\\{(layer|expert)\\}"
  known = re.compile("|".join(re.sub(number, r"\\d+", p) for p in patterns))
  renamed: dict[str, Tensor] = {}
  for given, tensor in tensors.items():
    name = given
    for pattern, replacement in family.renames:
      name = re.sub(pattern, replacement, name)
    if not known.fullmatch(name) and known.fullmatch(family.prefix + name):
      name = family.prefix + name
    if name in renamed:
      raise DataError(
        f"two tensors mean {name}", f"{given} and another spelling of it", "one of them"
      )
    renamed[name] = tensor
  return renamed


def check_tensors(
  directory: pathlib.Path,
  parts: list[WeightPart],
  tensors: dict[str, Tensor],
  family: Family,
  skip: tuple[str, ...],
) -> list[str]:
  """Returns the names of the tensors that are left out.

  Args:
    skip: patterns of names that may be left out.
  Raises:
    DataError: files and layout disagree, or tensors that config.json ties differ.
  """
  needed = {part.name: part.shape for part in parts}
  missing = [name for name in needed if name not in tensors]
  present = [name for name in needed if name in tensors]
  wrong = [
    f"{name} {tensors[name].shape} for {needed[name]}"
    for name in present
    if tensors[name].shape != needed[name]
  ]
  wrong += [
    f"{name} of {tensors[name].dtype}"
    for name in present
    if tensors[name].dtype not in _FLOATS
  ]
  extra = [
    name
    for name in tensors
    if name not in needed and not _matches(name, family.ignored)
  ]
  copies = [name for name in extra if name in family.copies]
  left_out = [
    name
    for name in extra
    if name not in copies and _matches(name, (*family.unused, *skip))
  ]
  unknown = [name for name in extra if name not in (*copies, *left_out)]
  problems = {"missing:": missing, "unknown:": unknown, "wrong:  ": wrong}
  if any(problems.values()):
    lines = [f"  {word} {_listed(names)}" for word, names in problems.items() if names]
    what = f"the weights in {directory} are not those of its config.json"
    hint = "--skip=PATTERN to leave out tensors" if unknown and not missing else ""
    raise DataError("\n".join([what, *lines]), hint=hint)
  for name in copies:
    _check_copy(name, family.copies[name], tensors)
  return left_out


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
  return any(re.search(pattern, name) for pattern in patterns)


def _listed(names: list[str]) -> str:
  return ", ".join(names[:4]) + (f", ... {len(names)} in all" if names[4:] else "")


def _check_copy(name: str, other: str, tensors: dict[str, Tensor]) -> None:
  """Raises DataError unless two tensors that config.json ties are equal."""
  a, b = tensors[name].read(), tensors[other].read()
  rows = max(1, 1_000_000 // max(1, math.prod(a.shape[1:])))
  equal = a.shape == b.shape and all(
    np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows)
  )
  if not equal:
    raise DataError(
      f"{name} and {other} differ, and config.json ties them",
      "two sets of numbers where the model has one",
      'equal numbers, or "tie_word_embeddings": false',
    )
