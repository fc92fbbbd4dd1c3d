"""How documents are split when nobody says, and what is refused before a tokenizer."""

import gzip
import re

import pytest

from flaxlm import errors, prepare
from flaxlm.config import base
from flaxlm.config.check import check_config
from flaxlm.data.store import build
from flaxlm.data.store.build import build_store


@pytest.fixture
def untrained(text_config, monkeypatch):
  """A config for which no tokenizer may be trained."""

  def train(*_):
    raise AssertionError("a tokenizer was trained")

  monkeypatch.setattr(build, "make_tokenizer", train)
  return text_config


def prepared(config) -> tuple[dict, list[str]]:
  said = []
  report = build_store(config.data, config.tokenizer, said.append)
  return report.store.manifest, said


def write_books(tmp_path, count: int, words: int = 400) -> None:
  for number in range(count):
    text = f"book {number}\n" + " ".join(f"word{n}" for n in range(words))
    (tmp_path / f"texts/book{number}.txt").write_text(text)


def test_a_folder_of_two_books(text_config, tmp_path):
  write_books(tmp_path, 2)
  text_config.data.sources.main.document = "file"
  text_config.data.validation_fraction = 0.05
  found, said = prepared(text_config)
  entry = found["sources"]["main"]
  assert entry["train"]["documents"] == entry["validation"]["documents"] == 2
  assert 0.04 < entry["validation"]["bytes"] / entry["train"]["bytes"] < 0.06
  assert found["recipe"]["sources"]["main"]["validation"] == "tail"
  lines = [line for line in said if "for validation" in line]
  assert lines == ["source main: the last 0.05 of each of its 2 files, for validation"]
  _, said = prepared(text_config)
  assert said[-1].startswith("reusing")
  text_config.data.split = "tail"  # what auto has chosen is the same store
  assert prepared(text_config)[1][-1].startswith("reusing")


def test_many_documents_are_split_by_hash(text_config, tmp_path):
  (tmp_path / "texts/a.txt").write_text("\n".join(f"document {n}" for n in range(200)))
  found, said = prepared(text_config)
  assert found["recipe"]["sources"]["main"]["validation"] == "hash"
  assert "source main: 0.2 of the documents, by hash, for validation" in said


@pytest.mark.parametrize(
  ("count", "fraction", "held_out"), [(2, 0.01, 1), (8, 0.25, 2), (30, 0.1, 3)]
)
def test_few_records_are_validated_on_the_last(
  count, fraction, held_out, text_config, tmp_path
):
  lines = [f'{{"text": "record {n}"}}\n' for n in range(count)]
  (tmp_path / "texts/a.jsonl").write_text("".join(lines))
  (tmp_path / "texts/b.jsonl").write_text("".join(lines[:1]))  # all of it is trained on
  main = text_config.data.sources.main
  main.kind, main.path = "jsonl", str(tmp_path / "texts/*.jsonl")
  text_config.data.validation_fraction = fraction
  text_config.data.split = "tail" if count == 30 else "auto"
  found, _ = prepared(text_config)
  assert found["recipe"]["sources"]["main"]["validation"] == "tail"
  entry = found["sources"]["main"]
  assert entry["validation"]["documents"] == held_out
  assert entry["train"]["documents"] == count + 1 - held_out


def test_each_source_has_its_own_split(text_config, tmp_path):
  write_books(tmp_path, 1)
  (tmp_path / "a.jsonl").write_text(
    "".join(f'{{"text": "line {n}"}}\n' for n in range(99))
  )
  text_config.data.sources = base.sources(
    book=base.source("text", str(tmp_path / "texts/*.txt")),
    lines=base.source("jsonl", str(tmp_path / "a.jsonl")),
  )
  found, _ = prepared(text_config)
  splits = {name: s["validation"] for name, s in found["recipe"]["sources"].items()}
  assert splits == {"book": "tail", "lines": "hash"}
  assert all(entry["validation"]["tokens"] for entry in found["sources"].values())


@pytest.mark.faults
@pytest.mark.parametrize(
  ("name", "text", "needle"),
  [
    ("a.txt", "", "holds no text"),
    ("a.txt", "\n\n\n", "holds no text(?s:.*)empty"),
    ("a.txt", "one", "validation split of source main(?s:.*)1 train and 0 validation"),
    ("a.jsonl", "no\njson\n", "holds no text(?s:.*)2 x no text in the record"),
    ("a.jsonl", '{"text": "one"}', "validation split"),
    ("a.jsonl", '{"body": "one"}', "no field 'text'"),
    ("a.csv", "text\none\n", "validation split"),
    ("a.txt", "PK\x03\x04", "holds no text(?s:.*)zip"),
  ],
)
def test_refusals_come_before_a_tokenizer_is_trained(
  name, text, needle, untrained, tmp_path
):
  (tmp_path / "texts" / name).write_text(text)
  main = untrained.data.sources.main
  main.path = str(tmp_path / "texts" / name)
  main.kind = name[2:].replace("txt", "text")
  for split in ("hash", "auto") if text == '{"text": "one"}' else ("hash",):
    untrained.data.split = split
    with pytest.raises(errors.DataError, match=needle):
      prepared(untrained)


@pytest.mark.parametrize("name", ["a.b", "a b", "", "a/b", "../a"])
def test_names_of_sources(name, text_config):
  with pytest.raises(errors.ConfigError, match=r"data\.sources"):
    text_config.data.sources = base.sources(**{name: base.source()})
    check_config(text_config)


@pytest.mark.faults
def test_files_in_two_sources_and_documents_in_both_splits(
  text_config, tmp_path, capsys
):
  (tmp_path / "texts/a.txt").write_text("".join(f"line {n % 60}\n" for n in range(100)))
  (tmp_path / "b.txt").write_text((tmp_path / "texts/a.txt").read_text())
  text_config.data.split = "tail"
  other = base.source("text", str(tmp_path / "b.txt"), document="line")
  text_config.data.sources = base.sources(
    main=text_config.data.sources.main, other=other
  )
  said = []
  report = build_store(text_config.data, text_config.tokenizer, said.append)
  assert "warning: 1 files of source main are files of source other too" in said
  summary = prepare.store_summary(report, 1.0)
  assert len(re.findall(r"warning: (19|20) of 2. validation documents", summary)) == 2


@pytest.mark.faults
def test_damaged_files_are_lost_and_counted_up_to_a_limit(text_config, tmp_path):
  whole = "".join(f"line {n} {n * n}\n" for n in range(2000))
  (tmp_path / "texts/a.txt").write_bytes(gzip.compress(whole.encode())[:-2000])
  (tmp_path / "texts/b.txt").write_text(whole)
  with pytest.raises(errors.DataError, match=r"a\.txt cannot be read to its end"):
    prepared(text_config)
  text_config.data.on_corrupt = "skip"
  text_config.data.shard_tokens = 10_000
  found, _ = prepared(text_config)
  entry = found["sources"]["main"]
  assert entry["problems"]["damaged, lost"] == 1
  documents = entry["train"]["documents"] + entry["validation"]["documents"]
  assert 2000 <= documents < 4000  # up to a megabyte before the damage is lost too
  for number in range(101):
    (tmp_path / f"texts/c{number}.txt").write_bytes(b"PK\x03\x04")
  text_config.data.store += "2"
  with pytest.raises(errors.DataError, match=r"10[12] of .* documents lost"):
    prepared(text_config)
