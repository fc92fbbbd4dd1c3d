"""Models in Hugging Face's directories: config.json and weights, read and written.

The work is planned before a number is read: which tensor of the files fills which part
of which weight. A plan that leaves a tensor or a weight over is refused, so no weight
is ever guessed or left at zero. Then one tensor after another is copied to its place:
memory holds our weights and the tensor at hand.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.interop.family import Architecture, Family
from flaxlm.interop.hf_config import choose_family, find_family, read_config
from flaxlm.interop.hf_fields import SILENT, flatten_fields, nest_fields
from flaxlm.interop.safetensors_files import (
  INDEX,
  MAX_SHARD,
  Tensor,
  read_index,
  read_safetensors,
  write_safetensors,
)
from flaxlm.interop.torch_files import read_torch
from flaxlm.interop.weight_names import Row
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer, describe_weights

# In this order: safetensors are preferred where a directory has both.
FILES = (
  ("model.safetensors", read_safetensors),
  ("pytorch_model.bin", read_torch),
)
EXPORT_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}
FLOATS = (*EXPORT_DTYPES.values(), np.dtype(np.float64))
# How a model runs is not in Hugging Face's config.
RUNTIME = {
  "attention": "auto",
  "dtype": "float32",
  "quantize": "none",
  "remat": "none",
  "keep": (),
  "offload": (),
  "unroll": 1,
  "dropout": 0.0,
}

# Keys of a config.json that are not true of a model that comes from it.
OF_THE_ORIGINAL = {
  *("auto_map", "_name_or_path", "name_or_path", "_model_name_or_path"),
  *("transformers_version", "is_llama_config"),
  *("vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id"),
  *("boi_token_index", "boi_token_id", "eoi_token_index", "eoi_token_id"),
}
# Left out, these would be what transformers takes for usual in some family.
NO_IDS = dict.fromkeys(
  f"{role}_token_id" for role in ("bos", "eos", "pad", "cls", "sep")
)


class WeightPart(NamedTuple):
  """One tensor of the files, and the part of our weights that it is."""

  name: str
  shape: tuple[int, ...]  # in the file
  dims: str
  paths: tuple[str, ...]
  index: tuple[int, ...]  # layer and expert, in stacked weights


class Imported(NamedTuple):
  family: Family
  fields: dict  # of config.model, groups nested
  leaves: dict[str, np.ndarray]  # path: float32
  config: dict  # the config.json that was read
  left_out: list[str]  # tensors that the architecture does not use


def read_model(directory, skip: tuple[str, ...] = ()) -> Imported:
  """Reads a model that transformers saved: safetensors or PyTorch files.

  Args:
    directory: with config.json and the weights, in one file or in shards.
    skip: patterns of tensors to leave out, on the caller's word.
  Raises:
    MissingInputError: no config.json, or no weights.
    DataError: an architecture that is not supported, damaged files, or tensors that are
      missing, unknown or of another shape; lists them.
  """
  directory = pathlib.Path(directory)
  hf = read_json_file(directory / "config.json")
  family = find_family(hf.get("model_type"))
  tensors = rename_tensors(family, open_weights(directory))
  for name, other in family.copies.items():
    if name in tensors and other not in tensors:
      tensors[other] = tensors.pop(name)  # tied, and saved under the other name
  family, architecture, fields = read_config(hf, tensors)
  fields = nest_fields(fields) | RUNTIME
  shapes = weight_shapes(fields)
  rows = pick_rows(family, architecture, tensors)
  pieces = plan(rows, fields, shapes)
  left_out = check_tensors(directory, pieces, tensors, family, skip)
  return Imported(
    family, fields, load_weights(pieces, tensors, fields, shapes), hf, left_out
  )


def read_json_file(path: pathlib.Path) -> dict:
  try:
    value = json.loads(path.read_text())
    if isinstance(value, dict):
      return value
    reason = f"a JSON {type(value).__name__}"
  except FileNotFoundError:
    raise MissingInputError(
      f"{path} does not exist\n  given:  {path.parent.absolute()}\n"
      "  needed: a directory with config.json and weights, as transformers saves it"
    ) from None
  except ValueError as error:
    reason = f"{error}"
  raise DataError(f"{path} cannot be read\n  given:  {reason}\n  needed: a JSON object")


def open_weights(directory: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a directory, by name; reads no numbers."""
  for name, read in FILES:
    if (directory / name).is_file():
      return read(directory / name)
    if (directory / f"{name}{INDEX}").is_file():
      return read_index(directory / f"{name}{INDEX}", read)
  names = [f"{name} or {name}{INDEX}" for name, _ in FILES]
  has = " ".join(sorted(p.name for p in directory.iterdir())[:6]) or "nothing"
  raise MissingInputError(
    f"{directory} holds no weights\n  given:  {has}\n  needed: {', '.join(names)}"
  )


