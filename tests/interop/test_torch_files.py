"""PyTorch files are read as torch reads them; nothing in them is executed."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import time
import zipfile

import numpy as np
import pytest

from flaxlm.errors import DataError
from flaxlm.interop import torch_files
from flaxlm.interop.safetensors_files import read_index
from flaxlm.interop.torch_files import (
  Placeholder,
  locate_tensor,
  make_storage,
  make_tensor_recipe,
  read_torch,
)

torch = pytest.importorskip("torch", reason="makes the files to read")
KINDS = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8",
         "uint8", "bool")  # fmt: skip
LAYOUTS = [True, False]  # the zip archive and the older format


def values() -> dict:
  torch.manual_seed(0)
  base = torch.randn(6, 8)
  tensors = {kind: (9 * base).to(getattr(torch, kind)) for kind in KINDS}
  tensors |= {
    "transposed": base.T,
    "part": base[1:4, 2:7:2],
    "expanded": base[:, :1].expand(6, 3),
    "shared": base,
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "parameter": torch.nn.Parameter(base + 1),
  }
  return tensors


def numbers(tensor) -> np.ndarray:
  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    return tensor.float().numpy()
  return tensor.numpy()


def assert_equal(found, tensors):
  assert list(found) == list(tensors)
  for name, tensor in tensors.items():
    array = found[name].read()
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
    array = array.astype(np.float32) if tensor.dtype == torch.bfloat16 else array
    np.testing.assert_array_equal(array, numbers(tensor))


def save(value, path, new=True):
  torch.save(value, path, _use_new_zipfile_serialization=new)
  return path


@pytest.mark.parametrize("new", LAYOUTS)
def test_every_dtype_and_view(new, tmp_path):
  path = save(values(), tmp_path / "x.bin", new)
  assert_equal(read_torch(path), values())


@pytest.mark.parametrize("new", LAYOUTS)
def test_a_state_dict_of_a_module(new, tmp_path):
  module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
  path = save(module.state_dict(), tmp_path / "x.bin", new)
  assert isinstance(module.state_dict(), collections.OrderedDict)
  assert_equal(read_torch(path), module.state_dict())


@pytest.mark.parametrize("new", LAYOUTS)
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_weights_among_other_things(key, new, tmp_path):
  """As fairseq and Lightning save them: arguments, optimizer state, objects."""
  optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
  whole = {
    "args": argparse.Namespace(arch="roberta", path=pathlib.PurePosixPath("/x")),
    key: values(),
    "optimizer": optimizer.state_dict(),
    "history": [collections.Counter("aab"), {1, 2}, frozenset([3]), b"x", 2**70, -1.5],
    "array": np.arange(3.0),
    "shape": torch.Size([2, 3]),
    "kinds": (torch.float32, torch.device("cpu"), None, True),
  }
  path = save(whole, tmp_path / "x.pt", new)
  assert_equal(read_torch(path), values())


def test_shards(tmp_path):
  tensors = values()
  names = list(tensors)
  parts = {"a.bin": names[:5], "b.bin": names[5:]}
  for file, part in parts.items():
    save({name: tensors[name] for name in part}, tmp_path / file)
  where = {name: file for file, part in parts.items() for name in part}
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": where}))
  assert_equal(read_index(index, read_torch), tensors)


def test_views_of_storages_in_the_oldest_files():
  """A storage may be part of another: (key, first element, number of elements)."""
  kind = Placeholder("torch.FloatStorage")
  storage = make_storage(("storage", kind, "7", "cpu", 100, ("8", 10, 20)))
  recipe = make_tensor_recipe(storage, 3, (4,), (2,))
  tensor = locate_tensor(pathlib.Path("x"), 1000, recipe, {"7": (50, 400)})
  assert tensor.offset == 50 + 4 * (10 + 3) and tensor.strides == (2,)
  with pytest.raises(ValueError, match="in 20 numbers"):
    make_tensor_recipe(storage, 3, (18,), (1,))
  with pytest.raises(ValueError, match="is cut"):
    locate_tensor(pathlib.Path("x"), 1000, recipe, {"7": (50, 100)})


class Evil:
  """Makes a directory when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (os.fspath(self.path),)


