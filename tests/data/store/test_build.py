"""From text to a finished store, interrupted or not, in Python and by command."""

import errno
import hashlib
import os
import pathlib
import random
import subprocess
import sys
import time
import types

import filelock
import numpy as np
import pytest
from etils import epath

from flaxlm import errors, prepare
from flaxlm.config import base
from flaxlm.config.check import check_config
from flaxlm.config.load import config_to_json
from flaxlm.data.store import manifest, shards
from flaxlm.data.store.build import Report, build_store
from flaxlm.data.store.units import UNKNOWN_LOST
from flaxlm.data.text import formats, remote
from flaxlm.tokenizer.sentencepiece import Tokenizer

ROOT = pathlib.Path(__file__).parents[3]


def build(config) -> Report:
  return build_store(config.data, config.tokenizer, lambda line: None)


def texts_of(report: Report, source: str, split: str) -> list[str]:
  """Returns the documents of a store, decoded."""
  stream = report.store.stream(source, split)
  starts = stream.document_starts(0, stream.num_tokens).tolist()
  texts = []
  for start, stop in zip(starts, [*starts[1:], stream.num_tokens], strict=True):
    ids = stream.read(start, stop).tolist()
    tokenizer = report.tokenizer
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    texts.append(tokenizer.decode(ids))
  assert stream.num_documents == len(texts)
  assert stream.num_bytes == sum(len(text.encode()) for text in texts)
  return texts


def files_of(root: str) -> dict[str, bytes]:
  found = [path for path in pathlib.Path(root).rglob("*") if path.is_file()]
  names = {str(path.relative_to(root)): path.read_bytes() for path in found}
  for own in (".lock", ".seen.json"):  # of the host that prepared the store
    names.pop(own, None)
  return names


def write_lines(tmp_path, count: int = 400) -> list[str]:
  rng = random.Random(0)
  lines = [f"line {n} " + "word " * rng.randrange(40) + "漢\t" for n in range(count)]
  for number in range(4):
    text = "\n".join(lines[number::4]) + "\n"
    (tmp_path / "texts" / f"{number}.txt").write_text(text, "utf-8")
  return lines


def test_the_store_holds_every_document_once(text_config, tmp_path):
  lines = write_lines(tmp_path)
  text_config.data.shard_tokens = 5000
  report = build(text_config)
  train, validation = (texts_of(report, "main", split) for split in manifest.SPLITS)
  assert sorted(train + validation) == sorted(lines)
  assert 0.1 < len(validation) / len(lines) < 0.3
  assert report.checked and not report.changed and not report.reused
  assert report.store.manifest["dtype"] == "<u2"
  entry = report.store.manifest["sources"]["main"]["train"]
  assert len(entry["shards"]) > 5
  assert max(shard["tokens"] for shard in entry["shards"]) < 6000
  assert report.store.tokenizer == report.tokenizer.model


@pytest.mark.faults
def test_duplicates_land_in_one_split(text_config, tmp_path):
  rng = random.Random(0)
  lines = [f"document {rng.randrange(60)}" for _ in range(1000)]
  (tmp_path / "texts/a.txt").write_text("\n".join(lines))
  (tmp_path / "b.txt").write_text("\n".join(lines[:500]))
  other = base.source("text", str(tmp_path / "b.txt"), document="line")
  text_config.data.sources = base.sources(
    main=text_config.data.sources.main, other=other
  )
  report = build(text_config)
  sets = {
    split: {t for name in ("main", "other") for t in texts_of(report, name, split)}
    for split in manifest.SPLITS
  }
  assert sets["train"] and sets["validation"]
  assert not sets["train"] & sets["validation"]


KILLER = """
import os, signal, sys
from flaxlm import files
from flaxlm.config.load import config_from_json
from flaxlm.data.store.build import build_store

def counting(function, seen=[0]):
  def wrapped(*args, **kwargs):
    seen[0] += 1
    if seen[0] == int(sys.argv[2]):
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
  return wrapped

os.replace = counting(os.replace)
files.sync = counting(files.sync)
config = config_from_json(open(sys.argv[1]).read())
build_store(config.data, config.tokenizer, lambda line: None)
print("finished")
"""


