"""What makes a store stale: other contents, other settings; and stores of old."""

import hashlib
import json
import os
import pathlib
import re

import pytest

from flaxlm import errors
from flaxlm.data.store import build, manifest
from flaxlm.data.store.build import build_store
from flaxlm.data.text import contents


@pytest.fixture
def lines(text_config, tmp_path):
  """A config over files, two of which are long enough to have a middle."""
  folder = tmp_path / "texts"
  for number in range(3):
    ends = "." * (1 + 30_000 * bool(number))
    text = "".join(f"line {n} of {number}{ends}\n" for n in range(9))
    (folder / f"{number}.txt").write_text(text)
  text_config.tokenizer.train_bytes = 2000
  return text_config


def prepare(config) -> list[str]:
  said = []
  build_store(config.data, config.tokenizer, said.append)
  return said


def edit(path: pathlib.Path, keep_times: bool = True) -> None:
  """Changes a byte in the middle of a file, and nothing that `ls` shows."""
  content, status = bytearray(path.read_bytes()), path.stat()
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  if keep_times:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.faults
@pytest.mark.parametrize("keep_times", [True, False])
def test_an_edit_of_equal_size_is_noticed(keep_times, lines, tmp_path):
  prepare(lines)
  assert any(line.startswith("reusing") for line in prepare(lines))
  edit(tmp_path / "texts/2.txt", keep_times)
  with pytest.raises(errors.ConfigError, match=r"sources\.main, which are 2\.txt"):
    prepare(lines)


def test_files_that_did_not_change_are_not_read_again(lines, tmp_path, monkeypatch):
  monkeypatch.setattr(contents, "SETTLED_NS", -1)
  prepare(lines)
  read = []
  monkeypatch.setattr(
    hashlib,
    "file_digest",
    lambda file, kind: read.append(file.name) or hashlib.sha256(),
  )
  assert any(line.startswith("reusing") for line in prepare(lines)) and not read
  path = tmp_path / "texts/1.txt"
  os.utime(path)  # copied or touched: the contents decide
  with pytest.raises(errors.ConfigError):
    prepare(lines)
  assert read == [str(path)]


def test_a_copy_elsewhere_with_other_times_is_the_same(lines, tmp_path):
  prepare(lines)
  (tmp_path / "texts").rename(tmp_path / "moved")
  lines.data.sources.main.path = str(tmp_path / "moved" / "*.txt")
  for path in (tmp_path / "moved").iterdir():
    os.utime(path, (1e9, 1e9))
  assert any(line.startswith("reusing") for line in prepare(lines))
  seen = json.loads((tmp_path / "store/.seen.json").read_text())  # the next is quick
  assert {os.path.dirname(path) for path in seen} == {str(tmp_path / "moved")}


@pytest.mark.faults
def test_only_the_files_that_are_needed_count(lines, tmp_path):
  lines.data.sources.main.max_documents = 18
  prepare(lines)
  edit(tmp_path / "texts/2.txt")
  assert any(line.startswith("reusing") for line in prepare(lines))
  edit(tmp_path / "texts/1.txt")
  with pytest.raises(errors.ConfigError, match=r"which are 1\.txt"):
    prepare(lines)


@pytest.mark.faults
def test_times_in_the_future_are_not_trusted(lines, tmp_path):
  path = tmp_path / "texts/1.txt"
  os.utime(path, (4e9, 4e9))
  prepare(lines)
  assert json.loads((tmp_path / "store/.seen.json").read_text())[str(path)][3] == ""
  edit(path)
  with pytest.raises(errors.ConfigError, match="other files in"):
    prepare(lines)


def test_a_source_that_changes_while_it_is_read(lines, tmp_path, monkeypatch):
  written, real = [], build.write_source

  def change(root, name, *rest):
    if not written:
      edit(tmp_path / "texts/1.txt")
    written.append(name)
    return real(root, name, *rest)

  monkeypatch.setattr(build, "write_source", change)
  with pytest.raises(errors.DataError, match=r"1\.txt changed while it was"):
    prepare(lines)


