"""TFDS sources. The C4 slice is the same text as TFRecord and as array_record files."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from flaxlm import errors
from flaxlm.config.base import source
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


def test_mistakes_are_named(c4, tmp_path):
  with pytest.raises(errors.ConfigError, match=r"main\.split(?s:.*)train validation"):
    read(path=c4, split="trian")
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


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_damaged_records(kind, c4, tmp_path):
  for file in pathlib.Path(c4).iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  victim = sorted(tmp_path.glob(f"*train.{kind}-00003*"))[0]
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 1
  victim.write_bytes(content)
  path = tmp_path if kind == "tfrecord" else tmp_path / "c4-{split}.array_record*"
  with pytest.raises(errors.DataError, match="cannot be read"):
    read(path=str(path))
