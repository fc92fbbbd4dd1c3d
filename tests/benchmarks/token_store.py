"""Compare ways to store tokens: random reads, size, and detection of a flipped bit.

  python tests/benchmarks/token_store.py [--tokens=20000000]

One thread reads rows of L tokens at random positions, one at a time. Measured on 2
cores of a cloud machine, 20 M tokens of 16 bits, files in the page cache:

               rows/s of 257   rows/s of 2049     first pass  bytes/token  flipped bit
  memmap              601,000          486,000    11,800 MB/s        2.000  silent
  flaxlm              338,000          298,000     3,000 MB/s        2.000  noticed
  array_record         40,000           23,000       390 MB/s        2.032  noticed
  tensorstore          13,000           11,000       940 MB/s        2.006  noticed
"""

import argparse
import pathlib
import shutil
import tempfile
import time

import numpy as np

from flaxlm.data.store import shards

ROWS = (257, 2049)  # tokens per row
RECORD = 2048  # tokens per array_record record; a TensorStore chunk is 32 records


def write_flaxlm(folder: pathlib.Path, ids: np.ndarray):
  """Writes memory-mapped shards with a crc32 per block, as flaxlm does."""
  writer = shards.ShardWriter(folder, "a", ids.dtype)
  writer.begin(-1)
  writer.add(ids, 0)
  entry = writer.finish()
  files = [folder / "a.ids", folder / "a.index"]

  def open_it():
    return shards.Shard(*files, entry, ids.dtype).read

  return open_it, files[0]


def write_memmap(folder: pathlib.Path, ids: np.ndarray):
  """Writes the same file without any checks: the upper bound."""
  ids.tofile(folder / "raw")

  def open_it():
    array = np.memmap(folder / "raw", ids.dtype, "r")
    return lambda start, stop: np.array(array[start:stop])

  return open_it, folder / "raw"


def write_array_record(folder: pathlib.Path, ids: np.ndarray):
  """Writes records of 2048 tokens, one per group so that random reads are possible."""
  from array_record.python import array_record_module

  path = str(folder / "a.array_record")
  writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
  for start in range(0, len(ids), RECORD):
    writer.write(ids[start : start + RECORD].tobytes())
  writer.close()

  def open_it():
    options = "readahead_buffer_size:0"
    reader = array_record_module.ArrayRecordReader(path, options=options)

    def read(start, stop):
      first, last = start // RECORD, -(-stop // RECORD)
      data = b"".join(reader.read(list(range(first, last))))
      skip = start - first * RECORD
      return np.frombuffer(data, ids.dtype)[skip : skip + stop - start]

    return read

  return open_it, pathlib.Path(path)


def write_tensorstore(folder: pathlib.Path, ids: np.ndarray):
  """Writes Zarr 3 with crc32c: 128 KiB chunks in shards of 16 MiB."""
  import tensorstore

  path = folder / "zarr"
  codecs = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
  ]
  sharding = {"chunk_shape": [32 * RECORD], "codecs": codecs}
  grid = {"name": "regular", "configuration": {"chunk_shape": [1 << 23]}}
  spec = {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": str(path)},
    "metadata": {
      "shape": [len(ids)],
      "data_type": str(ids.dtype),
      "chunk_grid": grid,
      "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    },
  }
  tensorstore.open(spec, create=True).result().write(ids).result()

  def open_it():
    context = {"cache_pool": {"total_bytes_limit": 100_000_000}}
    opened = {"driver": "zarr3", "kvstore": spec["kvstore"], "context": context}
    array = tensorstore.open(opened).result()
    return lambda start, stop: array[start:stop].read().result()

  return open_it, path


def rows_per_second(read, total: int, length: int, seconds: float = 1.5) -> float:
  starts = np.random.default_rng(0).integers(0, total - length, 1 << 20).tolist()
  for start in starts[:50]:
    read(start, start + length)
  count, begin = 0, time.perf_counter()
  while time.perf_counter() - begin < seconds:
    for start in starts[count : count + 50]:
      read(start, start + length)
    count += 50
  return count / (time.perf_counter() - begin)


def flipped(open_it, path: pathlib.Path, ids: np.ndarray) -> str:
  """Flips one bit in the middle of the data, then reads all of it."""
  files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
  file = max(files, key=lambda f: f.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.chmod(0o644)
  file.write_bytes(data)
  try:
    read = open_it()
    parts = [read(i, min(i + 65536, len(ids))) for i in range(0, len(ids), 65536)]
  except Exception as error:
    return f"{type(error).__name__}"
  return "silent" if (np.concatenate(parts) != ids).any() else "no effect"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tokens", type=int, default=20_000_000)
  args = parser.parse_args()
  rng = np.random.default_rng(1)
  # Zipf-like ids, as in text, so that compression could help.
  ids = np.minimum(rng.zipf(1.2, args.tokens), 32000).astype("<u2")
  print(f"{'':<22}" + "".join(f"{f'rows/s of {n}':>16}" for n in ROWS), end="")
  print(f"{'first pass':>14}{'bytes/token':>13}  a flipped bit")
  kinds = [write_memmap, write_flaxlm, write_array_record, write_tensorstore]
  for write in kinds:
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
      open_it, path = write(folder, ids)
      files = [f for f in folder.rglob("*") if f.is_file()]
      size = sum(f.stat().st_size for f in files) / len(ids)
      read = open_it()
      begin = time.perf_counter()
      for start in range(0, len(ids), 65536):
        read(start, min(start + 65536, len(ids)))
      first = ids.nbytes / 1e6 / (time.perf_counter() - begin)
      rates = [rows_per_second(read, len(ids), length) for length in ROWS]
      print(
        f"{write.__name__.removeprefix('write_'):<22}"
        + "".join(f"{rate:>16,.0f}" for rate in rates)
        + f"{first:>9,.0f} MB/s{size:>13.3f}  {flipped(open_it, path, ids)}"
      )
    finally:
      shutil.rmtree(folder)


if __name__ == "__main__":
  main()
