"""PyTorch checkpoints (`pytorch_model.bin`, `*.pt`), read without unpickling them.

A pickle is a program: loading one runs what its author wrote. Here its instructions
are only listed (`pickletools.genops`), and a small machine follows those that build
plain values and tensors. It imports and calls nothing: a name that it does not know
becomes a `Placeholder`, and a tensor made of one is refused. A small pickle can also
describe a value that takes hours to compare, hash or print, by using one part in many
places. So sizes and numbers of instructions are bounded, keys are plain values, and
values from the file are named in messages by their kind.

Both layouts are read: the zip archive of PyTorch 1.6 and later, and the older sequence
of pickles. Numbers stay in the file until they are asked for.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import pickletools
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np

from flaxlm.errors import printable
from flaxlm.interop.safetensors_files import (
  MAX_DIMS,
  Tensor,
  c_strides,
  damaged_weights,
  extent,
)

_STORAGES = {
  "torch.DoubleStorage": np.dtype(np.float64),
  "torch.FloatStorage": np.dtype(np.float32),
  "torch.HalfStorage": np.dtype(np.float16),
  "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch.LongStorage": np.dtype(np.int64),
  "torch.IntStorage": np.dtype(np.int32),
  "torch.ShortStorage": np.dtype(np.int16),
  "torch.CharStorage": np.dtype(np.int8),
  "torch.ByteStorage": np.dtype(np.uint8),
  "torch.BoolStorage": np.dtype(np.bool_),
}
_DICTS = ("collections.OrderedDict", "builtins.dict", "__builtin__.dict")
# Keys under which training scripts store the weights, beside other things.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# A tensor takes about 32 instructions and 150 bytes; files have 10^4 tensors at most.
_MAX_PICKLE = 32 << 20  # bytes of one pickle
_MAX_INSTRUCTIONS = 1_000_000  # each of them adds at most a few hundred bytes
_MAX_REPEATED = 1 << 24  # numbers of a tensor that repeats those of its storage
_FAILURES = (
  ValueError,
  TypeError,
  KeyError,
  IndexError,
  AttributeError,
  OverflowError,
  MemoryError,
  EOFError,
  struct.error,
  zipfile.BadZipFile,
  RuntimeError,  # an unknown compression, or encryption
  zlib.error,
)


@dataclasses.dataclass
class Placeholder:
  """A name in the file that we do not know; it does nothing."""

  name: str

  # Hashable by identity, since it may be the key of a dictionary.
  __hash__ = object.__hash__


@dataclasses.dataclass(frozen=True)
class Storage:
  """Consecutive numbers in the file, found by their key."""

  key: str
  dtype: np.dtype
  size: int  # elements
  start: int = 0  # elements into the storage `key`: old files have views of storages


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A tensor as a pickle describes it."""

  storage: Storage
  offset: int  # elements
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # elements


_MARK = object()