def rename_tensors(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
  """Gives tensors the names of the tables: from older ones, or ones without prefix."""
  rows = [*family.rows, *family.old_rows]
  rows += [row for architecture in family.architectures for row in architecture.rows]
  patterns = [re.escape(row.name) for row in rows] + [*map(re.escape, family.copies)]
  number = r"\\{(layer|expert)\\}"
  known = re.compile("|".join(re.sub(number, r"\\d+", p) for p in patterns))
  spelled: dict[str, Tensor] = {}
  for given, tensor in tensors.items():
    name = given
    for pattern, replacement in family.renames:
      name = re.sub(pattern, replacement, name)
    if not known.fullmatch(name) and known.fullmatch(family.prefix + name):
      name = family.prefix + name
    if name in spelled:
      raise DataError(
        f"two tensors mean {name}\n  given:  {given} and another spelling of it\n"
        "  needed: one of them"
      )
    spelled[name] = tensor
  return spelled


def complete(fields: dict) -> TransformerConfig:
  return TransformerConfig(**(RUNTIME | fields))


def abstract_model_of(fields: dict) -> Transformer:
  config = complete(fields)
  return jax.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))


def weight_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
  """Returns {path: shape} of the model that `config.model` = `fields` means."""
  return {path: shape for path, shape, _ in describe_weights(abstract_model_of(fields))}


def make_model(fields: dict, leaves: Mapping[str, np.ndarray]) -> Transformer:
  """Returns the model with these weights."""
  model = abstract_model_of(fields)
  values = [leaves[path] for path, _, _ in describe_weights(model)]
  return jax.tree.unflatten(jax.tree.structure(model), values)


def pick_rows(
  family: Family, architecture: Architecture, names: Mapping[str, object]
) -> list[Row]:
  """The rows of a family and its head, in the spelling that the files have."""
  rows = [*family.rows, *architecture.rows]
  first = [row for row in family.old_rows if row.name.format(layer=0) in names]
  replaced = {path for row in first for path in as_tuple(row.path)}
  return [row for row in rows if not replaced & set(as_tuple(row.path))] + first


def as_tuple(path: str | tuple[str, ...]) -> tuple[str, ...]:
  return (path,) if isinstance(path, str) else path


def plan(rows: list[Row], fields: dict, shapes: dict[str, tuple]) -> list[WeightPart]:
  """Returns one piece for each tensor of the files, outermost first, then by layer.

  Raises:
    ConfigError: a weight has no place in the rows.
  """
  sizes = letter_sizes(fields)
  first = next((s[0] for p, s in shapes.items() if p.startswith("first_blocks/")), 0)
  experts = fields["moe"]["num_experts"]
  pieces, filled = [], dict.fromkeys(shapes, 0)
  layers = [row for row in rows if "{layer}" in row.name]
  jobs = [(row, None) for row in rows if "{layer}" not in row.name]
  jobs += [(row, layer) for layer in range(fields["num_layers"]) for row in layers]
  for row, layer in jobs:
    paths, index = as_tuple(row.path), ()
    if layer is not None:
      index = (layer if layer < first else layer - first,)
      if layer < first:
        paths = tuple(f"first_{path}" for path in paths)
    if paths[0] not in shapes:
      continue
    shape = file_shape(row.dims, sizes, len(paths))
    for expert in range(experts) if "{expert}" in row.name else (None,):
      at = index if expert is None else (*index, expert)
      name = row.name.format(layer=layer, expert=expert)
      pieces.append(WeightPart(name, shape, row.dims, paths, at))
      for path in paths:
        filled[path] += 1
        inner = tuple(size_of(c, sizes, 0) for c in row.dims.split(" -> ")[1].split())
        assert inner == shapes[path][len(at) :], (path, inner, shapes[path], at)
  stacked = {path: len(piece.index) for piece in pieces for path in piece.paths}
  homeless = [
    path
    for path, shape in shapes.items()
    if filled[path] != math.prod(shape[: stacked.get(path, 0)])
  ]
  if homeless:
    raise ConfigError(
      "this model",
      f"weights {', '.join(homeless[:4])} ({len(homeless)} in all)",
      "weights that the family at Hugging Face has too",
    )
  return pieces


