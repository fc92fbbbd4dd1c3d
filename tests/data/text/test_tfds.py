"""TFDS sources. The C4 slice is the same text as TFRecord and as array_record files."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest

from flaxlm import errors
from flaxlm.config.base import source
from flaxlm.data.text import formats
from flaxlm.data.text.documents import TextPiece
from flaxlm.data.text.tfds import open_tfds_corpus

tfds = pytest.importorskip("tensorflow_datasets")


def read(position=(0, 0), **fields) -> list[TextPiece]:
  return list(open_tfds_corpus("main", source("tfds", **fields)).read(position))


def python(code: str) -> str:
  """Runs `code` in the current directory; returns what it prints."""
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
  command = [sys.executable, "-c", code]
  return subprocess.check_output(command, text=True, env=environment)


@pytest.fixture(scope="module")
def c4(corpora) -> str:
  return str(corpora / "from_repos/tfds/c4/en/3.0.1")


def test_both_formats_hold_the_same_documents(c4):
  fields = {"validation_split": "validation"}
  array_record = f"{c4}/c4-{{split}}.array_record*"
  records = read(path=array_record, **fields)
  examples = read(path=c4, **fields)
  texts = {p.text for p in records}
  assert len(records) == 1200 and len(texts) > 1100
  assert records == examples
  assert [p.split for p in records].count("validation") == 200
  for start in (0, 130, 999, 1100):
    position = examples[start].position
    for path in (c4, array_record):
      assert read(position, path=path, **fields) == examples[start + 1 :]


def test_array_record_does_not_load_tensorflow(c4):
  code = f"""
import sys
from flaxlm.config.base import source
from flaxlm.data.text import tfds
path = {c4!r} + "/c4-{{split}}.array_record*"
print(len(list(tfds.open_tfds_corpus("main", source("tfds", path)).read((0, 0)))))
print("tensorflow" in sys.modules)
"""
  assert python(code).split() == ["1000", "False"]


def test_directory_prepared_as_array_record(c4, tmp_path):
  info = json.loads((pathlib.Path(c4) / "dataset_info.json").read_text())
  info |= {"fileFormat": "array_record", "name": "c4"}
  (tmp_path / "dataset_info.json").write_text(json.dumps(info))
  for file in pathlib.Path(c4).iterdir():
    if file.name.startswith("c4-") or file.name == "features.json":
      (tmp_path / file.name).symlink_to(file)
  pieces = read(path=str(tmp_path), split="train[10:20]")
  assert [p.text for p in pieces] == [p.text for p in read(path=c4)[10:20]]


@pytest.mark.slow
def test_own_builder_by_module(tmp_path, monkeypatch):
  (tmp_path / "corpus_of_mine.py").write_text(
    '''
import tensorflow_datasets as tfds


class Proverbs(tfds.core.GeneratorBasedBuilder):
  """Two lines."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({"body": tfds.features.Text()})
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for number, text in enumerate(["A stitch in time", "saves nine."]):
      yield number, {"body": text}