class _PickleMachine:
  """Follows the instructions of one pickle; `run` returns the value that it builds.

  Instructions have their names in `pickletools`, which documents each of them.
  """

  def __init__(self):
    self.stack, self.memo = [], {}

  def run(self, instructions):
    for opcode, argument, _ in itertools.islice(instructions, _MAX_INSTRUCTIONS):
      if opcode.name == "STOP":
        return self.stack.pop()
      self.step(opcode.name, argument)
    raise ValueError(f"a pickle without an end, or with {_MAX_INSTRUCTIONS:,} parts")

  def step(self, name: str, argument) -> None:
    push, pop = self.stack.append, self.stack.pop
    match name:
      case "PROTO" | "FRAME":
        pass
      case "MARK":
        push(_MARK)
      case "NONE":
        push(None)
      case "NEWTRUE" | "NEWFALSE":
        push(name == "NEWTRUE")
      case "POP":
        pop()
      case "DUP":
        push(self.stack[-1])
      case "PUT" | "BINPUT" | "LONG_BINPUT":
        self.memo[int(argument)] = self.stack[-1]
      case "MEMOIZE":
        self.memo[len(self.memo)] = self.stack[-1]
      case "GET" | "BINGET" | "LONG_BINGET":
        push(self.memo[int(argument)])
      case "GLOBAL":
        push(Placeholder(argument.replace(" ", ".", 1)))
      case "STACK_GLOBAL":
        attribute, module = pop(), pop()
        push(Placeholder(f"{_show(module)}.{_show(attribute)}"))
      case "BINPERSID":
        push(make_storage(pop()))
      case "REDUCE" | "NEWOBJ":
        arguments, function = pop(), pop()
        push(_call_known(function, arguments))
      case "NEWOBJ_EX":
        _, arguments, function = pop(), pop(), pop()
        push(_call_known(function, arguments))
      case "BUILD":
        pop()  # attributes of an object: no weights are among them
      case _ if name in _CONSTANTS:
        push(argument)
      case _:
        self.collect(name)

  def collect(self, name: str) -> None:
    """Follows the instructions that make or fill a container."""
    push, pop = self.stack.append, self.stack.pop
    match name:
      case "EMPTY_DICT":
        push({})
      case "EMPTY_LIST":
        push([])
      case "EMPTY_SET":
        push(set())
      case "EMPTY_TUPLE":
        push(())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        items = [pop() for _ in range(int(name[-1]))]
        push(tuple(reversed(items)))
      case "TUPLE":
        push(tuple(self.pop_marked()))
      case "LIST":
        push(self.pop_marked())
      case "FROZENSET":
        push(frozenset(map(_check_key, self.pop_marked())))
      case "DICT":
        push(_pairs(self.pop_marked()))
      case "APPEND":
        self.fill([pop()])
      case "APPENDS" | "ADDITEMS":
        self.fill(self.pop_marked())
      case "SETITEM":
        value, key = pop(), pop()
        self.fill([key, value])
      case "SETITEMS":
        self.fill(self.pop_marked())
      case "POP_MARK":
        self.pop_marked()
      case _:
        raise ValueError(f"the instruction {name}")

  def pop_marked(self) -> list:
    """Removes and returns everything above the last mark, and removes the mark."""
    items = []
    while (item := self.stack.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  def fill(self, items: list) -> None:
    target = self.stack[-1]
    if isinstance(target, dict):
      target.update(_pairs(items))
    elif isinstance(target, list):
      target.extend(items)
    elif isinstance(target, set):
      target.update(map(_check_key, items))
    elif not isinstance(target, Placeholder):
      raise TypeError(f"items for a {type(target).__name__}")


# Instructions that push the value of their argument.
_CONSTANTS = {
  *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
  *("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
  *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
  *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _pairs(items: list) -> dict:
  return dict(zip(map(_check_key, items[::2]), items[1::2], strict=True))


def _check_key(value):
  """Returns a key or element of a set; one that is slow to hash is refused."""
  parts = value if isinstance(value, tuple) else (value,)
  plain = (str, bytes, int, float, bool, type(None), Placeholder)
  if len(parts) > MAX_DIMS or not all(isinstance(part, plain) for part in parts):
    raise TypeError(f"a key that is {_show(value)}")
  return value


def _show(value) -> str:
  """Returns a value from the file for a message: containers by their kind alone."""
  if isinstance(value, Placeholder):
    return printable(value.name, 80)
  if isinstance(value, str | bool | float | None):
    return printable(value, 80)
  if isinstance(value, int) and value.bit_length() < 64:
    return str(value)
  return f"a {type(value).__name__}"


def _numbers(values) -> tuple[int, ...]:
  """Returns a shape or strides; ValueError if they are anything else."""
  if not isinstance(values, tuple | list) or len(values) > MAX_DIMS:
    raise ValueError(f"{_show(values)} where a tensor has its shape or strides")
  if not all(type(n) is int and 0 <= n < 2**63 for n in values):
    raise ValueError(f"a tensor of shape or strides ({', '.join(map(_show, values))})")
  return tuple(values)


def make_storage(persistent_id: tuple) -> Storage:
  """Makes a storage from ("storage", type, key, device, size[, view or None])."""
  kind, storage_type, key, _, size, *view = persistent_id
  known = isinstance(storage_type, Placeholder) and storage_type.name in _STORAGES
  if kind != "storage" or not known or not isinstance(key, str | int):
    raise ValueError(f"a storage of type {_show(storage_type)}, key {_show(key)}")
  start = 0
  if view and view[0] is not None:
    _, start, size = view[0]
  start, size = _numbers((start, size))
  return Storage(str(key), _STORAGES[storage_type.name], size, start)


def _call_known(function, arguments: tuple):
  """Returns what calling `function` would return, for the few that are known."""
  name = function.name if isinstance(function, Placeholder) else ""
  if name in _DICTS:
    pairs = arguments[0] if arguments else []
    if not isinstance(pairs, list | tuple):
      raise TypeError(f"a dictionary made of {_show(pairs)}")
    return {_check_key(key): value for key, value in pairs}
  if name == "torch.Size":
    return _numbers(arguments[0])
  if name in ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"):
    return arguments[0]
  if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
    return make_tensor_recipe(*arguments[:4])
  return Placeholder(name or "an object")


def make_tensor_recipe(storage, offset, shape, strides) -> Recipe:
  if not isinstance(storage, Storage):
    raise ValueError(f"a tensor made of {_show(storage)}")
  (offset,), shape, strides = _numbers((offset,)), _numbers(shape), _numbers(strides)
  if len(shape) != len(strides):
    raise ValueError(f"a tensor of shape {shape} with strides {strides} at {offset}")
  if offset + extent(shape, strides) > storage.size:
    raise ValueError(f"a tensor of shape {shape} in {storage.size} numbers")
  if math.prod(shape) > max(storage.size, _MAX_REPEATED):
    raise ValueError(f"a tensor of shape {shape} that repeats {storage.size} numbers")
  return Recipe(storage, offset, shape, strides)


def read_torch(path: str | os.PathLike) -> dict[str, Tensor]:
  """Returns the tensors in a PyTorch checkpoint by name, without reading their numbers.

  The weights may be the whole file, or one of its entries: "model", "state_dict",
  "model_state_dict" or "module".

  Raises:
    DataError: the file is damaged, compressed, big-endian, holds no such weights, or
      describes its tensors by more than files of models do.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    try:
      if zipfile.is_zipfile(file):
        value, starts = _read_archive(file)
      else:
        file.seek(0)
        value, starts = _read_legacy(file)
      recipes = _find_weights(value)
      size = path.stat().st_size
      return {name: locate_tensor(path, size, r, starts) for name, r in recipes.items()}
    except _FAILURES as error:
      reason = " ".join(f"{type(error).__name__}: {error}"[:300].split())
      raise damaged_weights(path, reason) from error


def _read_archive(file) -> tuple[object, dict[str, tuple[int, int]]]:
  """Returns (value, {storage key: (first byte, bytes)}) of the zip layout."""
  with zipfile.ZipFile(file) as archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    (main,) = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    root = main.removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order and (order.file_size > 64 or archive.read(order) != b"little"):
      raise ValueError("numbers in big-endian order")
    if entries[main].file_size > _MAX_PICKLE:
      raise ValueError(f"a description of {entries[main].file_size:,} bytes")
    value = _PickleMachine().run(pickletools.genops(archive.read(main)))
  starts = {}
  for name, entry in entries.items():
    if not name.startswith(f"{root}data/"):
      continue
    if entry.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"{name} is compressed")
    # The local header repeats the name, with its own padding: only this one is exact.
    file.seek(max(entry.header_offset + 26, 0))
    name_length, padding = struct.unpack("<HH", file.read(4))
    start = entry.header_offset + 30 + name_length + padding
    starts[name.removeprefix(f"{root}data/")] = (start, entry.file_size)
  return value, starts


def _read_legacy(file) -> tuple[object, dict[str, tuple[int, int]]]:
  """Does the same for PyTorch before 1.6: five pickles, then the storages."""
  magic = file.read(64)
  if b"\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") not in magic:
    raise ValueError("not a PyTorch checkpoint")
  file.seek(0)
  _, protocol, system, value, keys = [
    _PickleMachine().run(pickletools.genops(_Bounded(file))) for _ in range(5)
  ]
  if protocol != 1001 or not system["little_endian"]:
    raise ValueError(f"protocol {_show(protocol)}, or numbers in big-endian order")
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
    raise ValueError(f"{_show(keys)} where the names of the storages are")
  sizes = {}
  _gather_storages(value, sizes, set())
  starts = {}
  for key in keys:
    (size,) = struct.unpack("<Q", file.read(8))
    start = file.tell()
    # A storage that no tensor uses has no known width, and hides where the next starts.
    width = sizes[key]
    starts[key] = (start, size * width)
    file.seek(min(start + size * width, 2**62))
  return value, starts


class _Bounded:
  """The part of a file that a pickle may take, for `pickletools`."""

  def __init__(self, file):
    self.file, self.left = file, _MAX_PICKLE
    self.tell = file.tell

  def read(self, size: int) -> bytes:
    self.left -= size
    if size < 0 or self.left < 0:
      raise ValueError(f"a description of more than {_MAX_PICKLE:,} bytes")
    return self.file.read(size)

  def readline(self) -> bytes:
    line = self.file.readline(self.left + 1)
    self.left -= len(line)
    if self.left < 0:
      raise ValueError(f"a description of more than {_MAX_PICKLE:,} bytes")
    return line


def _gather_storages(value, sizes: dict[str, int], seen: set[int]) -> None:
  """Adds to `sizes` the bytes per number of each storage used anywhere in `value`."""
  waiting = [value]
  while waiting:
    value = waiting.pop()
    if id(value) in seen:
      continue
    seen.add(id(value))
    if isinstance(value, Recipe):
      sizes[value.storage.key] = value.storage.dtype.itemsize
    elif isinstance(value, dict):
      waiting += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
      waiting += value


def _find_weights(value) -> dict[str, Recipe]:
  """Returns the dictionary of tensors inside the value that a file holds.

  Raises:
    ValueError: there is none, or it holds something that is not a tensor.
  """
  if not isinstance(value, dict):
    raise ValueError(f"holds a {type(value).__name__}, not a dictionary of tensors")
  inner = [key for key in _WRAPPERS if isinstance(value.get(key), dict)]
  if inner and not any(isinstance(item, Recipe) for item in value.values()):
    value = value[inner[0]]
  others = {k: v for k, v in value.items() if not isinstance(v, Recipe)}
  if others or not value:
    shown = [
      f"{_show(k)!r}: {_show(v) if isinstance(v, Placeholder) else type(v).__name__}"
      for k, v in list(others.items())[:4]
    ]
    raise ValueError(
      f"not a dictionary of tensors alone: {', '.join(shown) or 'nothing'}"
      + (f", ... {len(others)} in all" if len(others) > 4 else "")
    )
  if not all(isinstance(name, str) for name in value):
    raise ValueError("tensors without names")
  return value


def locate_tensor(path, file_size: int, recipe: Recipe, starts: dict) -> Tensor:
  """Returns where the numbers of a recipe lie in the file."""
  storage, width = recipe.storage, recipe.storage.dtype.itemsize
  start, length = starts[storage.key]
  first = storage.start + recipe.offset
  if (storage.start + storage.size) * width > length or start + length > file_size:
    raise ValueError(f"storage {storage.key} of {storage.size} numbers is cut")
  contiguous = recipe.strides == c_strides(recipe.shape)
  strides = None if contiguous else recipe.strides
  return Tensor(path, start + first * width, storage.dtype, recipe.shape, strides)
