"""The token store: tokenised text in immutable shards, and how to read and write them.

A shard is two files. `X.ids` holds the ids of whole documents, [bos] text [eos] one after
another, as raw little-endian integers. `X.index` holds where each document begins (uint64)
and then the crc32 of each 64 KiB block of `X.ids` (uint32). Plain memory-mapped files won
over TensorStore and array_record by a wide margin (tests/benchmarks/token_store.py); the
block checksums give them what they lacked: a flipped byte is an error, not a wrong token.
Reading needs numpy alone.
"""

import hashlib
import json
import os
import pathlib
import zlib

import numpy as np

from flaxlm import errors

FORMAT = 1
BLOCK = 65536  # bytes of ids that share a checksum
SPLITS = ("train", "validation")


class Store:
  """A finished store. Raises MissingInputError or DataError if there is none."""

  def __init__(self, path: str | os.PathLike):
    self.path = str(path)
    self._cache = None
    root = remote(self.path) if "://" in self.path else pathlib.Path(self.path)
    self._root = root
    if not (root / "manifest.json").exists():
      raise errors.MissingInputError(
        f"config.data.store={self.path} holds no finished token store\n"
        f"  given:  {root / 'manifest.json'} (missing)\n"
        "  needed: a directory that flaxlm.prepare completed\n"
        "  try:    python -m flaxlm.prepare --config=CONFIG.py  (the config you train)"
      )
    self.manifest = read_manifest(root / "manifest.json")
    tokenizer = self.manifest["tokenizer"]
    self.fingerprint: str = self.manifest["fingerprint"]
    self.tokenizer_sha256: str = tokenizer["sha256"]
    self.vocab_size: int = tokenizer["vocab_size"]
    self.pad_id: int = tokenizer["pad_id"]
    self.bos_id: int = tokenizer["bos_id"]
    self.eos_id: int = tokenizer["eos_id"]
    if "://" in self.path:
      home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
      self._cache = pathlib.Path(home) / "flaxlm" / "stores" / self.fingerprint

  @property
  def tokenizer(self) -> bytes:
    """The SentencePiece model that the ids belong to."""
    path = self._local("tokenizer.model", self.tokenizer_sha256)
    model = path.read_bytes()
    if hashlib.sha256(model).hexdigest() != self.tokenizer_sha256:
      raise broken(path, "its sha256 is not the one in manifest.json")
    return model

  def stream(self, source: str, split: str) -> "TokenStream":
    known = self.manifest["sources"]
    if source not in known or split not in SPLITS:
      has = " ".join(f"{name}/{s}" for name in known for s in SPLITS)
      raise errors.DataError(
        f"the token store has no {source}/{split}\n  given:  {self.path}\n"
        f"  needed: one of {has}\n  try:    prepare the config that you train"
      )
    return TokenStream(self, known[source][split])

  def _local(self, name: str, sha256: str) -> pathlib.Path:
    """Where file `name` lies on this machine; remote ones are copied and checked once."""
    if self._cache is None:
      return self._root / name
    path = self._cache / name
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      part = path.with_name(f"{path.name}.{os.getpid()}.part")
      remote(f"{self.path}/{name}").copy(part, overwrite=True)
      if file_sha256(part) != sha256:
        part.unlink()
        raise broken(f"{self.path}/{name}", "its sha256 is not the one in manifest.json")
      part.rename(path)
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
    # Threads may open a shard, or check a block, twice: the result is the same.
    self._shards: dict[int, Shard] = {}

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns ids [start, stop). Blocks are verified when they are first touched."""
    parts = [shard.read(a, b) for shard, a, b, _ in self._overlap(start, stop)]
    if len(parts) == 1:
      return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, self._dtype)

  def document_starts(self, start: int, stop: int) -> np.ndarray:
    """Returns the positions in [start, stop) at which a document begins, as int64."""
    parts = []
    for shard, a, b, offset in self._overlap(start, stop):
      first, last = np.searchsorted(shard.starts, np.array([a, b], np.uint64))
      parts.append(shard.starts[first:last].astype(np.int64) + offset)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)

  def _overlap(self, start: int, stop: int):
    """Yields (shard, start in it, stop in it, its offset) for shards that hold the range."""
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
  """One memory-mapped shard whose blocks are checked on first use."""

  def __init__(self, path, index_path, entry: dict, dtype: np.dtype):
    self.path = path
    tokens, documents = entry["tokens"], entry["documents"]
    blocks = -(-tokens * dtype.itemsize // BLOCK)
    for file, size in ((path, tokens * dtype.itemsize),
                       (index_path, documents * 8 + blocks * 4)):
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
    size = self._ids.itemsize
    first, last = start * size // BLOCK, -(-stop * size // BLOCK)
    if not self._verified[first:last].all():
      for block in range(first, last):
        data = self._bytes[block * BLOCK : (block + 1) * BLOCK]
        if zlib.crc32(data) != self._crcs[block]:
          raise broken(self.path, f"block {block} ({BLOCK} bytes) fails its checksum")
        self._verified[block] = True
    return np.array(self._ids[start:stop])


def remote(path: str):
  from etils import epath  # only remote stores need it

  return epath.Path(path)


def file_sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def broken(path: object, what: str) -> errors.DataError:
  return errors.DataError(
    f"a file of the token store is damaged\n  given:  {path}: {what}\n"
    "  needed: the bytes that flaxlm.prepare wrote\n"
    "  try:    delete the store and prepare again, or copy it again"
  )


def fingerprint_of(manifest: dict) -> str:
  body = {key: value for key, value in manifest.items() if key != "fingerprint"}
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path) -> dict:
  """Returns the manifest at `path` once it is found whole and of this format."""
  try:
    manifest = json.loads(path.read_text())
    version, fingerprint = manifest["format"], manifest["fingerprint"]
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise broken(path, f"not a manifest ({type(error).__name__}: {error})") from error
  if version != FORMAT:
    raise errors.DataError(
      f"the token store has another format\n  given:  {path}: format {version}\n"
      f"  needed: format {FORMAT}\n  try:    prepare again, into a new config.data.store"
    )
  if fingerprint != fingerprint_of(manifest):
    raise broken(path, "its contents do not match its fingerprint")
  return manifest
