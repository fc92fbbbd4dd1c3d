"""Tasks in a run: logged with the held-out loss, within a budget, refused early."""

import contextlib
import json
import types

import pytest

from flaxlm.errors import ConfigError, MissingInputError
from flaxlm.evals import in_loop
from flaxlm.evals.in_loop import open_tasks
from flaxlm.runs.loop import evaluation_is_due, make_evaluation, train
from flaxlm.runs.metrics import MetricsWriter


@pytest.fixture
def config(tiny, tmp_path):
  """A config with a task of 200 pairs of texts."""
  with (tmp_path / "data.jsonl").open("w") as file:
    for i in range(200):
      record = {"good": f"import module{i}", "bad": f"module{i} import ("}
      file.write(json.dumps(record) + "\n")
  fields = {"shape": "pairs", "data": "data.jsonl", "good": "good", "bad": "bad"}
  (tmp_path / "order.json").write_text(json.dumps(fields))
  tiny.model.vocab_size = 1024
  tiny.eval.tasks = (str(tmp_path / "order.json"),)
  tiny.eval.task_seconds = 0.0
  return tiny


class Stop:
  requested = False

  def __init__(self, after=10**9):
    self.left = after

  def should_stop(self, step=None):
    self.left -= step is None
    return self.left < 0


def test_tasks_are_logged_with_the_held_out_loss_or_alone(config):
  logged = []
  progress = types.SimpleNamespace(
    paused=lambda step: contextlib.nullcontext(),
    writer=types.SimpleNamespace(log=lambda *a, **k: logged.append((a, k))),
  )
  program = types.SimpleNamespace(assemble=lambda model, base: model)
  feed = types.SimpleNamespace(validation=None)
  assert evaluation_is_due(config, feed, config.num_steps)
  results = iter([{"t/acc": 0.5}, None])
  evaluate_after = make_evaluation(
    program, feed, progress, Stop(), types.SimpleNamespace(beat=None),
    lambda model, should_stop, beat: next(results),
  )  # fmt: skip
  state = types.SimpleNamespace(eval_model=1.0)
  assert evaluate_after(3, state, None) and logged == [
    ((3, {"t/acc": 0.5}), {"kind": "eval"})
  ]
  assert not evaluate_after(4, state, None) and len(logged) == 1  # a signal came
  config.eval.tasks = ()
  assert not evaluation_is_due(config, feed, config.num_steps)


@pytest.mark.slow
def test_a_run_logs_its_tasks_without_other_held_out_data(
  config, bpe, tmp_path, capsys
):
  config.num_steps, config.eval.every = 2, 1
  config.checkpoint.every = 5

  def open_with_tokenizer(config, tokenizer):
    return open_tasks(config, bpe.model)  # random tokens come without one

  workdir = tmp_path / "run"
  train(config, workdir, Stop(), open_tasks=open_with_tokenizer)
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  found = [line for line in lines if line["kind"] == "eval"]
  assert [line["step"] for line in found] == [1, 2]
  for line in found:
    assert line["order/n"] == 200 and 0 <= line["order/acc"] <= 1
    assert {"order/acc_se", "order/bits_per_byte", "order/acc_unigram"} <= line.keys()
    assert line["order/bits_per_byte_uniform_bytes"] == pytest.approx(8)
  assert found[0]["order/bits_per_byte"] != found[1]["order/bits_per_byte"]
  assert "\n  order  n 200  acc " in capsys.readouterr().out


def make(monkeypatch, seconds_per_batch, budget, tasks=1):
  """Returns (scores of fake tasks, batches that each has run)."""
  clock, batches = [0.0], []

  def run_task(task, scorer, model, should_stop):
    batches.append(0)
    for _ in range(100):
      clock[0] += seconds_per_batch
      batches[-1] += 1
      if should_stop():
        break
    metrics = {"n": batches[-1], "acc": 0.5}
    chance = {"unigram": {"n": batches[-1], "acc": 0.4, "acc_se": 0.1}}
    return {"task": task, "metrics": metrics, "chance": chance}

  monkeypatch.setattr(in_loop, "run_task", run_task)
  monkeypatch.setattr(in_loop.time, "monotonic", lambda: clock[0])
  warm = types.SimpleNamespace(warm_up=lambda model: None)
  monkeypatch.setattr(in_loop, "Scorer", lambda *arguments: warm)
  knobs = types.SimpleNamespace(task_seconds=budget)
  names = [f"t{i}" for i in range(tasks)]
  return in_loop._TaskScores(names, 4, 32, 64, knobs), batches


@pytest.mark.parametrize(("seconds", "tasks"), [(10.0, 1), (30.0, 3)])
def test_a_budget_is_kept_by_whole_batches(monkeypatch, seconds, tasks):
  score, batches = make(monkeypatch, 0.3, seconds, tasks)
  found = score(None, lambda: False, lambda: None)
  assert abs(0.3 * sum(batches) - seconds) <= 0.1 * seconds
  assert max(batches) - min(batches) <= 1
  assert found["t0/n"] == batches[0] and found["t0/acc_unigram"] == 0.4
  assert "t0/acc_se_unigram" not in found


def test_no_budget_means_all_and_a_signal_ends_it(monkeypatch):
  score, batches = make(monkeypatch, 5.0, 0.0)
  beats = []
  assert score(None, lambda: False, lambda: beats.append(1))["t0/n"] == 100
  assert len(beats) == 100
  score, batches = make(monkeypatch, 5.0, 0.0, tasks=2)
  assert score(None, lambda: True, lambda: None) is None and batches == [1]


def test_what_cannot_be_asked_is_said_before_the_run(config, bpe, tmp_path):
  with pytest.raises(ConfigError, match=r"eval.tasks[^$]*without a tokenizer"):
    open_tasks(config, b"")
  path = tmp_path / "order.json"
  fields = json.loads(path.read_text())
  fields |= {"shape": "generate", "prompt": "{good}", "answers": "bad"}
  path.write_text(json.dumps(fields))
  with pytest.raises(ConfigError, match=r"order \(generate\)[^$]*flaxlm evaluate"):
    open_tasks(config, bpe.model)
  config.eval.tasks = ("copa",)
  config.eval.task_data = str(tmp_path)
  with pytest.raises(MissingInputError, match="data of the task copa"):
    open_tasks(config, bpe.model)


def test_the_console_shows_a_line_per_task(tmp_path, capsys):
  with MetricsWriter(tmp_path, False, 0, 10, 1) as writer:
    writer.log(3, {"loss": 2.0, "copa/acc": 0.5, "copa/n": 9, "x/acc": 0.25}, "eval")
  shown = capsys.readouterr().out
  assert shown == "step  3/10  eval  loss 2.0000\n  copa  acc 0.5  n 9\n  x  acc 0.25\n"
  record = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert record["copa/acc"] == 0.5
