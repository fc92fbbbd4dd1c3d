"""The position of a run in its data: rows, counted exactly."""

import types

import pytest

from flaxlm.errors import DataError
from flaxlm.runs import begin
from flaxlm.runs.begin import Start, describe_checkpoint, rows_read
from flaxlm.runs.directory import RunFiles, hash_kept


def feed(**changes):
  fields = {"fingerprint": "x", "tokenizer_sha256": "", "chat_template": None}
  return types.SimpleNamespace(**fields | {"examples": None} | changes)


def start(**changes) -> Start:
  return Start(None, None, None, 0, 0, {})._replace(**changes)


def test_rows_are_counted_over_changes_of_the_batch_size(tiny):
  meta = describe_checkpoint(tiny, feed(), start(), 3)
  assert (meta["rows"], meta["tokens"]) == (24, 24 * 32)
  tiny.data.batch_size = 20
  resumed = start(step=3, rows=rows_read(meta))
  meta = describe_checkpoint(tiny, feed(), resumed, 5)
  assert (meta["rows"], meta["tokens"]) == (64, 64 * 32)


def test_an_older_version_counted_steps_and_read_the_rows_after_them(tiny):
  meta = describe_checkpoint(tiny, feed(), start(), 5)
  del meta["rows"]
  assert rows_read(meta) == 5 * 8


@pytest.mark.faults
def test_counters_are_exact_beyond_32_and_53_bits(tiny):
  tiny.data.seq_len = tiny.data.batch_size = 2**20 + 1
  step = 2**31 - 1
  meta = describe_checkpoint(tiny, feed(), start(), step)
  assert meta["tokens"] == (2**20 + 1) ** 2 * step > 2**63


def test_a_checkpoint_says_whether_its_classes_have_numbers_by_decision(tiny):
  for numbered in (True, False):
    examples = types.SimpleNamespace(numbered=numbered)
    meta = describe_checkpoint(tiny, feed(examples=examples), start(), 5)
    assert meta["labels_numbered"] is numbered
  assert "labels_numbered" not in describe_checkpoint(tiny, feed(), start(), 5)


@pytest.mark.faults
def test_weights_and_data_of_two_tokenizers_do_not_meet():
  begin._check_tokenizer("a" * 64, feed(tokenizer_sha256="a" * 64), "runs/a")
  begin._check_tokenizer("", feed(tokenizer_sha256="a" * 64), "runs/a")
  begin._check_tokenizer("a" * 64, feed(), "runs/a")  # random tokens
  with pytest.raises(DataError, match=r"given:  b{12}\n  needed: a{12}, of runs/a"):
    begin._check_tokenizer("a" * 64, feed(tokenizer_sha256="b" * 64), "runs/a")


def test_a_checkpoint_names_the_kept_files_and_the_weights_under_adapters(
  tiny, tmp_path
):
  files = RunFiles(tmp_path)
  files.chat_template.write_text("{{ x }}")
  files.originals.mkdir()
  (files.originals / "generation_config.json").write_text("{}")
  began = start(files=hash_kept(tmp_path), base_name="step 4, abc")
  meta = describe_checkpoint(tiny, feed(), began, 5)
  assert list(meta["files"]) == [
    "chat_template.jinja",
    "huggingface/generation_config.json",
  ]
  assert meta["base"] == "step 4, abc"
  assert "base" not in describe_checkpoint(tiny, feed(), start(), 5)
