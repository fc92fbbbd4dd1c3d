import bz2
import errno
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest

from flaxlm import errors
from flaxlm.config.base import source
from flaxlm.data.text import documents, formats, remote


def read(position=(0, 0), tail=0.0, **fields) -> list[documents.TextPiece]:
  return list(documents.open_source("main", source(**fields), tail).read(position))


def whole_documents(pieces: list[documents.TextPiece]) -> list[str]:
  """Returns the texts of whole documents, including empty ones."""
  texts = [""]
  for piece in pieces:
    texts[-1] += piece.text
    if piece.end:
      texts.append("")
  assert texts.pop() == ""
  return texts


def problems(pieces: list[documents.TextPiece]) -> list[str]:
  return sorted({problem for piece in pieces for problem in piece.problems})


def test_standard_library():
  pieces = read()
  corpus = documents.open_source("main", source())
  assert 5e6 < sum(corpus.sizes) < 3e7
  assert corpus.files == sorted(corpus.files) and len(corpus.files) > 300
  assert not [f for f in corpus.files if "site-packages" in f or "/test" in f]
  with open(corpus.files[7], encoding="utf-8", newline="") as file:
    assert whole_documents(pieces)[7] == file.read()
  assert corpus.fingerprint == documents.open_source("main", source()).fingerprint


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", [*COMPRESS, ".zst"])
def test_compressed_files_read_the_same(suffix, tmp_path):
  text = "".join(f"line {i} 漢字 \t \r\n" for i in range(30_000))
  if suffix == ".zst":
    pyarrow = pytest.importorskip("pyarrow")
    content = pyarrow.compress(text.encode(), "zstd", asbytes=True)
  else:
    content = COMPRESS[suffix](text.encode())
  path = tmp_path / f"a.txt{suffix}"
  path.write_bytes(content)
  assert whole_documents(read(kind="text", path=str(path))) == [text]
  path.rename(tmp_path / "named_wrongly")  # the content decides
  assert whole_documents(read(kind="text", path=str(tmp_path / "named_*"))) == [text]
  if suffix:
    (tmp_path / "named_wrongly").write_bytes(content[: len(content) // 2])
    with pytest.raises(errors.DataError, match="named_wrongly"):
      read(kind="text", path=str(tmp_path / "named_*"))


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
@pytest.mark.parametrize("limit", [5, 1 << 16])
def test_lines_and_paragraphs(size, limit, tmp_path, monkeypatch):
  monkeypatch.setattr(formats, "READ_BYTES", size)
  monkeypatch.setattr(documents, "CHUNK_CHARACTERS", limit)
  text = "\n\none\ntwo longer é\n\n \n\nthree\n  four漢\n\n\nfive"
  (tmp_path / "a.txt").write_bytes(text.encode())
  path = str(tmp_path / "a.txt")
  assert whole_documents(read(kind="text", path=path)) == [text]
  lines = whole_documents(read(kind="text", path=path, document="line"))
  assert lines == text.split("\n")
  paragraphs = whole_documents(read(kind="text", path=path, document="paragraph"))
  assert paragraphs == ["one\ntwo longer é", "three\n  four漢", "five"]
  assert max(len(p.text) for p in read(kind="text", path=path)) <= limit


@pytest.mark.parametrize(
  "kind", ["file", "paragraph", "line", "jsonl", "csv", "parquet"]
)
def test_reading_starts_at_any_position(kind, tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 50)
  rng = random.Random(0)
  for number in range(3):
    rows = ["word " * rng.randrange(30) for _ in range(12)]
    if kind == "parquet":
      pyarrow = pytest.importorskip("pyarrow")
      parquet = pytest.importorskip("pyarrow.parquet")
      table = pyarrow.table({"text": rows})
      parquet.write_table(table, tmp_path / f"{number}.x", row_group_size=5)
    elif kind == "jsonl":
      lines = [json.dumps({"text": row, "id": 1}) + "\n" for row in rows]
      (tmp_path / f"{number}.x").write_text("".join(lines))
    elif kind == "csv":
      lines = ["id,text\n"] + [f'1,"{row}"\n' for row in rows]
      (tmp_path / f"{number}.x").write_text("".join(lines))
    else:
      (tmp_path / f"{number}.x").write_text("\n\n".join(rows))
  text = kind in ("file", "paragraph", "line")
  fields = {"kind": "text" if text else kind, "path": str(tmp_path / "*.x")}
  fields["document"] = kind if text else "file"
  pieces = read(**fields)
  ends = [i for i, piece in enumerate(pieces) if piece.end]
  assert len(ends) >= 3
  for end in ends:
    assert read(pieces[end].position, **fields) == pieces[end + 1 :]


@pytest.mark.faults
def test_bad_bytes_are_repaired_and_noted(tmp_path):
  content = b"\xef\xbb\xbfgood \xff\xfe caf\xc3\xa9 \x00 \xed\xa0\x80 \xe4\xbd"
  (tmp_path / "a.txt").write_bytes(content)
  pieces = read(kind="text", path=str(tmp_path / "a.txt"))
  (text,) = whole_documents(pieces)
  assert text.startswith("good \ufffd\ufffd café \0 \ufffd") and text.endswith("\ufffd")
  assert problems(pieces) == sorted([formats.BOM, formats.NUL, formats.BAD_UTF8])
  text.encode()


def test_a_column_of_a_table(tmp_path):
  (tmp_path / "a.csv").write_text('text,label\n"one, two",3\n"a\nb",4\n')
  (tmp_path / "a.tsv").write_text('label\ttext\n3\tone "two"\n')
  path = str(tmp_path / "a.csv")
  assert whole_documents(read(kind="csv", path=path)) == ["one, two", "a\nb"]
  found = whole_documents(read(kind="tsv", path=str(tmp_path / "a.tsv")))
  assert found == ['one "two"']
  with pytest.raises(errors.DataError, match="text label"):
    read(kind="csv", path=path, field="body")


@pytest.mark.faults
def test_json_lines(tmp_path):
  rows = [
    b'\xef\xbb\xbf{"text": "first"}',
    b'{"text": "lone \\ud800 and pair \\ud83d\\ude00"}',
    b'{"text": "bad \xff byte"}',
    b"not json",
    b"",
    b'{"text": null}',
    b'["text"]',
    b'{"text": ""}',
    b'{"other": 1}',
    b'{"text": "last"}',
  ]
  (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
  path = str(tmp_path / "a.jsonl")
  pieces = read(kind="jsonl", path=path)
  texts = [text for text in whole_documents(pieces) if text]
  assert texts == ["first", "lone \ufffd and pair 😀", "bad \ufffd byte", "last"]
  assert [p.problems for p in pieces].count((formats.BAD_JSON,)) == 4
  assert {formats.BOM, formats.BAD_SURROGATE, formats.BAD_UTF8} < set(problems(pieces))
  with pytest.raises(errors.DataError, match=r"(?s)'body'.*fields text.*field=FIELD"):
    read(kind="jsonl", path=path, field="body")


def test_parquet_of_others(corpora, tmp_path):
  pytest.importorskip("pyarrow")
  path = str(corpora / "from_repos/tfds/hf_parquet/c4-train*.parquet")
  texts = whole_documents(read(kind="parquet", path=path))
  assert len(texts) == 200 and texts[0].startswith("Beginners BBQ Class")
  with pytest.raises(errors.DataError, match="'body'"):
    read(kind="parquet", path=path, field="body")
  (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
  with pytest.raises(errors.DataError, match=r"a\.parquet"):
    read(kind="parquet", path=str(tmp_path / "*.parquet"))


def test_tail_is_the_end_of_each_file(corpora, monkeypatch):
  path = corpora / "from_repos/corpora/tinyshakespeare.txt"
  text = path.read_text("utf-8")
  monkeypatch.setattr(formats, "READ_BYTES", 100_003)
  pieces = read(tail=0.1, kind="text", path=str(path))
  halves = {s: "".join(p.text for p in pieces if p.split == s) for s in ("train", "")}
  assert halves["train"] == text[: int(len(text) * 0.9)] and not halves[""]
  assert whole_documents(pieces) == [
    text[: int(len(text) * 0.9)],
    text[int(len(text) * 0.9) :],
  ]
  assert read((0, 1), tail=0.1, kind="text", path=str(path))[-1] == pieces[-1]


@pytest.mark.faults
def test_what_matches_nothing(tmp_path):
  for path in (tmp_path / "*.txt", tmp_path):
    with pytest.raises(errors.MissingInputError, match=r"sources\.main\.path"):
      read(kind="text", path=str(path))
  (tmp_path / "a").write_text("x")
  with pytest.raises(errors.ConfigError, match="validation_split"):
    read(kind="text", path=str(tmp_path / "a"), validation_split="test")


def test_order_is_sorted_and_the_fingerprint_sees_changes(tmp_path):
  for name in ("b", "a", "c"):
    (tmp_path / name).write_text(name)
  fields = {"kind": "text", "path": str(tmp_path / "*")}
  assert whole_documents(read(**fields)) == ["a", "b", "c"]
  before = documents.open_source("main", source(**fields)).fingerprint
  (tmp_path / "b").write_text("bb")
  assert documents.open_source("main", source(**fields)).fingerprint != before


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_newlines_of_windows(tmp_path, monkeypatch):
  for size in (1, 2, 3, 5, 100):  # a chunk may end between the two characters
    monkeypatch.setattr(formats, "READ_BYTES", size)
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\nthree\r\n\r\n \r\nf\rour\r")
    path = str(tmp_path / "a.txt")
    lines = read(kind="text", path=path, document="line")
    assert whole_documents(lines) == ["one", "", "two", "three", "", " ", "f\rour\r"]
    paragraphs = read(kind="text", path=path, document="paragraph")
    assert whole_documents(paragraphs) == ["one", "two\nthree", "f\rour\r"]


def test_a_file_is_read_once_whatever_its_names(tmp_path, monkeypatch):
  folder = tmp_path / "t"
  (folder / "deep" / ".hidden").mkdir(parents=True)
  for name in ("x.txt", "deep/y.txt", "deep/.hidden/z.txt"):
    (folder / name).write_text(name)
  for link in ("me", "myself", "deep/up"):  # together, they would never end
    (folder / link).symlink_to(folder)
  (folder / "a.txt").symlink_to(folder / "x.txt")
  os.link(folder / "x.txt", folder / "deep" / "same.txt")
  found = [f"{folder}/deep/y.txt", f"{folder}/x.txt"]
  for pattern in ("**/*.txt", "**", "**/**/*.txt", "../t/**/*.txt"):
    files = formats.local_files(f"{folder}/{pattern}")
    assert sorted(map(os.path.realpath, files)) in (
      found, [f"{folder}/deep/same.txt", f"{folder}/deep/y.txt"],
    ), pattern  # fmt: skip
  # Of two names the one without links is taken, also in a relative pattern.
  monkeypatch.chdir(folder)
  (folder / "deep" / "same.txt").unlink()
  assert formats.local_files("*.txt") == ["x.txt"]
  # Links to folders elsewhere are followed.
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "link").symlink_to(folder / "deep")
  assert len(formats.local_files(f"{tmp_path}/other/**/y.txt")) == 1


def test_names_with_brackets_are_taken_literally(tmp_path):
  (tmp_path / "[1]" / "in").mkdir(parents=True)
  path = tmp_path / "[1]" / "in" / "x[a].txt"
  path.write_text("text")
  for pattern in (path, f"{tmp_path}/[1]/in/*.txt", f"{tmp_path}/[1]/**/*.txt"):
    assert formats.find_files("key", str(pattern)) == [str(path)]


@pytest.mark.faults
def test_brackets_that_match_nothing_get_a_hint(tmp_path):
  (tmp_path / "[x] 1.txt").write_text("text")
  with pytest.raises(
    errors.MissingInputError, match=r"\[\[\]x\]\*\.txt if the brackets"
  ):
    formats.find_files("key", str(tmp_path / "[x]*.txt"))
  hinted = str(tmp_path / "[[]x]*.txt")
  assert len(formats.find_files("key", hinted)) == 1


def test_relative_patterns(tmp_path, monkeypatch):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "x.txt").write_text("x")
  monkeypatch.chdir(tmp_path)
  for pattern in ("**/*.txt", "a/**/*.txt", "a/*/x.txt", "a/b/x.txt", "**"):
    assert formats.local_files(pattern) == ["a/b/x.txt"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-16-le"])
def test_other_encodings_of_unicode(encoding, tmp_path):
  text = '{"text": "h\u00e9llo\u2028 \U0001f600"}\n' * 3
  mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
  (tmp_path / "a.jsonl").write_bytes((mark + text).encode(encoding))
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress((mark + text).encode(encoding)))
  found = read(kind="jsonl", path=str(tmp_path / "a.jsonl"))
  assert whole_documents(found) == ["h\u00e9llo\u2028 \U0001f600"] * 3
  found = read(kind="text", path=str(tmp_path / "a.txt.gz"))
  assert whole_documents(found) == [text] and not problems(found)


@pytest.mark.faults
def test_what_is_no_text_is_refused(tmp_path):
  rng = random.Random(0)
  noise = bytes(rng.randrange(256) for _ in range(4000))
  for data, kind in [
    (b"PK\x03\x04" + noise, "zip"),
    (b"\x04\x22\x4d\x18abc", "lz4"),
    (noise, "no text"),
    (b"%PDF-1.7\n" + noise, "no text"),
    (("text without a mark " * 9).encode("utf-16-le"), "UTF-16"),
    ("a short text".encode("utf-32-be"), "UTF-32"),
  ]:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(errors.DataError, match=f"holds no text\n.*{kind}"):
      read(kind="text", path=str(tmp_path / "a.txt"))


def test_zstd_that_begins_with_a_frame_to_skip(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  skipped = (0x184D2A5E).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"abcd"
  codec = pyarrow.Codec("zstd")
  frames = [codec.compress(text, asbytes=True) for text in (b"one\n", b"two\n")]
  (tmp_path / "a.zst").write_bytes(skipped + frames[0] + skipped + frames[1])
  found = read(kind="text", path=str(tmp_path / "a.zst"), document="line")
  assert whole_documents(found) == ["one", "two"]


def test_json_nested_too_deeply_is_skipped(tmp_path):
  deep = '{"text": "b", "m": ' + "[" * 100_000 + "]" * 100_000 + "}"
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + deep + '\n{"text": "c"}\n')
  found = read(kind="jsonl", path=str(tmp_path / "a.jsonl"))
  assert whole_documents(found) == ["a", "", "c"]
  assert problems(found) == [formats.BAD_JSON]


@pytest.mark.faults
def test_a_line_of_200_megabytes_takes_little_memory(tmp_path):
  path = tmp_path / "long.txt"
  with open(path, "wb") as file:
    for _ in range(200):
      file.write(b"one long line of words without end " * 28572)
  code = f"""
import re
from flaxlm.config.base import source
from flaxlm.data.text import documents
corpus = documents.open_source("main", source(kind="text", path={str(path)!r}))
def peak():
  return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
size = sum(len(piece.text) for piece in corpus.read((0, 0)))
print(size, peak() - before)
"""
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
  command = [sys.executable, "-c", code]
  output = subprocess.check_output(command, text=True, env=environment)
  size, kilobytes = map(int, output.split())
  assert size == path.stat().st_size > 199_000_000
  assert 500 < kilobytes < 40_000


# What each reader does with the same bytes: text, documents of a column, records.
READERS = {
  "text": (["line one", "two"], "line one\ntwo\n"),
  "jsonl": (["line one", "two"], '{"text": "line one"}\n{"text": "two"}\n'),
  "csv": (["line one", "two"], "text,label\nline one,1\ntwo,2\n"),
  "tsv": (["line one", "two"], "text\tlabel\nline one\t1\ntwo\t2\n"),
}


def read_texts(kind: str, path) -> list[str]:
  found = whole_documents(read(kind=kind, path=str(path), document="line"))
  return [text for text in found if text]


@pytest.mark.parametrize("kind", READERS)
def test_readers_agree_on_lines_and_encodings(kind, tmp_path):
  expected, text = READERS[kind]
  path = tmp_path / "a"
  windows = text.replace("\n", "\r\n")
  for name, content in {
    "CR LF": windows.encode(),
    "mark": b"\xef\xbb\xbf" + text.encode(),
    "blank lines": windows.replace("\r\n", "\r\n\r\n").encode(),
    "no last newline": text.rstrip("\n").encode(),
    "UTF-16": windows.encode("utf-16"),
    "UTF-32": ("\ufeff" + text).encode("utf-32-be"),
    "UTF-16 and gzip": gzip.compress(text.encode("utf-16")),
  }.items():
    path.write_bytes(content)
    assert read_texts(kind, path) == expected, name
  if kind != "text":  # in which a line of spaces is a document
    path.write_text(text.replace("\n", "\n   \n"))
    assert read_texts(kind, path) == expected


@pytest.mark.faults
@pytest.mark.parametrize("kind", READERS)
def test_no_reader_takes_another_format_for_text(kind, tmp_path, monkeypatch):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  lines = [f"line {n} of a text that is long enough" for n in range(500)]
  parquet.write_table(
    pyarrow.table({"text": lines}), tmp_path / "parquet", compression="none"
  )
  for archive in ("tar", "tar.gz", "zip"):
    with zipfile.ZipFile(tmp_path / archive, "w") as file:
      file.writestr("a.txt", "\n".join(lines))
    if archive != "zip":
      with tarfile.open(tmp_path / archive, "w:gz" if "gz" in archive else "w") as tar:
        tar.add(__file__, "a.txt")
  data = " ".join(lines).encode()
  header = len(data).to_bytes(8, "little")
  (tmp_path / "tfrecord").write_bytes(
    header + bytes.fromhex("8c1ac81a") + data + b"abcd"
  )
  for name, needle in {
    "parquet": "parquet", "tar": "tar archive", "tar.gz": "tar archive",
    "zip": "zip archive", "tfrecord": "TFRecord",
  }.items():  # fmt: skip
    with pytest.raises(errors.DataError, match=f"holds no text(?s:.*){needle}"):
      read(kind=kind, path=str(tmp_path / name))


def test_bad_utf16_is_noted_as_bad_utf8_is(tmp_path):
  text = "good text\n".encode("utf-16")
  for content in (text + b"\x00\xd8a\0", text + b"a"):  # half a pair; half a character
    (tmp_path / "a").write_bytes(content)
    pieces = read(kind="text", path=str(tmp_path / "a"))
    assert whole_documents(pieces)[0].startswith("good text\n\ufffd")
    assert problems(pieces) == [formats.BAD_UTF8]
    with pytest.raises(errors.DataError, match=r"line 2(?s:.*)text in UTF-8"):
      read(kind="csv", path=str(tmp_path / "a"), field="good text")


@pytest.mark.faults
def test_a_flipped_byte_in_parquet_is_noticed_if_it_has_checksums(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path, lines = tmp_path / "a.parquet", [f"line {n}" for n in range(500)]
  parquet.write_table(
    pyarrow.table({"text": lines}), path, compression="none", write_page_checksum=True
  )
  content = path.read_bytes()
  path.write_bytes(content.replace(b"line 77", b"line 7x", 1))
  with pytest.raises(errors.DataError, match=r"a\.parquet cannot be read to its end"):
    read(kind="parquet", path=str(path))


@pytest.mark.faults
def test_bad_utf8_in_parquet_is_repaired(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  bad = pyarrow.array([b"good", b"b\xffd", None]).view(pyarrow.string())
  for column in (bad, bad.cast(pyarrow.large_string()), bad.dictionary_encode()):
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    pieces = read(kind="parquet", path=str(tmp_path / "a.parquet"))
    assert whole_documents(pieces) == ["good", "b\ufffdd", ""]
    assert problems(pieces) == sorted([formats.BAD_JSON, formats.BAD_UTF8])


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_damage_after_the_first_stream_is_no_end(suffix, tmp_path):
  parts = [COMPRESS[suffix](text) for text in (b"one\n", b"two\n" * 9)]
  path = tmp_path / "a"
  path.write_bytes(parts[0] + parts[1] + b"\0" * 8)
  assert whole_documents(read(kind="text", path=str(path))) == ["one\n" + "two\n" * 9]
  for rest in (b"no stream", parts[1][:-3], b"x" + parts[1][1:]):
    path.write_bytes(parts[0] + rest)
    with pytest.raises(errors.DataError, match="cannot be read to its end"):
      read(kind="text", path=str(path))


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "parquet"])
def test_a_failing_disk_or_network_is_no_damage(kind, tmp_path, monkeypatch):
  """What skip loses has to be the same each time, so damage of the file alone."""
  path = tmp_path / "a"
  if kind == "parquet":
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
  else:
    path.write_text(READERS[kind][1])

  class Broken(io.FileIO):
    def readinto(self, buffer):
      raise OSError(errno.EIO, os.strerror(errno.EIO))

    readall = read = lambda self, size=-1: self.readinto(None)

  class NoRoute(io.FileIO):
    read = lambda self, size=-1: 1 / 0  # noqa: E731

  address = types.SimpleNamespace(open=lambda mode: NoRoute(path))
  monkeypatch.setattr(remote, "path", lambda _: address)
  opened = {"disk": lambda _: Broken(path), "gs://x/a": formats.open_binary}
  for name, opener in opened.items():
    for module in (formats, documents):
      monkeypatch.setattr(module, "open_binary", lambda _, o=opener, n=name: o(n))
    corpus = documents.open_source("main", source(kind, str(path)), 0.0, "skip")
    with pytest.raises(errors.StorageError):
      list(corpus.read((0, 0)))
