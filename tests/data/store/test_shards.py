import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from etils import epath

from flaxlm import errors
from flaxlm.data.store.manifest import SPLITS, fingerprint_of
from flaxlm.data.store.shards import CHECKSUM_BYTES, ShardWriter, Store
from flaxlm.data.text import remote


@pytest.fixture
def made(tmp_path):
  """A store of three shards, and its documents as a list of id arrays per split."""
  rng = np.random.default_rng(0)
  split_documents, entries = {}, {}
  (tmp_path / "main").mkdir()
  for split, sizes in (("train", (60_000, 1, 150_000)), ("validation", (500,))):
    documents, shards = [], []
    for number, size in enumerate(sizes):
      writer = ShardWriter(tmp_path, f"main/{number:06}-{split}", np.dtype("<u2"))
      while writer.tokens < size:
        ids = rng.integers(3, 60_000, rng.integers(1, 3000))
        writer.begin(1)
        for part in np.array_split(ids, 3):
          writer.add(part, 10)
        writer.end(2)
        documents.append(np.concatenate([[1], ids, [2]]))
      shards.append(writer.finish())
    sums = {k: sum(s[k] for s in shards) for k in ("documents", "bytes", "tokens")}
    entries[split] = {**sums, "shards": shards}
    split_documents[split] = documents
  names = ("sha256", "vocab_size", "pad_id", "bos_id", "eos_id")
  tokenizer = dict(zip(names, ("0" * 64, 60_000, 0, 1, 2), strict=True))
  manifest = {"format": 1, "tokenizer": tokenizer, "dtype": "<u2", "recipe": {}}
  manifest["sources"] = {"main": {"problems": {}, **entries}}
  manifest["fingerprint"] = fingerprint_of(manifest)
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  return tmp_path, split_documents


def flip(path: pathlib.Path, offset: int) -> None:
  content = bytearray(path.read_bytes())
  content[offset] ^= 1
  path.write_bytes(content)


def test_every_range_reads_back(made):
  path, documents = made
  for split in SPLITS:
    whole = np.concatenate(documents[split])
    stream = Store(path).stream("main", split)
    assert stream.num_tokens == len(whole)
    assert stream.num_documents == len(documents[split])
    np.testing.assert_array_equal(stream.read(0, len(whole)), whole)
    rng = np.random.default_rng(1)
    for _ in range(300):
      start, stop = np.sort(rng.integers(0, len(whole) + 1, 2)).tolist()
      if rng.random() < 0.5:
        stop = min(stop, start + 300)
      ids = stream.read(start, stop)
      np.testing.assert_array_equal(ids, whole[start:stop])
      assert ids.dtype == np.uint16 and ids.flags.writeable
    for start, stop in ((-1, 5), (5, 4), (0, len(whole) + 1)):
      with pytest.raises(IndexError):
        stream.read(start, stop)


def test_stores_of_older_versions_lack_what_encoders_need(made):
  found = Store(made[0])
  assert (found.bos_id, found.mask_id, found.cls_id, found.sep_id) == (1, -1, -1, -1)
  assert found.continues_word is None


def test_document_starts_come_from_the_index(made):
  path, documents = made
  sizes = [len(document) for document in documents["train"]]
  starts = np.cumsum([0, *sizes[:-1]])
  stream = Store(path).stream("main", "train")
  everything = stream.document_starts(0, stream.num_tokens)
  np.testing.assert_array_equal(everything, starts)
  assert everything.dtype == np.int64
  rng = np.random.default_rng(2)
  for _ in range(200):
    a, b = np.sort(rng.integers(0, stream.num_tokens + 1, 2)).tolist()
    inside = starts[(starts >= a) & (starts < b)]
    np.testing.assert_array_equal(stream.document_starts(a, b), inside)
  p = int(starts[3])
  assert stream.document_starts(p, p + 1).tolist() == [p]
  assert stream.document_starts(p, p).tolist() == []


def test_a_flipped_byte_is_noticed_where_it_is_read(made):
  path, _ = made
  flip(path / "main/000002-train.ids", 2 * CHECKSUM_BYTES + 77)
  stream = Store(path).stream("main", "train")
  ends = np.cumsum([s["tokens"] for s in stream._entries])
  first = int(ends[1])  # of the damaged shard
  stream.read(first, first + CHECKSUM_BYTES)  # blocks 0 and 1
  for _ in range(2):
    with pytest.raises(errors.DataError, match=r"000002-train\.ids: block 2 "):
      stream.read(first + CHECKSUM_BYTES + 10, first + CHECKSUM_BYTES + 11)
  with pytest.raises(errors.DataError):
    stream.read(0, stream.num_tokens)


def test_the_last_byte_counts_too(made):
  path, _ = made
  flip(path / "main/000000-validation.ids", -1)
  stream = Store(path).stream("main", "validation")
  with pytest.raises(errors.DataError, match="block 0"):
    stream.read(0, 1)


@pytest.mark.parametrize("where", [0, -1])
def test_a_damaged_index_is_noticed(made, where):
  path, _ = made
  flip(path / "main/000000-train.index", where)
  with pytest.raises(errors.DataError, match=r"000000-train\.index"):
    Store(path).stream("main", "train").document_starts(0, 5)


