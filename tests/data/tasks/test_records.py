"""Labelled records: what each format holds, and the errors of bad files."""

import bz2
import gzip

import pytest
from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.tasks import records


def make_task(kind, path, **changes):
  fields = {
    "kind": kind, "path": str(path), "validation_path": "", "format": "auto",
    "split": "train", "validation_split": "validation", "columns": (), "text": "",
    "text_pair": "", "label": "", "labels": (), "choices": (),
    "doc_stride": 128, "pack": True, "chat_template": "",
  }  # fmt: skip
  assert set(changes) <= set(fields)
  return ConfigDict(fields | changes)


def read(path, kind="classify", **changes):
  return list(records.open_records(make_task(kind, path, **changes)).read())


def write(path, text):
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_csv_is_rfc_4180(tmp_path):
  text = '\ufefftext,label\r\n"one, ""two""\nthree",a\r\n\r\nfour,"b"\r\n'
  for name, content in {
    "x.csv": text.encode(),
    "x.csv.gz": gzip.compress(text.encode()),
    "x.csv.bz2": bz2.compress(text.encode()),
  }.items():
    found = read(write(tmp_path / name, content))
    assert [r.fields for r in found] == [
      {"text": 'one, "two"\nthree', "label": "a"},
      {"text": "four", "label": "b"},
    ]
    assert [r.number for r in found] == [2, 5]  # the line that a record begins on
  bare = write(tmp_path / "bare.csv", "x,1\ny,2\n")
  found = read(bare, columns=("text", "label"))
  assert [r.fields["text"] for r in found] == ["x", "y"]
  write(tmp_path / "y.csv", "label,text\nc,five\n")  # each file has its own header
  assert [r.fields["label"] for r in read(tmp_path / "[xy].csv")] == ["a", "b", "c"]


def test_tsv_has_no_quoting(tmp_path):
  path = write(tmp_path / "x.tsv", 'sentence\tlabel\r\n"a "quoted\t1\nb, c\t0\n')
  assert [r.fields for r in read(path)] == [
    {"sentence": '"a "quoted', "label": "1"},
    {"sentence": "b, c", "label": "0"},
  ]


def test_conll_sentences(tmp_path):
  text = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter\tNNP\tB-PER\n"
  path = write(tmp_path / "x.conll", text)
  found = read(path, "tag")
  assert [(r.number, r.fields) for r in found] == [
    (3, {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
    (7, {"tokens": ["Peter"], "tags": ["B-PER"]}),
  ]
  found = read(path, "tag", columns=("tokens", "pos", "ner"), label="pos")
  assert found[0].fields["pos"] == ["NNP", "VBZ"]


# Without a time stamp: all workers must give a test the same name.
CUT = gzip.compress(b"text,label\n" * 99, mtime=0)[:30]


@pytest.mark.parametrize(
  "name, text, where",
  [
    ("x.csv", "text,label\na,b\nc\n", "x.csv line 3(?s:.*)1 values(?s:.*)text label"),
    ("x.csv", 'text,label\na,b\n"c,d\n', "x.csv line 3"),
    ("x.csv", 'text,label\n"a"b,c\n', "x.csv line 2"),
    ("x.csv", "text,text\na,b\n", "distinct names"),
    ("x.tsv", "text\tlabel\na\tb\tc\n", "x.tsv line 2(?s:.*)3 values"),
    ("x.tsv", b"text\tlabel\nfine\tx\ncaf\xe9\tx\n", "line 3(?s:.*)0xe9 at column 4"),
    ("x.jsonl", '{"text": "a"}\n\n{"text": \n', "x.jsonl line 3"),
    ("x.jsonl", "[1]\n", "x.jsonl line 1(?s:.*)an array"),
    ("x.json", '{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "SQuAD"),
    ("x.json", '{"data"', "x.json cannot be read(?s:.*)JSON object"),
    ("x.conll", "a O\nb\n", "x.conll line 2"),
    ("x.csv", "text,label\ra,b\rc,d\r", "x.csv line 1(?s:.*)LF or CR LF"),
    ("x.tsv", "text\tlabel\ra\tb\r", "x.tsv line 1(?s:.*)LF or CR LF"),
    ("x.conll", "a O\rb O\r", "x.conll line 1(?s:.*)LF or CR LF"),
    ("x.csv.gz", CUT, "cannot be read to its end"),
  ],
)
def test_a_bad_file_is_named_with_its_line(name, text, where, tmp_path):
  with pytest.raises(errors.DataError, match=where):
    read(write(tmp_path / name, text), "tag" if name == "x.conll" else "classify")


def test_the_format_is_known_or_asked_for(tmp_path):
  path = write(tmp_path / "train.txt", "text\tlabel\na\tb\n")
  with pytest.raises(errors.ConfigError, match=r"config\.task\.format"):
    read(path)
  assert len(read(path, format="tsv")) == 1
  with pytest.raises(errors.MissingInputError, match="matches nothing"):
    read(tmp_path / "none.csv")
  with pytest.raises(errors.ConfigError, match=r"config\.task\.path"):
    read("")
  pytest.importorskip("tensorflow_datasets")
  with pytest.raises(errors.MissingInputError, match="TFDS cannot provide"):
    read("no_such_set/config")


def test_blank_lines_separate_and_are_no_records(tmp_path):
  for ending in ("\n", "\r\n"):
    blank = f"{ending}  {ending}\t{ending}"
    path = write(tmp_path / "x.conll", f"a O{ending}{blank}b O{ending}c O{blank}")
    assert [r.fields["tokens"] for r in read(path, "tag")] == [["a"], ["b", "c"]]
    path = write(tmp_path / "x.jsonl", f'{{"text": "a"}}{blank}{{"text": "b"}}{blank}')
    assert [r.fields["text"] for r in read(path)] == ["a", "b"]
    blank = f"{ending}  {ending}"
    for name, tab in (("x.csv", ","), ("x.tsv", "\t")):
      path = write(tmp_path / name, f"{blank}text{tab}label{blank}a{tab}b{blank}")
      assert [r.fields for r in read(path)] == [{"text": "a", "label": "b"}]
  # Empty values are values.
  path = write(tmp_path / "x.tsv", "text\tlabel\n\t\n")
  assert [r.fields for r in read(path)] == [{"text": "", "label": ""}]


def test_encodings_of_unicode(tmp_path):
  text = "w\u00f6rd O\nand O\n"
  for name in ("utf-16", "utf-8-sig", "utf-32"):
    path = write(tmp_path / "x.conll", text.encode(name))
    assert read(path, "tag")[0].fields["tokens"] == ["w\u00f6rd", "and"]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.conll"])
def test_what_is_no_text_or_too_deep_is_refused(name, tmp_path):
  path = write(tmp_path / name, b"PK\x03\x04" + bytes(range(256)) * 9)
  with pytest.raises(errors.DataError, match=r"holds no text(?s:.*)zip"):
    read(path, "tag" if name == "x.conll" else "classify")
  if name.startswith("x.json"):
    with pytest.raises(errors.DataError, match=r"x\.json"):
      read(write(path, '{"data": ' + "[" * 100_000 + "\n"))