def test_a_source_that_changes_while_an_interrupted_preparation_waits(
  lines, tmp_path, monkeypatch
):
  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(build, "make_manifest", stop)
    prepare(lines)
  edit(tmp_path / "texts/1.txt")
  with pytest.raises(errors.ConfigError, match=r"which are 1\.txt"):
    prepare(lines)
  edit(tmp_path / "texts/1.txt")  # back again
  assert any(line.startswith("continuing") for line in prepare(lines))


def test_every_file_is_listed_with_its_sha256(lines, tmp_path):
  prepare(lines)
  listed = json.loads((tmp_path / "store/sources.json").read_text())["main"]
  assert listed == [
    [path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    for path in sorted((tmp_path / "texts").iterdir())
  ]


def make_old(root: pathlib.Path, split: str) -> None:
  """Makes a store one of an older version, which knew names and sizes of files."""
  (root / "sources.json").unlink()
  (root / ".seen.json").unlink()
  found = json.loads((root / "manifest.json").read_text())
  recipe = found["recipe"]
  recipe["split"] = split
  del recipe["on_corrupt"]
  for source in recipe["sources"].values():
    del source["contents"], source["validation"]
  found["fingerprint"] = manifest.fingerprint_of(found)
  (root / "manifest.json").write_bytes(manifest.dump(found))
  (root / "recipe.json").write_bytes(manifest.dump(recipe))


def test_stores_of_older_versions_are_reused(lines, tmp_path):
  prepare(lines)
  make_old(tmp_path / "store", "hash")
  for split in ("auto", "hash"):
    lines.data.split = split
    said = prepare(lines)
    assert said[-1].startswith("reusing")
    assert "recorded no contents" in said[0] and "source main" in said[0]
  lines.data.split = "tail"
  with pytest.raises(errors.ConfigError, match=r"validation='hash' \(now 'tail'\)"):
    prepare(lines)
  lines.data.split = "auto"
  (tmp_path / "texts/1.txt").write_text("another size")
  with pytest.raises(errors.ConfigError, match="other files in"):
    prepare(lines)


def test_a_preparation_of_an_older_version_is_continued(lines, tmp_path):
  prepare(lines)
  make_old(tmp_path / "store", "tail")
  (tmp_path / "store/manifest.json").unlink()
  said = prepare(lines)
  assert "recorded no contents" in said[0] and said[1].startswith("continuing")
  assert "recorded no contents" in prepare(lines)[0]  # and it does not claim them now


def test_auto_keeps_the_split_of_an_older_store(lines, tmp_path):
  lines.data.split = "tail"
  prepare(lines)
  make_old(tmp_path / "store", "tail")
  lines.data.split = "auto"
  assert prepare(lines)[-1].startswith("reusing")


@pytest.mark.parametrize("name", ["recipe.json", "main/000000.json", "manifest.json"])
def test_damaged_files_of_a_preparation_are_named(name, lines, tmp_path):
  prepare(lines)
  path = tmp_path / "store" / name
  if name != "manifest.json":
    (tmp_path / "store/manifest.json").unlink()
  content = path.read_bytes()
  flipped = re.sub(rb'("documents"|"shard_tokens"): \d', rb"\1: 7", content)
  assert flipped != content
  no_json = (b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1}', b"[" * 100_000)
  for damage in (flipped, *no_json):
    path.write_bytes(damage)
    with pytest.raises(errors.DataError) as caught:
      prepare(lines)
    assert str(path) in str(caught.value)


def test_units_of_another_tokenizer_are_not_continued(lines, tmp_path):
  prepare(lines)
  root = tmp_path / "store"
  (root / "manifest.json").unlink()
  unit = json.loads((root / "main/000000.json").read_text())
  lines.data.store = str(tmp_path / "other")
  lines.tokenizer.train_bytes = 20
  prepare(lines)
  (root / "tokenizer.model").write_bytes(
    (tmp_path / "other/tokenizer.model").read_bytes()
  )
  lines.data.store, lines.tokenizer.train_bytes = str(root), 2000
  assert unit["tokenizer"]
  with pytest.raises(errors.DataError, match="another tokenizer made it"):
    prepare(lines)