@pytest.mark.parametrize("bos, eos", [(0, -1), (-1, 0), (0, 0), (-1, -1)])
def test_an_id_of_0_may_begin_or_end_a_document(bos, eos, tmp_path):
  (tmp_path / "x").mkdir()
  writer = ShardWriter(tmp_path, "x/0", np.dtype("<u2"))
  for _ in range(2):
    writer.begin(bos)
    writer.add(np.array([7, 8]), 2)
    writer.end(eos)
  entry = writer.finish()
  one = [bos] * (bos >= 0) + [7, 8] + [eos] * (eos >= 0)
  assert np.fromfile(tmp_path / "x/0.ids", "<u2").tolist() == one * 2
  assert (entry["documents"], entry["tokens"], entry["bytes"]) == (2, 2 * len(one), 4)


def test_the_ids_are_on_disk_before_they_have_their_name(tmp_path, monkeypatch):
  done = []
  monkeypatch.setattr("flaxlm.files.sync", lambda file: done.append("sync"))
  monkeypatch.setattr("flaxlm.files.rename", lambda old, new: done.append(str(new)))
  writer = ShardWriter(tmp_path, "0", np.dtype("<u2"))
  writer.add(np.array([7]), 1)
  writer.finish()
  assert done[:2] == ["sync", str(tmp_path / "0.ids")]


def test_a_damaged_tokenizer_of_a_store_is_noticed(made):
  path, _ = made
  manifest = json.loads((path / "manifest.json").read_text())
  manifest["tokenizer"] |= {"sha256": hashlib.sha256(b"a model").hexdigest()}
  manifest["fingerprint"] = fingerprint_of(manifest)
  (path / "manifest.json").write_text(json.dumps(manifest))
  store = Store(path)
  file = path / store._tokenizer_file
  file.write_bytes(b"a model")
  assert store.tokenizer == b"a model"
  flip(file, 3)
  with pytest.raises(errors.DataError, match="its sha256 is not the one"):
    _ = store.tokenizer
  file.unlink()
  with pytest.raises(errors.DataError, match="it is missing"):
    _ = store.tokenizer


def test_missing_and_truncated_shards(made):
  path, _ = made
  file = path / "main/000000-train.ids"
  content = file.read_bytes()
  file.write_bytes(content[:-2])
  with pytest.raises(errors.DataError, match=rf"{len(content) - 2} bytes"):
    Store(path).stream("main", "train").read(0, 5)
  file.unlink()
  with pytest.raises(errors.DataError, match="missing"):
    Store(path).stream("main", "train").read(0, 5)


def test_manifests_that_cannot_be_trusted(made):
  path, _ = made
  manifest = json.loads((path / "manifest.json").read_text())
  manifest["sources"]["main"]["train"]["tokens"] += 1
  (path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(errors.DataError, match="fingerprint"):
    Store(path)
  (path / "manifest.json").write_text(json.dumps(manifest)[:-9])
  with pytest.raises(errors.DataError, match=r"manifest\.json"):
    Store(path)
  (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
  with pytest.raises(errors.DataError, match="format 99"):
    Store(path)
  (path / "manifest.json").unlink()
  with pytest.raises(errors.MissingInputError, match=r"flaxlm\.prepare --config"):
    Store(path)


def test_unknown_streams_are_named(made):
  path, _ = made
  with pytest.raises(errors.DataError, match="main/train main/validation"):
    Store(path).stream("other", "train")
  with pytest.raises(errors.DataError, match="main/test"):
    Store(path).stream("main", "test")


def test_threads_read_the_same(made):
  path, documents = made
  whole = np.concatenate(documents["train"])
  stream = Store(path).stream("main", "train")
  wrong = []

  def work(seed):
    rng = np.random.default_rng(seed)
    for start in rng.integers(0, len(whole) - 257, 500).tolist():
      if (stream.read(start, start + 257) != whole[start : start + 257]).any():
        wrong.append(start)

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_reading_needs_numpy_alone(made):
  path, _ = made
  code = f"""
import sys
from flaxlm.data.store.shards import Store
stream = Store({str(path)!r}).stream("main", "train")
stream.read(0, 1000)
heavy = "tensorflow tensorflow_datasets sentencepiece pyarrow jax etils rich".split()
print([name for name in heavy if name in sys.modules])
"""
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
  command = [sys.executable, "-c", code]
  output = subprocess.check_output(command, text=True, env=environment)
  assert output == "[]\n"


def test_remote_stores_are_copied_once_and_checked(made, tmp_path, monkeypatch):
  path, documents = made
  copies = []

  def local(url):
    copies.append(url)
    return epath.Path(str(url).replace("gs://bucket", str(path)))

  monkeypatch.setattr(remote, "path", local)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  whole = np.concatenate(documents["train"])
  for _ in range(2):
    stream = Store("gs://bucket").stream("main", "train")
    np.testing.assert_array_equal(stream.read(0, len(whole)), whole)
  assert len([url for url in copies if url.endswith(".ids")]) == 3
  flip(path / "main/000000-validation.ids", 5)
  with pytest.raises(errors.DataError, match="gs://bucket/main/000000-validation"):
    Store("gs://bucket").stream("main", "validation").read(0, 5)
