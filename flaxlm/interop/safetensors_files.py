"""safetensors files: read without loading them, written one tensor at a time.

The format (github.com/huggingface/safetensors): eight bytes with the length of a JSON
header; the header with the type, shape and byte range of each tensor; then the bytes.
Large models are split over several files, and an index says which tensor is where.

A tensor that is read is a view of the mapped file, so only the tensor that is being
converted takes memory.
"""

import dataclasses
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from flaxlm.errors import DataError, MissingInputError, printable
from flaxlm.files import open_atomically, write_atomically, writing
from flaxlm.json_files import MAX_BYTES, check_fields, parse_json, read_json

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = MAX_BYTES  # the format allows 100 MB; 10^5 tensors need 10 MB
MAX_DIMS = 16  # of a tensor: none has more, and a product of many is slow
MAX_SHARD = 5_000_000_000  # bytes of tensors in one file that we write
INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """The place of a tensor in a file; `read` maps its numbers."""

  path: pathlib.Path
  offset: int  # bytes
  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...] | None = None  # in elements; None is C order

  def read(self) -> np.ndarray:
    """Returns a read-only view of the file, in the dtype of the file."""
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    strides = c_strides(self.shape) if self.strides is None else self.strides
    size = self.dtype.itemsize * extent(self.shape, strides)
    start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
    with open(self.path, "rb") as file:
      pages = mmap.mmap(
        file.fileno(), self.offset - start + size, access=mmap.ACCESS_READ, offset=start
      )
    steps = tuple(self.dtype.itemsize * s for s in strides)
    return np.ndarray(self.shape, self.dtype, pages, self.offset - start, steps)


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the strides of a contiguous array in C order, in elements."""
  return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
  """Returns how many elements a view spans, from the first it uses to the last."""
  if 0 in shape:
    return 0
  return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def damaged_weights(path, reason: str) -> DataError:
  """Returns the error for a file of weights that is damaged or not understood."""
  return DataError(
    f"{path} cannot be read",
    reason,
    "a complete, undamaged file",
    "download or write it again",
  )


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
  """Returns the tensors in one file by name; reads only its header.

  Raises:
    DataError: the header is damaged, or the file is shorter or longer than it says.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size
  with path.open("rb") as file:
    first = file.read(8)
    if first.startswith(b"version "):
      raise damaged_weights(path, "a Git LFS pointer: the file itself was not fetched")
    if len(first) < 8:
      raise damaged_weights(path, f"{size} bytes")
    (length,) = struct.unpack("<Q", first)
    if length > min(_MAX_HEADER, size - 8):
      raise damaged_weights(path, f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
  header = parse_json(text, f"the header of {path}")
  header.pop("__metadata__", None)
  tensors = {
    name: _parse_entry(path, 8 + length, name, e) for name, e in header.items()
  }
  # Every byte belongs to one tensor: this finds cuts, gaps and overlaps.
  end = 8 + length
  for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
    if tensor.offset != end and 0 not in tensor.shape:
      raise damaged_weights(
        path, f"{name} starts at byte {tensor.offset}, expected {end}"
      )
    end += tensor.dtype.itemsize * math.prod(tensor.shape)
  if end != size:
    raise damaged_weights(path, f"{size} bytes where the header describes {end}")
  return tensors


def _parse_entry(path: pathlib.Path, start: int, name: str, entry: object) -> Tensor:
  """Parses an entry of the header; raises DataError if it is invalid."""
  where = printable(f"{path}: {name}")
  if not isinstance(entry, dict):
    raise damaged_weights(path, f"{name} is not an object")
  check_fields(entry, where, {"dtype": str, "shape": list, "data_offsets": list})
  if entry["dtype"] not in _DTYPES:
    needed = f"is not one of {' '.join(_DTYPES)}"
    raise damaged_weights(path, f"{name}: dtype {entry['dtype'][:40]} {needed}")
  dtype, shape, place = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
  numbers = [*shape[: MAX_DIMS + 1], *place[:3]]
  if (
    len(shape) > MAX_DIMS
    or len(place) != 2
    or not all(type(n) is int and n >= 0 for n in numbers)
  ):
    raise damaged_weights(path, f"{name}: shape {shape[:9]} at {place[:9]}")
  begin, end = place
  if end - begin != dtype.itemsize * math.prod(shape):
    reason = f"{name}: shape {shape} of {dtype} in {end - begin} bytes"
    raise damaged_weights(path, reason)
  return Tensor(path, start + begin, dtype, tuple(shape))


def read_index(path: str | os.PathLike, read_file) -> dict[str, Tensor]:
  """Returns the tensors of a sharded model, from its `*.index.json`.

  Args:
    read_file: reads one shard: path -> {name: Tensor}.
  Raises:
    MissingInputError: a shard does not exist.
    DataError: the index and the shards do not name the same tensors.
  """
  path = pathlib.Path(path)
  files = read_json(path, {"weight_map": dict})["weight_map"]
  for file in files.values():
    inside = isinstance(file, str) and file and pathlib.PurePath(file).name == file
    if not inside or len(file.encode()) > 255:
      raise damaged_weights(path, f"a shard outside of the directory: {file!r}")
  shards = sorted(set(files.values()))
  missing = [name for name in shards if not (path.parent / name).is_file()]
  if missing:
    raise MissingInputError(
      f"{path} names {len(missing)} files that do not exist",
      f"no {', '.join(missing[:3])}",
      f"all of them in {path.parent}",
    )
  tensors = {}
  for shard in shards:
    found = read_file(path.parent / shard)
    named = {name for name, file in files.items() if file == shard}
    if wrong := sorted(named ^ set(found)):
      side = "index" if wrong[0] in named else "shard"
      raise damaged_weights(path, f"{wrong[0]} is in the {side} alone ({shard})")
    tensors |= found
  return tensors


def write_safetensors(
  directory: str | os.PathLike,
  specs: dict[str, tuple[tuple[int, ...], np.dtype]],
  arrays: Iterable[tuple[str, np.ndarray]],
  max_shard: int = MAX_SHARD,
) -> list[str]:
  """Writes `model.safetensors`, or shards and their index; returns the file names.

  Args:
    specs: (shape, dtype) of each tensor, in the order of `arrays`.
    arrays: (name, array) of each tensor; an iterator is consumed one at a time.
    max_shard: bytes of tensors in one file; a larger tensor gets a file of its own.
  Raises:
    StorageError: the disk is full or fails.
  """
  directory = pathlib.Path(directory)
  shards = _plan_shards(specs, max_shard)
  stem = "model-{:05d}-of-{:05d}.safetensors"
  names = [stem.format(i, len(shards)) for i in range(1, len(shards) + 1)]
  if len(shards) == 1:
    names = ["model.safetensors"]
  arrays = iter(arrays)
  with writing(directory):
    for name, shard in zip(names, shards, strict=True):
      _write_file(directory / name, {key: specs[key] for key in shard}, arrays)
    if len(shards) > 1:
      index = {
        "metadata": {"total_size": sum(_num_bytes(spec) for spec in specs.values())},
        "weight_map": {
          key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
      }
      text = json.dumps(index, indent=2) + "\n"
      write_atomically(directory / f"model.safetensors{INDEX}", text)
  assert next(arrays, None) is None, "more arrays than specs"
  return names


def _num_bytes(spec: tuple[tuple[int, ...], np.dtype]) -> int:
  return math.prod(spec[0]) * spec[1].itemsize


def _plan_shards(specs: dict, max_shard: int) -> list[list[str]]:
  """Splits the tensors, in order, into groups of at most `max_shard` bytes."""
  shards, size = [[]], 0
  for name, spec in specs.items():
    if shards[-1] and size + _num_bytes(spec) > max_shard:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += _num_bytes(spec)
  return shards


def _write_file(path: pathlib.Path, specs: dict, arrays: Iterator) -> None:
  """Writes one file: the whole header first, then each array as it arrives."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, dtype) in specs.items():
    start, end = end, end + _num_bytes((shape, dtype))
    header[name] = {
      "dtype": _DTYPE_NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight
  with open_atomically(path) as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (shape, dtype) in specs.items():
      given, array = next(arrays)
      assert (given, array.shape, array.dtype) == (name, tuple(shape), dtype), name
      # As bytes: the buffer protocol does not know bfloat16.
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