@pytest.mark.faults
def test_killed_anywhere_the_store_comes_out_the_same(text_config, tmp_path):
  write_lines(tmp_path, 1000)
  text_config.data.shard_tokens = 20_000
  text_config.data.sources.main.max_documents = 950
  build(text_config)
  expected = files_of(text_config.data.store)
  assert len(expected) > 20
  environment = os.environ | {"PYTHONPATH": str(ROOT)}

  def attempt(name: str, kill_at: int) -> subprocess.CompletedProcess:
    text_config.data.store = str(tmp_path / name)
    (tmp_path / "config.json").write_text(config_to_json(text_config))
    path = str(tmp_path / "config.json")
    command = [sys.executable, "-c", KILLER, path, str(kill_at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)

  # One store that is killed again and again, a little later each time.
  for kill_at in (2, 4, 9, 14, 16, 19, 23):
    result = attempt("often", kill_at)
    assert result.returncode == -9, result.stderr
    with pytest.raises(errors.MissingInputError):
      shards.Store(text_config.data.store)
  report = build(text_config)
  assert not report.reused
  assert files_of(text_config.data.store) == expected


def test_a_finished_store_is_reused_and_another_recipe_refused(text_config, tmp_path):
  write_lines(tmp_path)
  build(text_config)
  before = files_of(text_config.data.store)
  assert build(text_config).reused
  text_config.data.sources.main.weight = 5.0  # does not change the tokens
  assert build(text_config).reused
  text_config.data.validation_fraction = 0.3
  with pytest.raises(
    errors.ConfigError, match=r"validation_fraction=0\.2 \(now 0\.3\)"
  ):
    build(text_config)
  text_config.data.validation_fraction = 0.2
  (tmp_path / "texts/new.txt").write_text("new")
  with pytest.raises(
    errors.ConfigError, match=r"other files in sources\.main"
  ) as caught:
    build(text_config)
  assert caught.value.key == "config.data.store"
  assert files_of(text_config.data.store) == before


def test_a_refused_vocabulary_can_be_corrected(text_config, tmp_path):
  write_lines(tmp_path)
  text_config.tokenizer.vocab_size = 100
  with pytest.raises(errors.ConfigError, match="vocab_size"):
    build(text_config)
  text_config.tokenizer.vocab_size = 400
  assert not build(text_config).reused


def test_directories_that_cannot_be_used(text_config, tmp_path, monkeypatch):
  write_lines(tmp_path)
  root = pathlib.Path(text_config.data.store)
  root.mkdir()
  with (
    filelock.FileLock(root / ".lock"),
    pytest.raises(errors.OutputError, match="another process"),
  ):
    build(text_config)
  (root / "thesis.tex").write_text("")
  with pytest.raises(errors.OutputError, match=r"thesis\.tex"):
    build(text_config)
  (root / "thesis.tex").unlink()
  text_config.data.store = str(tmp_path / "texts/0.txt/store")
  with pytest.raises(errors.OutputError, match="cannot be written"):
    build(text_config)


def test_a_store_in_a_bucket(text_config, tmp_path, monkeypatch):
  """The bucket is a directory here; what fails is the network."""
  write_lines(tmp_path)
  local = files_of(build(text_config).store.path)
  works = [0]  # how many more paths in the bucket can be reached

  def path(address):
    if "://" in str(address):
      works[0] -= 1
      if works[0] < 0:
        raise RuntimeError("no route")
    return epath.Path(str(address).replace("gs://bucket", f"{tmp_path}/bucket"))

  monkeypatch.setattr(remote, "path", path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  text_config.data.store = "gs://bucket/store"
  for reachable in (0, 3):  # at the start; in the middle of the upload
    works[0] = reachable
    with pytest.raises(errors.StorageError, match=r"gs://bucket/store.*be reached"):
      build(text_config)
  works[0] = 1000
  assert files_of(tmp_path / "bucket/store")
  with pytest.raises(errors.MissingInputError):  # nothing half-written is ever read
    shards.Store("gs://bucket/store")
  report = build(text_config)
  assert report.reused  # what was built before is only copied
  assert files_of(tmp_path / "bucket/store") == local
  assert build(text_config).store.path == "gs://bucket/store"
  stream = shards.Store("gs://bucket/store").stream("main", "train")
  works[0] = 0  # this host built it and has its own copy
  assert len(stream.read(0, stream.num_tokens)) == stream.num_tokens


@pytest.mark.faults
def test_a_full_disk_is_not_the_end(text_config, tmp_path, monkeypatch):
  write_lines(tmp_path)
  text_config.data.shard_tokens = 5000
  real, calls = os.fsync, []

  def full(file):
    calls.append(file)
    if len(calls) > 12:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(file)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(errors.StorageError, match="No space left") as caught:
    build(text_config)
  assert caught.value.exit_code == 74
  monkeypatch.setattr(os, "fsync", real)
  lines = []
  report = build_store(text_config.data, text_config.tokenizer, lines.append)
  assert lines[0].startswith("continuing")
  clean = text_config.copy_and_resolve_references()
  clean.data.store = str(tmp_path / "clean")
  assert files_of(text_config.data.store) == files_of(build(clean).store.path)
  assert report.store.manifest["sources"]["main"]["train"]["documents"]


@pytest.mark.faults
def test_bad_text_is_counted(text_config, tmp_path, capsys):
  content = b"\xef\xbb\xbfgood line\n\nbad \xff byte\nNUL \x00\n" + b"more lines\n" * 9
  content += b"".join(b"another %d\n" % n for n in range(50))
  (tmp_path / "texts/a.txt").write_bytes(content)
  report = build(text_config)
  problems = report.store.manifest["sources"]["main"]["problems"]
  assert problems[formats.EMPTY] == 1 and problems[formats.BOM] == 1
  assert formats.NUL in problems and formats.BAD_UTF8 in problems
  texts = [t for s in manifest.SPLITS for t in texts_of(report, "main", s)]
  assert len(texts) == 3 + 9 + 50
  assert {"good line", "bad \ufffd byte", "NUL \0"} < set(texts)
  printed = prepare.store_summary(report, 1.0)
  assert f"1 x {formats.EMPTY}" in printed and "lossless: " in printed


@pytest.mark.faults
def test_characters_without_bytes_are_counted(text_config, tmp_path):
  (tmp_path / "texts/a.txt").write_text("a few letters\n" * 50 + "x\0y \u2581\n")
  text_config.tokenizer.byte_fallback = False
  text_config.data.validation_fraction = 0.0
  report = build(text_config)
  problems = report.store.manifest["sources"]["main"]["problems"]
  assert problems[UNKNOWN_LOST] == 2
  assert "warning: not lossless" in prepare.store_summary(report, 1.0)


@pytest.mark.faults
@pytest.mark.parametrize(
  ("content", "fraction", "needle"),
  [(b"", 0.2, "no text"), (b"one document", 0.0001, "validation split")],
)
def test_nothing_to_train_or_validate_on(
  content, fraction, needle, text_config, tmp_path
):
  (tmp_path / "texts/a.txt").write_bytes(content)
  text_config.data.split, text_config.data.validation_fraction = "hash", fraction
  with pytest.raises(errors.DataError, match=needle) as caught:
    build(text_config)
  assert caught.value.exit_code == 65
  assert not (pathlib.Path(text_config.data.store) / "manifest.json").exists()
  # The advice can be followed in the same directory.
  (tmp_path / "texts/a.txt").write_text("\n".join(f"document {n}" for n in range(99)))
  text_config.data.validation_fraction = 0.5
  assert build(text_config).store.stream("main", "validation").num_tokens


def test_tail_split_is_that_of_nanogpt(corpora, text_config):
  path = corpora / "from_repos/corpora/tinyshakespeare.txt"
  main = text_config.data.sources.main
  main.path, main.document = str(path), "file"
  text_config.data.split, text_config.data.validation_fraction = "tail", 0.1
  text_config.tokenizer.byte_fallback = False
  report = build(text_config)
  text = path.read_text("utf-8")
  n = int(len(text) * 0.9)
  assert texts_of(report, "main", "train") == [text[:n]]
  assert texts_of(report, "main", "validation") == [text[n:]]
  assert report.tokenizer.vocab_size == 7 + 1 + 65  # and a tab that the text lacks
  assert not report.store.manifest["sources"]["main"]["problems"]


def test_only_preparing_needs_the_path_of_a_source(text_config):
  text_config.data.sources.main.path = ""
  check_config(text_config)  # training reads the store
  with pytest.raises(errors.ConfigError, match="where the text documents are"):
    build(text_config)


def test_tail_is_for_files(text_config):
  text_config.data.split = "tail"
  text_config.data.sources.main.kind = "tfds"
  with pytest.raises(errors.ConfigError, match=r"config\.data\.split"):
    build(text_config)


def test_c4_from_tfds_in_both_formats(corpora, text_config, bpe, tmp_path):
  pytest.importorskip("tensorflow_datasets")
  folder = corpora / "from_repos/tfds/c4/en/3.0.1"
  (tmp_path / "bpe.model").write_bytes(bpe.model)
  text_config.tokenizer.path = str(tmp_path / "bpe.model")
  text_config.data.validation_fraction = 0.0
  stores = []
  for path in (folder, folder / "c4-{split}.array_record*"):
    main = text_config.data.sources.main
    main.kind, main.path, main.validation_split = "tfds", str(path), "validation"
    text_config.data.store = str(tmp_path / f"store{len(stores)}")
    stores.append(build(text_config))
  for split, count in (("train", 1000), ("validation", 200)):
    streams = [report.store.stream("main", split) for report in stores]
    a, b = (stream.read(0, stream.num_tokens) for stream in streams)
    np.testing.assert_array_equal(a, b)
    assert streams[0].num_documents == count


def test_tokenizers_of_others(corpora, text_config, tmp_path):
  write_lines(tmp_path)
  path = corpora / "from_repos/tokenizers/t5-base_spiece.model"
  text_config.tokenizer.path = str(path)
  report = build(text_config)
  assert report.tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert report.store.bos_id == -1 and report.store.eos_id == 1
  stream = report.store.stream("main", "train")
  starts = stream.document_starts(1, stream.num_tokens)
  ids = stream.read(0, stream.num_tokens)
  assert (ids[starts - 1] == 1).all() and ids[-1] == 1
  assert "warning: not lossless" in prepare.store_summary(report, 1.0)
  text_config.data.store += "2"
  text_config.tokenizer.user_symbols = ("<user>",)
  with pytest.raises(errors.ConfigError, match="user_symbols"):
    build(text_config)


@pytest.mark.faults
def test_ids_take_two_bytes_or_four():
  sizes = {
    n: manifest.dtype_of(types.SimpleNamespace(vocab_size=n)) for n in (65536, 65537)
  }
  assert sizes == {65536: "<u2", 65537: "<u4"}


def test_max_documents_holds_across_units(text_config, tmp_path):
  lines = write_lines(tmp_path)
  text_config.data.sources.main.max_documents = 150
  text_config.data.shard_tokens = 2000
  report = build(text_config)
  texts = [t for split in manifest.SPLITS for t in texts_of(report, "main", split)]
  stored = (lines[0::4] + lines[1::4])[:150]
  assert sorted(texts) == sorted(stored)


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_long_document_takes_little_memory(text_config, tmp_path):
  peaks = []
  for megabytes in (2, 24):
    path = tmp_path / "texts/long.txt"
    path.write_bytes(b"one long line of words, no end, " * (megabytes * 31_250))
    text_config.data.store = str(tmp_path / f"store{megabytes}")
    text_config.data.split = "tail"
    text_config.tokenizer.train_bytes = 100_000
    (tmp_path / "config.json").write_text(config_to_json(text_config))
    code = f"""
import re
from flaxlm.config.load import config_from_json
from flaxlm.data.store.build import build_store
config = config_from_json(open({str(tmp_path / "config.json")!r}).read())
report = build_store(config.data, config.tokenizer, lambda line: None)
print(report.store.stream("main", "train").num_bytes)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    output = subprocess.check_output(command, text=True, env=environment)
    size, peak = map(int, output.split())
    assert size == int(megabytes * 1_000_000 * 0.8)
    peaks.append(peak / 1000)
  assert 50 < peaks[1] < 250 and peaks[1] - peaks[0] < 60  # MB; the ids are 40


def test_the_command(text_config, tmp_path, capsys):
  write_lines(tmp_path)
  file = tmp_path / "mine.py"
  main = text_config.data.sources.main
  file.write_text(
    "from configs import base\n\n\ndef get_config():\n"
    "  config = base.get_config()\n"
    f"  config.data.sources.main.update(kind='text', path={main.path!r})\n"
    "  config.data.sources.main.document = 'line'\n"
    "  config.tokenizer.kind = 'char'\n"
    "  config.data.validation_fraction = 0.2\n  return config\n"
  )
  arguments = [f"--config={file}", f"--config.data.store={tmp_path / 'mine'}"]
  arguments.append("--config.tokenizer.vocab_size=400")
  prepare.main(arguments)
  captured = capsys.readouterr()
  assert "main train" in captured.out and "lossless: " in captured.out
  assert str(tmp_path / "mine") in captured.out
  assert "training a char tokenizer" in captured.err
  prepare.main(arguments)
  assert "reusing" in capsys.readouterr().err
  report = shards.Store(tmp_path / "mine")
  assert Tokenizer(report.tokenizer).is_lossless


def test_help_is_quick():
  seconds = []
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  for _ in range(3):
    start = time.perf_counter()
    command = [sys.executable, "-m", "flaxlm.prepare", "--help"]
    output = subprocess.check_output(command, text=True, env=environment)
    seconds.append(time.perf_counter() - start)
  assert "--config" in output
  assert min(seconds) < 1
