"""Models in Hugging Face's directories: config.json and weights, read and written.

The layout of the weights is planned before a number is read (weight_layout.py). Then
one tensor after another is copied to its place: memory holds our weights and the tensor
at hand.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from flaxlm.errors import ConfigError, DataError, MissingInputError, StorageError
from flaxlm.files import write_atomically, writing
from flaxlm.interop.export_manifest import check_export
from flaxlm.interop.family import Family, wrong_hf_value
from flaxlm.interop.hf_config import (
  choose_family,
  complete_config,
  find_family,
  read_config,
)
from flaxlm.interop.hf_fields import flatten_fields
from flaxlm.interop.safetensors_files import MAX_SHARD, Tensor, write_safetensors
from flaxlm.interop.weight_files import check_tensors, open_weights, rename_tensors
from flaxlm.interop.weight_layout import (
  WeightPart,
  lay_out_weights,
  letter_sizes,
  pick_rows,
  weight_to_ours,
  weight_to_theirs,
)
from flaxlm.interop.weight_names import Row
from flaxlm.json_files import read_json
from flaxlm.machine import host_memory
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer, describe_weights
from flaxlm.models.trees import nest

EXPORT_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}
_MISSING = 1000  # tensors that are looked for and listed; more is another model
# Fields that decide how a model runs; Hugging Face's config has no such keys.
_RUNTIME_FIELDS = {
  "attention": "auto",
  "dtype": "float32",
  "quantize": "none",
  "remat": "none",
  "keep": (),
  "offload": (),
  "unroll": 1,
  "dropout": 0.0,
}


class Imported(NamedTuple):
  """A model as `read_model` returns it."""

  family: Family
  fields: dict  # of config.model, groups nested
  leaves: dict[str, np.ndarray]  # path: float32
  config: dict  # the config.json that was read
  left_out: list[str]  # tensors that the architecture does not use


def read_model(
  directory, skip: tuple[str, ...] = (), architecture: str = ""
) -> Imported:
  """Reads a model that `save_pretrained` or a training script wrote.

  Args:
    directory: holds config.json and the weights, in one file or in shards.
    skip: patterns of tensors that the caller asks to leave out.
    architecture: the class of transformers that the weights are of, if config.json
      does not name it.
  Raises:
    MissingInputError: no config.json, or no weights.
    DataError: the architecture is not supported, files are damaged, or tensors are
      missing, unknown or of another shape; the message lists them.
    StorageError: the weights are larger than this machine's memory.
  """
  directory = pathlib.Path(directory)
  check_export(directory)
  hf = _read_config_json(directory / "config.json")
  family = find_family(hf.get("model_type"))
  tensors = rename_tensors(family, open_weights(directory))
  for name, other in family.copies.items():
    if name in tensors and other not in tensors:
      tensors[other] = tensors.pop(name)  # tied, and saved under the other name
  named = {"architectures": [architecture]} if architecture else {}
  family, found, flat = read_config(hf | named, tensors)
  fields = nest(flat, ".") | _RUNTIME_FIELDS
  rows = pick_rows(family, found, tensors)
  _check_size(rows, fields, tensors)
  shapes = weight_shapes(fields)
  parts = lay_out_weights(rows, fields, shapes)
  left_out = check_tensors(directory, parts, tensors, family, skip)
  size = sum(4 * math.prod(shape) for shape in shapes.values())
  if size > host_memory():
    given = f"{size / 2**30:,.1f} GiB of weights in float32"
    needed = f"at most the {host_memory() / 2**30:,.1f} GiB of this machine's memory"
    raise StorageError(f"{directory} is too large to read here", given, needed)
  leaves = _load_weights(parts, tensors, fields, shapes)
  return Imported(family, fields, leaves, hf, left_out)


def _check_size(rows: list[Row], fields: dict, tensors: Mapping[str, Tensor]) -> None:
  """Raises DataError if config.json describes far more than the files hold."""
  moe, layers = fields["moe"], fields["num_layers"]
  if any("{expert}" in row.name for row in rows):
    layers += (layers - moe["first_dense_layers"]) * moe["num_experts"]
  if layers > len(tensors) + _MISSING:
    raise wrong_hf_value(
      "the number of layers, or of experts,",
      f"{fields['num_layers']} layers, {moe['num_experts']} experts",
      f"layers that the {len(tensors)} tensors in the files can fill",
    )


def _read_config_json(path: pathlib.Path) -> dict:
  try:
    return read_json(path)
  except FileNotFoundError:
    raise MissingInputError(
      f"{path} does not exist",
      path.parent.absolute(),
      "a directory with config.json and weights, as transformers saves it",
    ) from None


def weight_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
  """Returns {path: shape} for the model that `config.model` = `fields` describes."""
  return {path: shape for path, shape, _ in describe_weights(_abstract_model(fields))}


def make_model(fields: dict, leaves: Mapping[str, np.ndarray]) -> Transformer:
  """Returns the model with these weights."""
  model = _abstract_model(fields)
  values = [leaves[path] for path, _, _ in describe_weights(model)]
  return jax.tree.unflatten(jax.tree.structure(model), values)


def _abstract_model(fields: dict) -> Transformer:
  config = TransformerConfig(**(_RUNTIME_FIELDS | fields))
  return jax.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))


def _load_weights(
  parts: list[WeightPart], tensors: dict[str, Tensor], fields: dict, shapes: dict
) -> dict[str, np.ndarray]:
  """Copies each tensor to its place in new float32 weights."""
  sizes = letter_sizes(fields)
  leaves = {path: _aligned_empty(shape) for path, shape in shapes.items()}
  for part in parts:
    arrays = weight_to_ours(tensors[part.name].read(), part, sizes)
    for path, array in zip(part.paths, arrays, strict=True):
      leaves[path][part.index] = array
  return leaves


def _aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
  """A float32 array that starts at a multiple of 64 bytes: JAX need not copy it."""
  size = 4 * math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(np.float32).reshape(shape)


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
    fields: of config.model, groups nested.
    leaves: path: weight; NumPy arrays, or JAX arrays in this host's memory. Each is
      asked for once, so a mapping may read them from disk as they are needed.
    dtype: of the files: float32, bfloat16 or float16.
    like: a config.json, perhaps the one the model came with. Its family, special ids,
      label names and other keys that do not change what is computed are kept.
    max_shard: bytes of tensors per file.
  Raises:
    ConfigError: no Hugging Face family computes what this model does.
    DataError: a weight is too large for float16.
    StorageError: the disk is full or fails.
  """
  like = like or {}
  if dtype not in EXPORT_DTYPES:
    raise ConfigError("--dtype", dtype, "one of " + " ".join(EXPORT_DTYPES))
  fields = _RUNTIME_FIELDS | fields
  model_type = like.get("model_type", "")
  family, architecture, hf = choose_family(flatten_fields(fields), model_type)
  hf = complete_config(hf, like, dtype)
  shapes = weight_shapes(fields)
  parts = lay_out_weights([*family.rows, *architecture.rows], fields, shapes)
  # All parts of a weight are written together, so that it can be freed afterwards.
  order = {path: i for i, path in enumerate(shapes)}
  parts.sort(key=lambda part: order[part.paths[0]])
  text = json.dumps(hf, indent=2, sort_keys=True) + "\n"
  with writing(directory):
    write_atomically(pathlib.Path(directory) / "config.json", text)
  specs = {part.name: (part.shape, EXPORT_DTYPES[dtype]) for part in parts}
  arrays = _convert_weights(parts, leaves, shapes, EXPORT_DTYPES[dtype])
  write_safetensors(directory, specs, arrays, max_shard)
  return hf


def _convert_weights(
  parts: list[WeightPart],
  leaves: Mapping[str, np.ndarray],
  shapes: dict,
  dtype: np.dtype,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the name and the array of each tensor in the files."""
  paths, whole = (), []
  for part in parts:
    if part.paths != paths:
      whole = []  # freed before the next weights are read
      paths, whole = part.paths, [np.asarray(leaves[path]) for path in part.paths]
      for path, array in zip(paths, whole, strict=True):
        if array.shape != shapes[path]:
          raise ConfigError(f"the weight {path}", array.shape, f"{shapes[path]}")
    given = weight_to_theirs([array[part.index] for array in whole], part)
    with np.errstate(over="ignore"):
      array = given.astype(dtype)
    if dtype == np.float16 and not np.array_equal(
      np.isfinite(array), np.isfinite(given)
    ):
      raise DataError(
        f"{part.name} is too large for float16",
        f"a weight of {np.nanmax(np.abs(given)):.4g}",
        "at most 65504",
        "--dtype=bfloat16",
      )
    yield part.name, array