@pytest.mark.faults
@pytest.mark.parametrize("new", LAYOUTS)
def test_nothing_is_run(new, tmp_path):
  trap = tmp_path / "trap"
  path = save({"model": values(), "x": Evil(trap)}, tmp_path / "x.bin", new)
  assert_equal(read_torch(path), values())
  assert not trap.exists()
  path = save({"a": torch.ones(2), "x": Evil(trap)}, tmp_path / "y.bin", new)
  with pytest.raises(DataError, match=r"'x': \S*mkdir"):
    read_torch(path)
  assert not trap.exists()
  torch.load(path, weights_only=False)
  assert trap.exists(), "the trap does not work"


def test_tensors_that_depend_on_the_unknown_are_refused(tmp_path):
  path = save({"a": torch.ones(2), "b": torch.eye(3).to_sparse()}, tmp_path / "x.bin")
  with pytest.raises(DataError, match="_rebuild_sparse_tensor"):
    read_torch(path)
  for value in ([torch.ones(2)], {}, {"model": {}}, {1: torch.ones(2)}, {"a": 3}, 7):
    with pytest.raises(DataError, match=r"x\.bin cannot be read"):
      read_torch(save(value, tmp_path / "x.bin"))


def rewrite(path, change) -> pathlib.Path:
  """Copies the archive with entries changed: name -> bytes, or None to drop one."""
  out = path.with_name("changed.bin")
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
    for entry in old.infolist():
      content = change(entry.filename, old.read(entry))
      if content is not None:
        new.writestr(entry.filename, content)
  return out


@pytest.mark.faults
def test_damaged_archives_are_refused(tmp_path):
  path = save({"w": torch.arange(64.0)}, tmp_path / "x.bin")

  def only(name, new):
    return rewrite(
      path, lambda n, content: new(content) if n.endswith(name) else content
    )

  assert_equal(read_torch(only("none", bytes)), {"w": torch.arange(64.0)})
  for message, name, new in (
    ("is cut", "data/0", lambda c: c[:-4]),
    ("KeyError", "data/0", lambda c: None),
    ("big-endian", "byteorder", lambda c: b"big"),
    ("unpack", "data.pkl", lambda c: None),
    ("exhausted", "data.pkl", lambda c: c[:-1]),
    ("cannot be read", "data.pkl", lambda c: c[:40]),
  ):
    with pytest.raises(DataError, match=message):
      read_torch(only(name, new))
  whole = path.read_bytes()
  (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(DataError, match="not a PyTorch checkpoint"):
    read_torch(tmp_path / "cut.bin")
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z.bin", "w", 8) as new:
    for entry in old.infolist():
      new.writestr(entry.filename, old.read(entry))
  with pytest.raises(DataError, match="is compressed"):
    read_torch(tmp_path / "z.bin")


def test_a_cut_legacy_file_is_refused(tmp_path):
  path = save({"w": torch.arange(64.0)}, tmp_path / "x.bin", new=False)
  whole = path.read_bytes()
  for length in (len(whole) - 4, len(whole) - 300, 100, 20, 0):
    path.write_bytes(whole[:length])
    with pytest.raises(DataError, match=r"x\.bin cannot be read"):
      read_torch(path)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ((4, 6), (4, 60)),  # beyond the storage
    ((4, 6), (-4, 6)),
    ((4, 6), (4.0, 6)),
    ((4, 6), (4, 6, 1)),
    ((6, 1), (60, 1)),  # strides
    ((6, 1), (-6, 1)),
  ],
)
def test_tensors_outside_of_their_storage_are_refused(old, new, tmp_path):
  """Changes shape and strides, which are small tuples in the instructions."""
  path = save({"w": torch.arange(24.0).reshape(4, 6)}, tmp_path / "x.bin")

  def tuple_code(values):
    return pickle.dumps(values, 2)[2:-1].split(b"q\x00")[0]

  def swap(name, content):
    if not name.endswith("data.pkl"):
      return content
    assert content.count(tuple_code(old)) == 1
    return content.replace(tuple_code(old), tuple_code(new))

  with pytest.raises(DataError, match="a tensor of shape"):
    read_torch(rewrite(path, swap))


