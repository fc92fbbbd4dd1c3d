"""The safetensors library reads what we write, and the reverse."""

import json
import math
import re
import struct

import ml_dtypes
import numpy as np
import pytest

from flaxlm.errors import DataError, MissingInputError, StorageError
from flaxlm.interop import safetensors_files
from flaxlm.interop.safetensors_files import (
  read_index,
  read_safetensors,
  write_safetensors,
)

RNG = np.random.default_rng(0)
ARRAYS = {
  "a.weight": RNG.normal(size=(5, 3)).astype(np.float32),
  "b": RNG.normal(size=(4, 2, 3)).astype(ml_dtypes.bfloat16),
  "half": RNG.normal(size=(7,)).astype(np.float16),
  "none": np.zeros((0, 3), np.float32),
  "scalar": np.array(2.5, np.float32),
  "count": np.arange(6).reshape(2, 3),
}


def write(directory, arrays=ARRAYS, **options):
  specs = {name: (a.shape, a.dtype) for name, a in arrays.items()}
  return write_safetensors(directory, specs, iter(arrays.items()), **options)


def assert_equal(found, arrays=ARRAYS):
  assert set(found) == set(arrays)
  for name, array in arrays.items():
    read = found[name].read()
    assert read.dtype == array.dtype and read.shape == array.shape, name
    np.testing.assert_array_equal(read.view(np.uint8), array.view(np.uint8)) if (
      array.ndim
    ) else np.testing.assert_array_equal(read, array)


def test_what_is_written_is_read(tmp_path):
  assert write(tmp_path) == ["model.safetensors"]
  found = read_safetensors(tmp_path / "model.safetensors")
  assert_equal(found)
  view = found["a.weight"].read()
  with pytest.raises(ValueError, match="read-only"):
    view[0] = 1


def test_the_original_library_reads_ours_and_we_read_theirs(tmp_path):
  library = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
  plain = {name: a for name, a in ARRAYS.items() if a.dtype != ml_dtypes.bfloat16}
  write(tmp_path, plain)
  loaded = library.load_file(tmp_path / "model.safetensors")
  for name, array in plain.items():
    np.testing.assert_array_equal(loaded[name], array)
  library.save_file(plain, tmp_path / "theirs.safetensors")
  assert_equal(read_safetensors(tmp_path / "theirs.safetensors"), plain)


