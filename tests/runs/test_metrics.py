"""A run's log is exact, valid and free of duplicates; its speeds can be trusted."""

import io
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from flaxlm import files
from flaxlm.errors import OutputError, StorageError
from flaxlm.runs import metrics
from flaxlm.runs.metrics import MetricsWriter


def writer(path, first_step=0, tensorboard=False, stream=None, **options):
  options = {"tokens_per_step": 1000} | options
  stream = stream or io.StringIO()
  return MetricsWriter(path, tensorboard, first_step, 100, stream=stream, **options)


def records(path) -> list[dict]:
  def refuse(constant):
    raise ValueError(f"{constant} is not JSON")

  text = (pathlib.Path(path) / "metrics.jsonl").read_text()
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_floats_are_exact(tmp_path):
  loss = np.float32(0.1) + np.float32(2) ** -20
  with writer(tmp_path) as log:
    log.log(1, {"loss": jnp.float32(loss), "tokens": 2**40, "note": "x"})
    log.log(1, {"loss": jnp.bfloat16(0.1)}, kind="eval")
  train, evaluation = records(tmp_path)
  assert np.float32(train["loss"]) == loss and train["loss"] == float(loss)
  assert (train["step"], train["kind"], train["tokens"], train["note"]) == (
    1,
    "train",
    2**40,
    "x",
  )
  assert evaluation.pop("time") == pytest.approx(time.time(), rel=0, abs=60)
  assert len(evaluation.pop("crc32")) == 8
  assert evaluation == {"step": 1, "kind": "eval", "loss": float(jnp.bfloat16(0.1))}


def test_the_file_stays_json_when_the_loss_does_not(tmp_path):
  with writer(tmp_path, tensorboard=True) as log:
    log.log(1, {"loss": jnp.float32(jnp.nan), "grad_norm": np.inf, "x": -np.inf})
  (record,) = records(tmp_path)
  assert (record["loss"], record["grad_norm"], record["x"]) == ("nan", "inf", "-inf")
  assert math.isnan(float(record["loss"]))


@pytest.mark.faults
def test_resume_leaves_no_duplicates_and_mends_a_torn_line(tmp_path):
  """Every step is logged: one too many or too few would be seen."""
  with writer(tmp_path) as log:
    for step in range(1, 8):
      log.log(step, {"loss": float(step)})
      log.log(step, {"loss": step + 0.5}, kind="eval")
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 4, "kind": "tr')
  with writer(tmp_path, first_step=4) as log:
    log.log(5, {"loss": 15.0})
  found = [(r["step"], r["loss"]) for r in records(tmp_path)]
  kept = [(step, step + x) for step in range(1, 5) for x in (0.0, 0.5)]
  assert found == [*kept, (5, 15.0)]
  # Cut after a complete object: only the missing newline shows it.
  path.write_text(path.read_text().removesuffix("\n"))
  with writer(tmp_path, first_step=5) as log:
    log.log(6, {"loss": 16.0})
  assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [*kept, (6, 16.0)]
  for _ in range(2):  # killed before its first checkpoint, then started again
    with writer(tmp_path, first_step=0) as log:
      log.log(0, {"loss": 9.0}, kind="eval")
    assert [r["step"] for r in records(tmp_path)] == [0]


def read_events(path) -> list[Event]:
  data, events = path.read_bytes(), []
  while data:
    size = int.from_bytes(
      data[:8], "little"
    )  # TFRecord: length, its crc, data, its crc
    events.append(Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return events


def test_tensorboard_hides_what_is_done_again(tmp_path):
  with writer(tmp_path, first_step=20, tensorboard=True) as log:
    log.log(30, {"loss": 1.5, "note": "text"})
  (file,) = (tmp_path / "tensorboard").iterdir()
  version, start, event = read_events(file)
  assert version.file_version == "brain.Event:2"
  assert start.step == 21 and start.session_log.status == start.session_log.START
  assert event.step == 30
  found = {v.tag: v.simple_value for v in event.summary.value}
  assert found["train/loss"] == 1.5 and "train/note" not in found


@pytest.mark.faults
def test_broken_tensorboard_warns_once_and_the_run_goes_on(
  tmp_path, capsys, monkeypatch
):
  (tmp_path / "tensorboard").write_text("a file")
  with writer(tmp_path, tensorboard=True) as log:
    log.log(1, {"loss": 1.0})
  assert capsys.readouterr().err.count("TensorBoard is off") == 1
  (tmp_path / "tensorboard").unlink()

  def fail(*_):
    raise OSError("no space")

  with writer(tmp_path, tensorboard=True) as log:
    monkeypatch.setattr(type(log._events), "write_event", fail)
    for step in range(30):
      log.log(step, {"loss": 1.0})
  assert capsys.readouterr().err.count("TensorBoard is off: no space") == 1
  assert len(records(tmp_path)) == 30


def test_a_log_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, capsys):
  (tmp_path / "other/metrics.jsonl").mkdir(parents=True)
  for workdir in (tmp_path / "missing", tmp_path / "other"):
    with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be written"):
      writer(workdir)
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  monkeypatch.setattr(metrics, "drop_lines_after", lambda *_: None)
  monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0))
  with pytest.raises(StorageError, match="No space"), writer(tmp_path) as log:
    log.log(1, {"loss": 1.0})
  assert capsys.readouterr().err.count("No space left on device; trying again") == 2


