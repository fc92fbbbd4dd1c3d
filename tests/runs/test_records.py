"""Damaged lines of a log are never read, and are named."""

import json

import pytest

from flaxlm.runs.records import (
  drop_lines_after,
  format_record,
  is_logged,
  read_log,
)


def line(step, kind="train", **more) -> bytes:
  return format_record({"step": step, "kind": kind, "loss": step + 0.5} | more)


def read(path) -> tuple[list[dict], list[int]]:
  damaged = []
  return [record for _, record in read_log(path, damaged)], damaged


def test_a_line_is_json_and_reads_as_it_was_written(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(line(1, note='a "text", "crc32": "'))
  assert json.loads(path.read_bytes())["loss"] == 1.5
  expected = {"step": 1, "kind": "train", "loss": 1.5, "note": 'a "text", "crc32": "'}
  assert read(path) == ([expected], [])


def test_no_flipped_bit_changes_what_is_read(tmp_path):
  path = tmp_path / "metrics.jsonl"
  whole = line(1) + line(2) + line(3)
  path.write_bytes(whole)
  expected = [(step, "train", step + 0.5) for step in (1, 2, 3)]
  for position in range(len(whole)):
    for bit in (0, 5):
      flipped = bytearray(whole)
      flipped[position] ^= 1 << bit
      path.write_bytes(flipped)
      found, damaged = read(path)
      values = [(r["step"], r["kind"], r["loss"]) for r in found]
      assert set(values) <= set(expected), position
      torn = not flipped.endswith(b"\n")
      assert values == expected or damaged or torn, position


@pytest.mark.faults
def test_damaged_and_repeated_lines_are_named_and_left_out(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  bad = line(2).replace(b"2.5", b"2.4")
  unchecked = b'{"step": 4, "kind": "train", "loss": 4.5}\n'
  path.write_bytes(line(1) + bad + line(3) + line(1) + unchecked + b"\xff\n" + line(5))
  records, damaged = read(path)
  assert [r["step"] for r in records] == [1, 3, 5] and damaged == [2, 4, 5, 6]
  assert not is_logged(path, 2, "train") and is_logged(path, 3, "train")
  drop_lines_after(path, 4)
  assert f"{path}: 4 damaged lines are left out: 2, 4, 5, 6" in capsys.readouterr().err
  assert path.read_bytes() == line(1) + line(3)
  drop_lines_after(path, 4)
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  "odd", [b"5\n", b"[]\n", b'{"step": "1"}\n', b'{"step": -1}\n', b"\n", b"[" * 9999]
)
def test_lines_that_are_no_records_are_damaged(tmp_path, odd):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(odd.rstrip(b"\n") + b"\n" + line(1))
  assert [r["step"] for r in read(path)[0]] == [1] and read(path)[1] == [1]


def test_lines_of_older_versions_have_no_check(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  old = b'{"step": 1, "kind": "train", "loss": "nan"}\n'
  path.write_bytes(old + line(2))
  assert [r["loss"] for r in read(path)[0]] == ["nan", 2.5]
  drop_lines_after(path, 2)
  assert path.read_bytes() == old + line(2) and not capsys.readouterr().err
