"""Which part of our weights each tensor in the files fills, and how it is transposed.

The rows of weight_names.py become one `WeightPart` per tensor. A layout that leaves a
weight unfilled is refused, so no weight is ever guessed or left at zero.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.interop.family import Architecture, Family
from flaxlm.interop.weight_names import Row


class WeightPart(NamedTuple):
  """One tensor in the files, and the part of our weights that it fills."""

  name: str
  shape: tuple[int, ...]  # in the file
  dims: str
  paths: tuple[str, ...]
  index: tuple[int, ...]  # layer and expert, in stacked weights


def pick_rows(
  family: Family, architecture: Architecture, names: Mapping[str, object]
) -> list[Row]:
  """Returns the rows of a family and its head, in the spelling that the files use."""
  rows = [*family.rows, *architecture.rows]
  old = [row for row in family.old_rows if row.name.format(layer=0) in names]
  replaced = {path for row in old for path in _as_tuple(row.path)}
  return [row for row in rows if not replaced & set(_as_tuple(row.path))] + old


def _as_tuple(path: str | tuple[str, ...]) -> tuple[str, ...]:
  return (path,) if isinstance(path, str) else path


def lay_out_weights(
  rows: list[Row], fields: dict, shapes: dict[str, tuple]
) -> list[WeightPart]:
  """Returns one part per tensor, the weights outside the layers first, then by layer.

  Args:
    fields: of config.model, groups nested.
    shapes: {path: shape} of the model's weights.
  Raises:
    ConfigError: a weight appears in no row.
  """
  sizes = letter_sizes(fields)
  first = next((s[0] for p, s in shapes.items() if p.startswith("first_blocks/")), 0)
  experts = fields["moe"]["num_experts"]
  parts, filled = [], dict.fromkeys(shapes, 0)
  layered = [row for row in rows if "{layer}" in row.name]
  jobs = [(row, None) for row in rows if "{layer}" not in row.name]
  jobs += [(row, layer) for layer in range(fields["num_layers"]) for row in layered]
  for row, layer in jobs:
    paths, index = _as_tuple(row.path), ()
    if layer is not None:
      index = (layer if layer < first else layer - first,)
      if layer < first:
        paths = tuple(f"first_{path}" for path in paths)
    if paths[0] not in shapes:
      continue
    shape = _file_shape(row.dims, sizes, len(paths))
    for expert in range(experts) if "{expert}" in row.name else (None,):
      at = index if expert is None else (*index, expert)
      name = row.name.format(layer=layer, expert=expert)
      parts.append(WeightPart(name, shape, row.dims, paths, at))
      for path in paths:
        filled[path] += 1
        inner = tuple(_size_of(c, sizes, 0) for c in row.dims.split(" -> ")[1].split())
        assert inner == shapes[path][len(at) :], (path, inner, shapes[path], at)
  stacked = {path: len(part.index) for part in parts for path in part.paths}
  unfilled = [
    path
    for path, shape in shapes.items()
    if filled[path] != math.prod(shape[: stacked.get(path, 0)])
  ]
  if unfilled:
    raise ConfigError(
      "this model",
      f"weights {', '.join(unfilled[:4])} ({len(unfilled)} in all)",
      "weights that its Hugging Face family has too",
    )
  return parts


def letter_sizes(fields: dict) -> dict[str, int]:
  """Returns the size of each letter in the rows of weight_names.py."""
  moe, labels = fields["moe"], {"span": 2, "choice": 1}
  return {
    "V": fields["vocab_size"],
    "D": fields["embed_dim"],
    "O": fields["embed_dim"],
    "N": fields["num_heads"],
    "K": fields["num_kv_heads"],
    "H": fields["head_dim"],
    "F": fields["mlp_dim"],
    "P": fields["max_len"],
    "T": fields["num_segment_types"],
    "E": moe["num_experts"],
    "X": moe["expert_dim"] or fields["mlp_dim"],
    "G": moe["shared_dim"],
    "C": labels.get(fields["head"], fields["num_labels"]),
  }


def _size_of(letter: str, sizes: dict[str, int], num_paths: int) -> int:
  if letter == "*":
    return num_paths
  return int(letter) if letter.isdigit() else sizes[letter]


def _file_shape(dims: str, sizes: dict[str, int], num_paths: int) -> tuple[int, ...]:
  groups = dims.split(" -> ")[0].split()
  return tuple(
    math.prod(_size_of(letter, sizes, num_paths) for letter in group)
    for group in groups
  )


def weight_to_ours(
  array: np.ndarray, part: WeightPart, sizes: dict
) -> list[np.ndarray]:
  """Splits a tensor from the files into ours; returns views where it is contiguous."""
  letters, order = _dim_orders(part.dims)
  count = len(part.paths)
  array = array.reshape([_size_of(letter, sizes, count) for letter in letters])
  array = array.transpose([letters.index(letter) for letter in order])
  return list(array) if "*" in letters else [array]


def weight_to_theirs(arrays: list[np.ndarray], part: WeightPart) -> np.ndarray:
  """Joins our arrays into a tensor for the files: the reverse of `weight_to_ours`."""
  letters, order = _dim_orders(part.dims)
  array = np.stack(arrays) if "*" in letters else arrays[0]
  return array.transpose([order.index(letter) for letter in letters]).reshape(
    part.shape
  )


def _dim_orders(dims: str) -> tuple[str, list[str]]:
  """Returns the letters of `dims` in the order of the file, and in ours."""
  groups, ours = (side.split() for side in dims.split(" -> "))
  letters = "".join(groups)
  return letters, ["*"] * ("*" in letters) + ours