'''
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  code = """
from flaxlm.config.base import source
from flaxlm.data.text import tfds
fields = source("tfds", "corpus_of_mine:proverbs", field="body")
for _ in range(2):
  pieces = list(tfds.open_tfds_corpus("main", fields).read((0, 0)))
  print(sorted(piece.text for piece in pieces))
"""
  output = python(code)
  lines = [line for line in output.splitlines() if line.startswith("[")]
  assert lines == ["['A stitch in time', 'saves nine.']"] * 2


@pytest.mark.faults
def test_mistakes_are_named(c4, tmp_path):
  with pytest.raises(errors.ConfigError, match=r"main\.split(?s:.*)train validation"):
    read(path=c4, split="trian")
  for bad in ("train[5%:10", "train[:5000]"):
    with pytest.raises(errors.ConfigError, match=r"main\.split(?s:.*)or a slice"):
      read(path=c4, split=bad)
  with pytest.raises(errors.ConfigError, match=r"main\.validation_split"):
    read(path=c4, validation_split="test")
  with pytest.raises(errors.DataError, match="'body'"):
    read(path=c4, field="body")
  with pytest.raises(errors.MissingInputError, match="no_such_set"):
    read(path="no_such_set/config")
  with pytest.raises(errors.MissingInputError, match="no_such_module"):
    read(path="no_such_module:builder")
  with pytest.raises(errors.ConfigError, match="split"):
    read(path=f"{c4}/c4-train.array_record*", validation_split="validation")
  with pytest.raises(errors.MissingInputError, match="matches nothing"):
    read(path=str(tmp_path / "x.array_record*"))


@pytest.fixture(scope="module")
def shards(c4, tmp_path_factory):
  """Returns a function that opens a copy of the data set with one changed shard."""
  root = tmp_path_factory.mktemp("c4")
  for file in pathlib.Path(c4).iterdir():
    (root / file.name).symlink_to(file)
  count = 0

  def change(kind: str, edit) -> tuple[str, str, pathlib.Path]:
    """Returns path and split of shards 2 to 4, and shard 3, which is changed."""
    nonlocal count
    count += 1
    copy = root.with_name(f"{root.name}-{count}")
    copy.mkdir()
    for file in root.iterdir():
      (copy / file.name).symlink_to(file)
    victim = sorted(copy.glob(f"*train.{kind}-00003*"))[0]
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(edit(content))
    if kind == "tfrecord":
      return str(copy), "train[250:625]", victim
    return f"{copy}/c4-{{split}}.array_record-0000[234]*", "train", victim

  return change


def flip(content: bytes, at: int) -> bytes:
  changed = bytearray(content)
  changed[at] ^= 1
  return bytes(changed)


def without_last_record(content: bytes) -> bytes:
  """Cuts a TFRecord file at a record boundary."""
  start = end = 0
  while end < len(content):
    start, end = end, end + 16 + int.from_bytes(content[end : end + 8], "little")
  return content[:start]


DAMAGES = {
  "flipped": ("tfrecord", lambda c: flip(c, len(c) // 2), "record 65.*checksum", 1),
  "length": ("tfrecord", lambda c: flip(c, 3), "record 1 .*no TFRecord file", 125),
  "inside": ("tfrecord", lambda c: c[:-9], "record 125.*ends inside it", 1),
  "boundary": ("tfrecord", without_last_record, "ends after 124 of 125 records", 1),
  "empty": ("tfrecord", lambda c: b"", "an empty file", 125),
  "gzip": ("tfrecord", gzip.compress, "looks like compressed by gzip", 125),
  "page": ("tfrecord", lambda c: b"<html>no access</html>" * 9, "HTML", 125),
  "flipped ": ("array_record", lambda c: flip(c, len(c) // 2), "record 111.*check", 1),
  "cut": ("array_record", lambda c: c[:-1000], "record 1 .*too early", 1),
  "gzip ": ("array_record", gzip.compress, "looks like compressed by gzip", 1),
}


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_names_the_shard_or_is_counted(damage, shards):
  kind, edit, needle, lost = DAMAGES[damage]
  path, split, victim = shards(kind, edit)
  with pytest.raises(errors.DataError, match=f"(?s)00003-of-.*{needle}") as caught:
    read(path=path, split=split)
  assert str(victim) in str(caught.value) and "on_corrupt=skip" in str(caught.value)
  corpus = open_tfds_corpus("main", source("tfds", path, split=split), "skip")
  pieces = list(corpus.read((0, 0)))
  whole = 125 if kind == "array_record" and lost == 1 and damage != "flipped " else 0
  assert len(pieces) == 375 - whole + bool(whole)
  assert sum(formats.CORRUPT in piece.problems for piece in pieces) == lost
  assert list(corpus.read(pieces[-30].position)) == pieces[-29:]


@pytest.mark.faults
def test_a_shard_with_other_records_is_refused(shards):
  path, split, _ = shards("tfrecord", lambda content: content + content)
  with pytest.raises(
    errors.DataError, match=r"00003.*another file(?s:.*)more than 125"
  ):
    read(path=path, split=split)


@pytest.mark.faults
def test_missing_shards_and_edits_of_equal_size_are_noticed(shards, c4):
  path, _, victim = shards("tfrecord", lambda content: flip(content, 5000))
  one, other = (open_tfds_corpus("main", source("tfds", p)) for p in (path, c4))
  assert one.sizes == other.sizes and one.old_fingerprint == other.old_fingerprint
  assert one.fingerprint != other.fingerprint
  victim.unlink()
  with pytest.raises(errors.MissingInputError, match="00003-of-00008 cannot be read"):
    open_tfds_corpus("main", source("tfds", path))


@pytest.mark.faults
@pytest.mark.parametrize("content", ["", "null", "[" * 100_000, '{"x": 1}', None])
def test_damaged_features_are_named(content, c4, tmp_path):
  for file in pathlib.Path(c4).glob("c4-*"):
    (tmp_path / file.name).symlink_to(file)
  if content is not None:
    (tmp_path / "features.json").write_text(content)
  with pytest.raises(errors.MissingInputError, match=r"features\.json"):
    read(path=str(tmp_path / "c4-{split}.array_record*"))


@pytest.mark.faults
def test_records_without_the_features_are_named(c4, tmp_path):
  for file in pathlib.Path(c4).iterdir():
    (tmp_path / file.name).symlink_to(file)
  features = (pathlib.Path(c4) / "features.json").read_text()
  (tmp_path / "features.json").unlink()
  (tmp_path / "features.json").write_text(features.replace('"text": {', '"body": {', 1))
  with pytest.raises(errors.DataError, match=r"record 1 does not(?s:.*)length.* text"):
    read(path=str(tmp_path), field="body")