def letter_sizes(fields: dict) -> dict[str, int]:
  """The sizes of the letters in `weight_names.py`."""
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


def size_of(letter: str, sizes: dict[str, int], num_paths: int) -> int:
  if letter == "*":
    return num_paths
  return int(letter) if letter.isdigit() else sizes[letter]


def file_shape(dims: str, sizes: dict[str, int], num_paths: int) -> tuple[int, ...]:
  groups = dims.split(" -> ")[0].split()
  return tuple(
    math.prod(size_of(letter, sizes, num_paths) for letter in group) for group in groups
  )


def check_tensors(
  directory, pieces: list[WeightPart], tensors: dict[str, Tensor], family: Family, skip
) -> list[str]:
  """Raises DataError unless files and plan fit; returns what is left out of them."""
  needed = {piece.name: piece.shape for piece in pieces}
  missing = [name for name in needed if name not in tensors]
  wrong = [
    f"{name} {tensors[name].shape} for {shape}"
    for name, shape in needed.items()
    if name in tensors and tensors[name].shape != shape
  ]
  kinds = [
    f"{name} of {tensors[name].dtype}"
    for name in needed
    if name in tensors and tensors[name].dtype not in FLOATS
  ]
  extra = [
    name
    for name in tensors
    if name not in needed
    and not any(re.search(pattern, name) for pattern in family.ignored)
  ]
  copies = [name for name in extra if name in family.copies]
  dropped = (*family.unused, *skip)
  left_out = [
    name
    for name in extra
    if name not in copies and any(re.search(pattern, name) for pattern in dropped)
  ]
  unknown = [name for name in extra if name not in (*copies, *left_out)]
  problems = {
    "missing:": missing,
    "unknown:": unknown,
    "wrong:  ": wrong + kinds,
  }
  if any(problems.values()):
    lines = [f"  {word} {listed(names)}" for word, names in problems.items() if names]
    raise DataError(
      "\n".join(
        [f"the weights in {directory} are not those of its config.json", *lines]
      )
    )
  for name in copies:
    check_copy(name, family.copies[name], tensors)
  return left_out


def listed(names: list[str]) -> str:
  return ", ".join(names[:4]) + (f", ... {len(names)} in all" if names[4:] else "")


def check_copy(name: str, other: str, tensors: dict[str, Tensor]) -> None:
  """Raises DataError unless two tensors that config.json ties are equal."""
  a, b = tensors[name].read(), tensors[other].read()
  rows = max(1, 1_000_000 // max(1, math.prod(a.shape[1:])))
  equal = a.shape == b.shape and all(
    np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows)
  )
  if not equal:
    raise DataError(
      f"{name} and {other} differ, and config.json ties them\n"
      "  given:  two sets of numbers where the model has one\n"
      '  needed: equal numbers, or "tie_word_embeddings": false'
    )


def load_weights(pieces, tensors, fields: dict, shapes: dict) -> dict[str, np.ndarray]:
  """Copies each tensor to its place in newly made float32 weights."""
  sizes = letter_sizes(fields)
  leaves = {path: empty(shape) for path, shape in shapes.items()}
  for piece in pieces:
    parts = weight_to_ours(tensors[piece.name].read(), piece, sizes)
    for path, part in zip(piece.paths, parts, strict=True):
      leaves[path][piece.index] = part
  return leaves


def empty(shape: tuple[int, ...]) -> np.ndarray:
  """A float32 array that starts at a multiple of 64 bytes: JAX takes it as it is."""
  size = 4 * math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(np.float32).reshape(shape)


def weight_to_ours(
  array: np.ndarray, piece: WeightPart, sizes: dict
) -> list[np.ndarray]:
  """Splits a tensor of the files into ours; views, where the file is contiguous."""
  groups, ours = (side.split() for side in piece.dims.split(" -> "))
  letters = "".join(groups)
  count = len(piece.paths)
  array = array.reshape([size_of(letter, sizes, count) for letter in letters])
  order = ["*"] * ("*" in letters) + ours
  array = array.transpose([letters.index(letter) for letter in order])
  return list(array) if "*" in letters else [array]


