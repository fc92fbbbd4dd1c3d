"""safetensors files: read without loading, written one tensor at a time.

The format (github.com/huggingface/safetensors): eight bytes with the length of a JSON
header, the header with type, shape and byte range of each tensor, then the bytes. Large
models lie in several files and an index says which tensor is where.

A tensor that is read is a view of the file, mapped for as long as the array lives: only
what is being converted takes memory.
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

from flaxlm.errors import DataError, MissingInputError, StorageError

SAFETENSORS_DTYPES = {
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
NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the format
MAX_SHARD = 5_000_000_000  # bytes of tensors in one file that is written
INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where the numbers of a tensor lie; `read` maps them."""

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
  return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
  """Elements from the first that a view touches to the last, both included."""
  if 0 in shape:
    return 0
  return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def damaged_weights(path, reason: str) -> DataError:
  return DataError(
    f"{path} cannot be read\n  given:  {reason}\n"
    "  needed: a complete, undamaged file\n"
    "  try:    download or write it again"
  )


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
  """Returns the tensors of one file, by name; reads its header only.

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
    if length > min(MAX_HEADER, size - 8):
      raise damaged_weights(path, f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
  try:
    header = json.loads(text, object_pairs_hook=without_repeats)
    header.pop("__metadata__", None)
    tensors = {name: parse_entry(path, 8 + length, e) for name, e in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise damaged_weights(
      path, f"a bad header: {type(error).__name__}: {error}"
    ) from error
  # Every byte belongs to one tensor: a cut, a gap or an overlap shows here.
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


def without_repeats(pairs: list) -> dict:
  if len(dict(pairs)) != len(pairs):
    raise ValueError("a name occurs twice")
  return dict(pairs)


def parse_entry(path: pathlib.Path, start: int, entry: dict) -> Tensor:
  """One entry of a header; ValueError and the like if it makes no sense."""
  if entry["dtype"] not in SAFETENSORS_DTYPES:
    raise ValueError(
      f"dtype {entry['dtype']} is not one of {' '.join(SAFETENSORS_DTYPES)}"
    )
  dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
  begin, end = entry["data_offsets"]
  if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
    raise ValueError(f"shape {shape} at {begin}..{end}")
  if end - begin != dtype.itemsize * math.prod(shape):
    raise ValueError(f"shape {shape} of {dtype} in {end - begin} bytes")
  return Tensor(path, start + begin, dtype, shape)


def read_index(path: str | os.PathLike, read_file) -> dict[str, Tensor]:
  """Returns the tensors of a sharded model from its `*.index.json`.

  Args:
    read_file: reads one shard: path -> {name: Tensor}.
  Raises:
    MissingInputError: a shard is not there.
    DataError: index and shards do not name the same tensors.
  """
  path = pathlib.Path(path)
  try:
    files = json.loads(path.read_text())["weight_map"]
    if not all(f and pathlib.PurePath(f).name == f for f in files.values()):
      raise ValueError("a shard outside of the directory")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise damaged_weights(path, f"{type(error).__name__}: {error}") from error
  shards = sorted(set(files.values()))
  missing = [name for name in shards if not (path.parent / name).is_file()]
  if missing:
    raise MissingInputError(
      f"{path} names {len(missing)} files that are not there\n"
      f"  given:  no {', '.join(missing[:3])}\n"
      f"  needed: all of them in {path.parent}"
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
    specs: (shape, dtype) of each tensor, in the order in which they come.
    arrays: (name, array) of each; drawn one by one, so they may be made on the way.
    max_shard: bytes of tensors in one file; a larger tensor has a file for itself.
  Raises:
    StorageError: the disk is full or fails.
  """
  directory = pathlib.Path(directory)
  shards = plan_shards(specs, max_shard)
  stem = "model-{:05d}-of-{:05d}.safetensors"
  names = [stem.format(i, len(shards)) for i in range(1, len(shards) + 1)]
  if len(shards) == 1:
    names = ["model.safetensors"]
  arrays = iter(arrays)
  try:
    for name, shard in zip(names, shards, strict=True):
      write_file(directory / name, {key: specs[key] for key in shard}, arrays)
    if len(shards) > 1:
      index = {
        "metadata": {"total_size": sum(nbytes(spec) for spec in specs.values())},
        "weight_map": {
          key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
      }
      text = json.dumps(index, indent=2) + "\n"
      (directory / f"model.safetensors{INDEX}").write_text(text)
  except OSError as error:
    raise StorageError(
      f"{directory} cannot be written\n  given:  {type(error).__name__}: {error}\n"
      "  needed: a directory with space"
    ) from error
  assert next(arrays, None) is None, "more arrays than specs"
  return names


def nbytes(spec: tuple[tuple[int, ...], np.dtype]) -> int:
  return math.prod(spec[0]) * spec[1].itemsize


def plan_shards(specs: dict, max_shard: int) -> list[list[str]]:
  """Cuts the tensors, in order, into runs of at most `max_shard` bytes."""
  shards, size = [[]], 0
  for name, spec in specs.items():
    if shards[-1] and size + nbytes(spec) > max_shard:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += nbytes(spec)
  return shards


def write_file(path: pathlib.Path, specs: dict, arrays: Iterator) -> None:
  """One safetensors file: the whole header first, then each array as it comes."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, dtype) in specs.items():
    start, end = end, end + nbytes((shape, dtype))
    header[name] = {
      "dtype": NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (shape, dtype) in specs.items():
      given, array = next(arrays)
      assert (given, array.shape, array.dtype) == (name, tuple(shape), dtype), name
      # As bytes: the buffer protocol does not know bfloat16.
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    file.flush()
    os.fsync(file.fileno())