def test_shards_and_their_index(tmp_path):
  names = write(tmp_path, max_shard=60)  # each but the empty one, the scalar and half
  assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
  index = tmp_path / "model.safetensors.index.json"
  assert_equal(read_index(index, read_safetensors))
  tree = json.loads(index.read_text())
  assert tree["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
  assert list(tree["weight_map"]) == list(ARRAYS)
  for name in names:
    sizes = [t.dtype.itemsize * t.read().size
             for t in read_safetensors(tmp_path / name).values()]  # fmt: skip
    assert sum(sizes) <= 60 or len(sizes) == 1


def test_arrays_are_drawn_one_at_a_time(tmp_path):
  drawn = []

  def arrays():
    for name, array in ARRAYS.items():
      drawn.append(name)
      yield name, array
      written = sum(ARRAYS[n].nbytes for n in drawn[:-1])
      assert sum(f.stat().st_size for f in tmp_path.iterdir()) >= written

  specs = {name: (a.shape, a.dtype) for name, a in ARRAYS.items()}
  write_safetensors(tmp_path, specs, arrays(), max_shard=1)
  assert drawn == list(ARRAYS)
  with pytest.raises(AssertionError):  # the header has been promised
    write_safetensors(tmp_path, specs, iter([("b", ARRAYS["b"])]))


@pytest.mark.faults
def test_an_index_that_does_not_fit_its_shards(tmp_path):
  names = write(tmp_path, max_shard=60)
  index = tmp_path / "model.safetensors.index.json"
  good = json.loads(index.read_text())

  def read(weight_map):
    index.write_text(json.dumps({"weight_map": weight_map}))
    return read_index(index, read_safetensors)

  with pytest.raises(DataError, match="other is in the index alone"):
    read(good["weight_map"] | {"other": names[0]})
  less = {name: file for name, file in good["weight_map"].items() if name != "half"}
  with pytest.raises(DataError, match="half is in the shard alone"):
    read(less)
  for away in ("../x", "/etc/passwd", ""):
    with pytest.raises(DataError, match="outside of the directory"):
      read(good["weight_map"] | {"other": away})
  for wrong in ([1], "x", 3, None):
    with pytest.raises(DataError, match="weight_map cannot be used"):
      read(wrong)
  for wrong in (3, None, ["x"], "x" * 5000, "x\0"):
    with pytest.raises((DataError, MissingInputError)) as caught:
      read({"a": wrong})
    assert len(str(caught.value)) < 2000
  index.write_text("{")
  with pytest.raises(DataError, match="cannot be read"):
    read_index(index, read_safetensors)
  index.write_text(json.dumps(good))
  (tmp_path / names[1]).unlink()
  with pytest.raises(MissingInputError, match=re.escape(f"no {names[1]}")):
    read_index(index, read_safetensors)


def raw(header, body=b"", length=None) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape=(2,), start=0, end=8, dtype="F32") -> dict:
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.faults
@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "0 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (raw({}, length=10**12), "header of 1000000000000"),
    (raw(b"{"), "the header of .*model.safetensors cannot be read"),
    (raw(b"[1]"), "the header of .*\n.*an array"),
    (raw(b"[" * 100_000), "the header of .*\n.*nested"),
    (raw(b'{"a\xff":1}'), "the header of .*\n.*no UTF-8"),
    (raw({"a": 3}), "a is not an object"),
    (raw({"\x1b[31m": {}}), r"\\x1b\[31m: dtype"),
    (raw({"a": entry(shape=[2**63 - 1] * 500_000)}), "a: shape"),
    (raw({"a": entry() | {"data_offsets": [0]}}), "a: shape"),
    (raw({"a": entry() | {"data_offsets": 8}}), "a: data_offsets"),
    (raw({"a": entry()}, b"1234567"), "15 bytes|bytes where the header"),
    (raw({"a": entry()}, b"123456789"), "bytes where the header"),
    (raw({"a": entry(end=4)}, b"1234"), "shape"),
    (raw({"a": entry(start=-8, end=0)}), "a: shape"),
    (raw({"a": entry(shape=[-2], end=-8)}), "a: shape"),
    (raw({"a": entry(shape=["2"])}, b"12345678"), "a: shape"),
    (raw({"a": entry(shape=[2.0])}, b"12345678"), "a: shape"),
    (raw({"a": entry(dtype="F8_E4M3")}, b"12345678"), "F8_E4M3 is not one of"),
    (raw({"a": entry(start=4, end=12)}, b"x" * 12), "a starts at byte"),
    (raw({"a": entry(), "b": entry()}, b"12345678"), "b starts at byte"),
    (raw(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}'), "'a' occurs twice"),
  ],
)
def test_damaged_files_are_refused(content, message, tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  with pytest.raises(DataError, match=message) as error:
    read_safetensors(path)
  assert len(str(error.value).splitlines()) <= 5


def test_a_full_disk(tmp_path, monkeypatch):
  def fail(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors_files.os, "fsync", fail)
  with pytest.raises(StorageError, match="No space left"):
    write(tmp_path)


@pytest.mark.faults
def test_no_byte_of_a_header_can_do_harm(tmp_path):
  """Damage is refused, or it is in a name or dtype and every byte keeps its place."""
  write(tmp_path)
  path = tmp_path / "model.safetensors"
  whole = path.read_bytes()
  (length,) = struct.unpack("<Q", whole[:8])
  rng = np.random.default_rng(0)
  refused = 0
  for i in range(600):
    bad = bytearray(whole)
    if i % 3 == 0:
      bad[rng.integers(8 + length)] ^= 1 << rng.integers(8)
    elif i % 3 == 1:
      bad[rng.integers(8, 8 + length)] = rng.integers(256)
    else:
      bad = bad[: rng.integers(len(bad))]
    path.write_bytes(bad)
    try:
      tensors = read_safetensors(path)
    except DataError as error:
      refused += 1
      assert len(str(error).splitlines()) <= 5 and len(str(error)) < 2000
      continue
    spans = sum(t.dtype.itemsize * math.prod(t.shape) for t in tensors.values())
    assert spans == len(whole) - 8 - length
    for tensor in tensors.values():
      tensor.read()
  assert refused > 300