def weight_to_theirs(arrays: list[np.ndarray], piece: WeightPart) -> np.ndarray:
  """The reverse of `to_ours`."""
  groups, ours = (side.split() for side in piece.dims.split(" -> "))
  letters = "".join(groups)
  order = ["*"] * ("*" in letters) + ours
  array = np.stack(arrays) if "*" in letters else arrays[0]
  return array.transpose([order.index(letter) for letter in letters]).reshape(
    piece.shape
  )


def write_model(
  directory,
  fields: dict,
  leaves: Mapping[str, np.ndarray],
  dtype: str = "float32",
  like: dict | None = None,
  max_shard: int = MAX_SHARD,
) -> dict:
  """Writes a model that `transformers` loads; returns its config.json.

  Args:
    directory: exists, and is empty.
    fields: of config.model.
    leaves: path: weight; arrays of numpy, or of JAX in the memory of this host. Each is
      asked for once, so a mapping may read them from disk as they are needed.
    dtype: of the files: float32, bfloat16 or float16.
    like: a config.json, perhaps the one the model came with: its family is kept, its
      special ids, names of labels and other keys that compute nothing.
    max_shard: bytes of a file.
  Raises:
    ConfigError: no family of Hugging Face computes what this model does.
    DataError: a weight is too large for float16.
    StorageError: the disk is full or fails.
  """
  like = like or {}
  if dtype not in EXPORT_DTYPES:
    raise ConfigError("--dtype", dtype, "one of " + " ".join(EXPORT_DTYPES))
  fields = RUNTIME | fields
  family, architecture, hf = choose_family(
    flatten_fields(fields), like.get("model_type", "")
  )
  hf = complete_config(hf, like, dtype)
  shapes = weight_shapes(fields)
  pieces = plan([*family.rows, *architecture.rows], fields, shapes)
  # All that one weight holds is written together: then it can be forgotten.
  order = {path: i for i, path in enumerate(shapes)}
  pieces.sort(key=lambda piece: order[piece.paths[0]])
  text = json.dumps(hf, indent=2, sort_keys=True) + "\n"
  (pathlib.Path(directory) / "config.json").write_text(text)
  specs = {piece.name: (piece.shape, EXPORT_DTYPES[dtype]) for piece in pieces}
  arrays = convert(pieces, leaves, shapes, EXPORT_DTYPES[dtype])
  write_safetensors(directory, specs, arrays, max_shard)
  return hf


def complete_config(hf: dict, like: dict, dtype: str) -> dict:
  """Adds the keys of `like` that compute nothing."""
  kept = {k: v for k, v in like.items() if k in SILENT and k not in OF_THE_ORIGINAL}
  if len(kept.get("id2label") or ()) == len(hf.get("id2label", ())):
    hf = {
      key: value for key, value in hf.items() if key not in ("id2label", "label2id")
    }
  else:
    kept.pop("id2label", None)
    kept.pop("label2id", None)
  return NO_IDS | kept | hf | {"dtype": dtype, "torch_dtype": dtype}


def convert(
  pieces: list[WeightPart],
  leaves: Mapping[str, np.ndarray],
  shapes: dict,
  dtype: np.dtype,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors of the files one by one."""
  paths, whole = (), []
  for piece in pieces:
    if piece.paths != paths:
      whole = []  # forgotten before the next are read
      paths, whole = piece.paths, [np.asarray(leaves[path]) for path in piece.paths]
      for path, array in zip(paths, whole, strict=True):
        if array.shape != shapes[path]:
          raise ConfigError(f"the weight {path}", array.shape, f"{shapes[path]}")
    parts = [array[piece.index] for array in whole]
    given = weight_to_theirs(parts, piece)
    with np.errstate(over="ignore"):
      array = given.astype(dtype)
    if dtype == np.float16 and not np.array_equal(
      np.isfinite(array), np.isfinite(given)
    ):
      raise DataError(
        f"{piece.name} is too large for float16\n"
        f"  given:  a weight of {np.nanmax(np.abs(given)):.4g}\n"
        "  needed: at most 65504\n  try:    --dtype=bfloat16"
      )
    yield piece.name, array