@pytest.mark.faults
def test_a_disk_that_is_full_for_a_moment_costs_no_line(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0))
  with writer(tmp_path) as log:
    log.log(1, {"loss": 1.0})
    real, cut = log._file, [5, 0]  # bytes that two writes manage

    class Full:
      name, fileno = real.name, real.fileno

      def write(self, data):
        return real.write(data[: cut.pop(0)] if cut else data)

    log._file = Full()
    log.log(2, {"loss": 2.0})
    log._file = real
  assert not cut and [r["step"] for r in records(tmp_path)] == [1, 2]


def test_a_prediction_is_logged_beside_what_is_measured(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  with writer(tmp_path, predicted_seconds=0.3) as log:
    log.restart_clock(1)
    now[0] += 2.0
    log.log(11, {"loss": 1.0})
  (record,) = records(tmp_path)
  assert record["predicted_seconds"] == 0.3
  assert record["predicted_over_measured"] == pytest.approx(1.5)


def test_console_lines_and_speed(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  out = io.StringIO()
  options = {"flops_per_token": 2e9, "peak_flops": 1e13, "stream": out}
  with writer(tmp_path, **options) as log:
    log.log(1, {"loss": 9.0})  # the step that compiles: no speed is claimed
    log.restart_clock(1)
    now[0] += 2.0
    values = {"loss": 3.25, "grad_norm": 0.5, "learning_rate": 6e-4, "bad_steps": 1}
    log.log(11, values, data_wait=0.5)
    now[0] += 50.0
    log.restart_clock(11)  # an evaluation ran
    now[0] += 4.0
    log.log(21, values)
    log.log(21, {"loss": 3.5, "bits_per_byte": 1.23456}, kind="eval")
  first, second, third, evaluation = out.getvalue().splitlines()
  assert first.startswith("step   1/100  loss 9.0000  rss ") and "tok/s" not in first
  assert second.startswith(
    "step  11/100  loss 3.2500  grad 0.5  lr 6.00e-04  5k tok/s (625/device)  "
    "MFU 12.5%  rss "
  )
  assert second.endswith("data wait 25.0%  ETA 18s  bad_steps 1")
  assert "2.5k tok/s" in third and "ETA 24s" in third  # 79 steps at 6 s per 20
  assert evaluation == "step  21/100  eval  loss 3.5000  bits_per_byte 1.235"
  assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
  one, two = records(tmp_path)[:2]
  assert "tokens_per_second" not in one and two["tokens_per_second"] == 5000.0
  assert two["tokens_per_second_per_device"] == 625.0
  assert two["data_wait"] == 0.25


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_terminal_gets_a_bar_above_which_lines_stay_whole(tmp_path, monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "60")
  out = Terminal()
  with writer(tmp_path, stream=out) as log:
    log.log(50, {"loss": 3.25, "long_name": "[bold]" + "x" * 90})
    log.advance(50)
  assert "50/100" in out.getvalue() and "\x1b" in out.getvalue()
  assert "loss 3.2500" in out.getvalue() and "[bold]" + "x" * 90 in out.getvalue()


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  out = io.StringIO()
  with writer(tmp_path, tensorboard=True, stream=out) as log:
    log.log(1, {"loss": 1.0})
  assert not list(tmp_path.iterdir()) and not out.getvalue()