@pytest.mark.faults
def test_no_byte_of_a_pickle_can_do_harm(tmp_path):
  """Changing any byte gives the same tensors, other names or a DataError."""
  path = save({"w": torch.ones(3), "v": torch.ones(2)}, tmp_path / "x.bin")
  with zipfile.ZipFile(path) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
    content = archive.read(name)
  for i in range(len(content)):
    for flip in (1, 128):
      bad = bytearray(content)
      bad[i] ^= flip
      try:
        read_torch(rewrite(path, lambda n, c, bad=bad: bytes(bad) if n == name else c))
      except DataError as error:
        assert len(str(error).splitlines()) <= 5


def nested(times: int) -> bytes:
  """Instructions for a tuple of two equal tuples of two equal …: 2**times in all."""
  return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(times))


STORAGE = b"ctorch\nFloatStorage\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"
SLOW = nested(60)
HOSTILE = {
  "a key": b"}" + SLOW + b"K\x01s.",
  "a key of many": b"}(" + SLOW + b"K\x01u.",
  "a dictionary": b"(" + SLOW + b"K\x01d.",
  "an element": b"\x8f(" + SLOW + b"\x90.",
  "a frozen element": b"(" + SLOW + b"\x91.",
  "the name of a storage": b"}(X\x01\0\0\0w" + b"(X\x07\0\0\0storage" + STORAGE + SLOW
  + b"X\x03\0\0\0cpuK\x04tQu.",
  "the kind of a storage": b"(" + SLOW + STORAGE + b"K\x00X\x03\0\0\0cpuK\x04tQ.",
  "the type of a storage": b"(X\x07\0\0\0storage" + SLOW + b"K\x00K\x00K\x04tQ.",
  "the storage of a tensor": TENSOR + b"(" + SLOW + b"K\x00))tR.",
  "a module": SLOW + b"X\x01\0\0\0a\x93.",
  "a tensor": b"}X\x01\0\0\0a" + SLOW + b"s.",
  "the items of a dictionary": ORDERED + b"(" + SLOW + b"tR.",
  "a size": b"ctorch\nSize\n(" + SLOW + b"tR.",
  "all of it": SLOW + b".",
  "deep tuples": b")" + b"\x85" * 90_000 + b".",
  "deep keys": b"})" + b"\x85" * 90_000 + b"K\x01s.",
  "deep lists": b"]" + b"]" * 40_000 + b"a" * 40_000 + b".",
  "no end": b"(" * 200_000 + b".",
  "sizes without end": b"(" + b"K\x01" * 300_000 + b"tq\x00"
  + (b"ctorch\nSize\nh\x00\x85R" * 30_000) + b".",
  "a number without end": b"L" + b"9" * 3_000_000 + b"L\n.",
  "a shape without end": TENSOR + b"((X\x07\0\0\0storage" + STORAGE
  + b"K\x00K\x00K\x04tQK\x00(" + b"\x8a\x08" + b"\x7f" * 8 + b"2" * 300_000
  + b"t)tR.",
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("case", HOSTILE)
def test_values_that_take_for_ever_are_refused_at_once(case, tmp_path, monkeypatch):
  monkeypatch.setattr(torch_files, "_MAX_INSTRUCTIONS", 100_000)
  path = tmp_path / "x.bin"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data.pkl", HOSTILE[case])
  started = time.process_time()
  with pytest.raises(DataError, match="cannot be read") as caught:
    read_torch(path)
  assert time.process_time() - started < 5 and len(str(caught.value)) < 1000


@pytest.mark.faults
def test_a_description_is_read_up_to_a_size(tmp_path):
  path = tmp_path / "x.bin"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data.pkl", b"(" * (40 << 20))
  assert path.stat().st_size < 100_000
  with pytest.raises(DataError, match=r"description of 41,943,040 bytes"):
    read_torch(path)
  magic = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
  path.write_bytes(magic + b"\x8e" + (1 << 40).to_bytes(8, "little") + b"x")
  with pytest.raises(DataError, match="description of more than"):
    read_torch(path)


def test_a_tensor_that_repeats_one_number_for_ever(tmp_path):
  storage = make_storage(("storage", Placeholder("torch.FloatStorage"), "0", "", 1))
  make_tensor_recipe(storage, 0, (1000, 1000), (0, 0))
  with pytest.raises(ValueError, match="repeats 1 numbers"):
    make_tensor_recipe(storage, 0, (10**9, 10**9), (0, 0))
