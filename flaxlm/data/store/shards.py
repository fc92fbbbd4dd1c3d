"""Reads and writes a token store: tokenised text in immutable shards.

A shard is two files. `X.ids` holds the ids of whole documents, [bos] text [eos] one
after another, as raw little-endian integers. `X.index` holds where each document begins
(uint64), then the crc32 of each 64 KiB block of `X.ids` (uint32). Memory-mapped files
are much faster than TensorStore and array_record (tests/benchmarks/token_store.py). The
checksums add what they lack: a flipped byte is an error, not a wrong token. Reading
needs numpy alone.
"""

import contextlib
import hashlib
import os
import pathlib
import zlib

import numpy as np

from flaxlm import errors, files
from flaxlm.data.store import copies
from flaxlm.data.store.manifest import SPLITS, WORDS_FILE, broken, read_store_manifest
from flaxlm.data.text import remote

CHECKSUM_BYTES = 65536  # bytes of ids that share a checksum


class Store:
  """A finished token store, in a directory or at an address (gs://, s3://)."""

  def __init__(self, path: str | os.PathLike):
    """Reads the manifest; MissingInputError or DataError without a good one."""
    self.path = str(path)
    is_remote = remote.is_remote(self.path)
    root = remote.path(self.path) if is_remote else pathlib.Path(self.path)
    self._root, self._cache = root, None
    file = f"{self.path}/manifest.json"
    if not (remote.exists(file) if is_remote else os.path.exists(file)):
      raise errors.MissingInputError(
        f"config.data.store={self.path} holds no finished token store",
        f"{root / 'manifest.json'} (missing)",
        "a directory that flaxlm.prepare completed",
        "python -m flaxlm.prepare --config=CONFIG.py  (the config you train)",
      )
    self.manifest = read_store_manifest(root / "manifest.json")
    # Stores of older versions name neither the file nor the tokens of encoders.
    tokenizer = {"file": "tokenizer.model", "words_sha256": ""}
    tokenizer |= {"unk_id": -1, "mask_id": -1, "cls_id": -1, "sep_id": -1}
    tokenizer |= {"special_tokens": {}}
    tokenizer |= self.manifest["tokenizer"]
    self._tokenizer_file: str = tokenizer["file"]
    self._words_sha256: str = tokenizer["words_sha256"]
    self.fingerprint: str = self.manifest["fingerprint"]
    self.tokenizer_sha256: str = tokenizer["sha256"]
    self.vocab_size: int = tokenizer["vocab_size"]
    self.pad_id: int = tokenizer["pad_id"]
    self.bos_id: int = tokenizer["bos_id"]
    self.eos_id: int = tokenizer["eos_id"]
    self.unk_id: int = tokenizer["unk_id"]
    self.mask_id: int = tokenizer["mask_id"]
    self.cls_id: int = tokenizer["cls_id"]
    self.sep_id: int = tokenizer["sep_id"]
    self.special_tokens: dict[str, int] = tokenizer["special_tokens"]
    if is_remote:
      self._cache = copies.copies_directory() / self.fingerprint

  @property
  def tokenizer(self) -> bytes:
    """The bytes of the tokenizer that made the ids."""
    return self._read(self._tokenizer_file, self.tokenizer_sha256)

  @property
  def continues_word(self) -> np.ndarray | None:
    """Whether each id continues a word, bool V; None in stores of older versions."""
    if not self._words_sha256:
      return None
    return np.frombuffer(self._read(WORDS_FILE, self._words_sha256), np.uint8).astype(
      bool
    )

  def stream(self, source: str, split: str) -> "TokenStream":
    """Returns the ids of a split of a source; DataError if there is no such split."""
    known = self.manifest["sources"]
    if source not in known or split not in SPLITS:
      has = " ".join(f"{name}/{s}" for name in known for s in SPLITS)
      raise errors.DataError(
        f"the token store has no {source}/{split}",
        self.path,
        f"one of {has}",
        "prepare the config that you train",
      )
    return TokenStream(self, known[source][split])

  def _read(self, name: str, sha256: str) -> bytes:
    path = self._local(name, sha256)
    if not path.exists():
      raise broken(path, "it is missing")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
      raise broken(path, "its sha256 is not the one in manifest.json")
    return content

  def _local(self, name: str, sha256: str) -> pathlib.Path:
    """Returns the local path of file `name`; a remote file is copied and checked."""
    if self._cache is None:
      return self._root / name
    path = self._cache / name
    if not path.exists() and not copies.download(f"{self.path}/{name}", path, sha256):
      raise broken(f"{self.path}/{name}", "its sha256 is not the one in manifest.json")
    return path


class TokenStream:
  """All ids of one split of one source, as one long array that is read by range."""

  def __init__(self, store: Store, entry: dict):
    self.num_tokens: int = entry["tokens"]
    self.num_documents: int = entry["documents"]
    self.num_bytes: int = entry["bytes"]
    self._store = store
    self._dtype = np.dtype(store.manifest["dtype"])
    self._entries = entry["shards"]
    self._ends = np.cumsum([shard["tokens"] for shard in self._entries], dtype=np.int64)
    # Two threads may open one shard, or check one block: the result is the same.
    self._shards: dict[int, Shard] = {}

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns ids [start, stop); each block is checked when it is first read."""
    ranges = [shard.read(a, b) for shard, a, b, _ in self._overlap(start, stop)]
    if len(ranges) == 1:
      return ranges[0]
    return np.concatenate(ranges) if ranges else np.empty(0, self._dtype)

  def document_starts(self, start: int, stop: int) -> np.ndarray:
    """Returns the positions in [start, stop) at which a document begins, as int64."""
    found = []
    for shard, a, b, offset in self._overlap(start, stop):
      first, last = np.searchsorted(shard.starts, np.array([a, b], np.uint64))
      found.append(shard.starts[first:last].astype(np.int64) + offset)
    return np.concatenate(found) if found else np.empty(0, np.int64)

  def _overlap(self, start: int, stop: int):
    """Yields (shard, start in it, stop in it, its offset) of each shard in a range."""
    if not 0 <= start <= stop <= self.num_tokens:
      raise IndexError(f"[{start}, {stop}) is not within {self.num_tokens} tokens")
    number = int(np.searchsorted(self._ends, start, side="right"))
    while start < stop:
      offset = int(self._ends[number]) - self._entries[number]["tokens"]
      end = min(stop, int(self._ends[number]))
      yield self._shard(number), start - offset, end - offset, offset
      start, number = end, number + 1

  def _shard(self, number: int) -> "Shard":
    if number not in self._shards:
      entry, store = self._entries[number], self._store
      ids = store._local(entry["name"] + ".ids", entry["sha256"])
      index = store._local(entry["name"] + ".index", entry["index_sha256"])
      self._shards[number] = Shard(ids, index, entry, self._dtype)
    return self._shards[number]


class Shard:
  """One memory-mapped shard, whose blocks are checked when they are first read."""

  def __init__(self, path, index_path, entry: dict, dtype: np.dtype):
    self.path = path
    tokens, documents = entry["tokens"], entry["documents"]
    blocks = -(-tokens * dtype.itemsize // CHECKSUM_BYTES)
    sizes = {path: tokens * dtype.itemsize, index_path: documents * 8 + blocks * 4}
    for file, size in sizes.items():
      found = file.stat().st_size if file.exists() else "missing"
      if found != size:
        raise broken(file, f"{found} bytes, not the {size} of manifest.json")
    index = index_path.read_bytes()
    if hashlib.sha256(index).hexdigest() != entry["index_sha256"]:
      raise broken(index_path, "its sha256 is not the one in manifest.json")
    self.starts = np.frombuffer(index, "<u8", documents)
    self._crcs = np.frombuffer(index, "<u4", blocks, documents * 8).tolist()
    self._ids = np.memmap(path, dtype, "r")
    self._bytes = self._ids.view(np.uint8)
    self._verified = np.zeros(blocks, bool)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns a copy of ids [start, stop); DataError if a block is damaged."""
    size = self._ids.itemsize
    first, last = start * size // CHECKSUM_BYTES, -(-stop * size // CHECKSUM_BYTES)
    if not self._verified[first:last].all():
      for block in range(first, last):
        data = self._bytes[block * CHECKSUM_BYTES : (block + 1) * CHECKSUM_BYTES]
        if zlib.crc32(data) != self._crcs[block]:
          raise broken(
            self.path, f"block {block} ({CHECKSUM_BYTES} bytes) fails its checksum"
          )
        self._verified[block] = True
    return np.array(self._ids[start:stop])


class ShardWriter:
  """Writes one shard; its files get their names in `finish`.

  Call `begin`, `add` any number of times, and `end` for each document.
  """

  def __init__(self, root: pathlib.Path, name: str, dtype: np.dtype):
    self._root, self._name, self._dtype = root, name, dtype
    self.tokens = self.documents = self.bytes = 0
    self._starts: list[int] = []
    self._crcs: list[int] = []
    self._sha256 = hashlib.sha256()
    self._buffer = bytearray()
    self._file = None  # opened by the first block: a shard may stay empty

  def begin(self, bos_id: int) -> None:
    self._starts.append(self.tokens)
    self.documents += 1
    self._write(np.array([bos_id] if bos_id >= 0 else [], self._dtype))

  def add(self, ids: np.ndarray, num_bytes: int) -> None:
    self.bytes += num_bytes
    self._write(ids.astype(self._dtype))

  def end(self, eos_id: int) -> None:
    self._write(np.array([eos_id] if eos_id >= 0 else [], self._dtype))

  def close(self) -> None:
    """Closes the file; the shard does not exist unless `finish` was called."""
    if self._file is not None:
      with contextlib.suppress(OSError):  # of a full disk, which was raised before
        self._file.close()

  def _write(self, ids: np.ndarray) -> None:
    self.tokens += len(ids)
    self._buffer += ids.tobytes()
    whole = len(self._buffer) // CHECKSUM_BYTES * CHECKSUM_BYTES
    if whole >= 16 * CHECKSUM_BYTES:
      self._flush(whole)

  def _flush(self, size: int) -> None:
    if self._file is None:
      self._file = open(self._root / f"{self._name}.ids.tmp", "wb")  # noqa: SIM115
    for start in range(0, size, CHECKSUM_BYTES):
      self._crcs.append(
        zlib.crc32(self._buffer[start : min(start + CHECKSUM_BYTES, size)])
      )
    self._sha256.update(self._buffer[:size])
    self._file.write(self._buffer[:size])
    del self._buffer[:size]

  def finish(self) -> dict:
    """Makes the files durable, names them, and returns their entry of the manifest."""
    self._flush(len(self._buffer))
    files.sync(self._file)
    self._file.close()
    index = np.array(self._starts, "<u8").tobytes()
    index += np.array(self._crcs, "<u4").tobytes()
    path = self._root / self._name
    files.rename(f"{path}.ids.tmp", f"{path}.ids")
    files.write_atomically(f"{path}.index", index)
    return {
      "name": self._name,
      "documents": self.documents,
      "bytes": self.bytes,
      "tokens": self.tokens,
      "sha256": self._sha256.hexdigest(),
      "index_sha256": hashlib.sha256(index).hexdigest(),
    }
