"""`flaxlm evaluate --tasks`: flags without effect are refused, results are readable."""

import argparse
from types import SimpleNamespace

import pytest

from flaxlm import evaluate
from flaxlm.errors import ConfigError, MissingInputError


@pytest.mark.parametrize(
  ("flags", "wrong"),
  [
    (["--limit=5"], "--limit"),
    (["--task_data=x"], "--task_data"),
    (["--watch"], "--watch"),
    (["--tasks=copa", "--limit=-1"], "--limit"),
    (["--tasks=copa", "--watch", "--step=3"], "--watch"),
    (["--tasks=copa", "--watch", "--against=b"], "--watch"),
    (["--tasks=,"], "--tasks"),
    (["--tasks=quiz"], r"eval\.tasks"),
  ],
)
def test_flags_that_say_nothing_are_refused(flags, wrong):
  with pytest.raises(ConfigError, match=wrong):
    evaluate.main(["--workdir=nowhere", *flags])


def test_missing_data_is_named_before_the_model_is_loaded(tmp_path):
  with pytest.raises(MissingInputError, match=r"copa\.jsonl"):
    evaluate.main(["--workdir=nowhere", "--tasks=copa", f"--task_data={tmp_path}"])


def test_each_checkpoint_is_evaluated_though_some_are_deleted(
  tmp_path, monkeypatch, capsys
):
  (tmp_path / "checkpoints/20").mkdir(parents=True)
  done = []

  def run(workdir, step, *rest):
    done.append(step)
    if step in (10, 20):
      raise MissingInputError("no checkpoint", step)

  monkeypatch.setattr(evaluate, "_run", run)
  monkeypatch.setattr(
    evaluate, "load_run_config", lambda *_: SimpleNamespace(num_steps=30)
  )
  steps = iter([[10], [10, 15], [20, 30]])
  monkeypatch.setattr("flaxlm.training.checkpoint.list_steps", lambda _: next(steps))
  monkeypatch.setattr("flaxlm.evals.tasks.open_task", lambda *_: "task")
  monkeypatch.setattr(evaluate, "_WATCH_SECONDS", 0.0)
  command = [f"--workdir={tmp_path}", "--tasks=copa", "--watch"]
  with pytest.raises(MissingInputError):  # step 20 is there: that is no deletion
    evaluate.main(command)
  assert done == [10, 15, 20]
  assert capsys.readouterr().out.startswith("step 10: deleted before")


RESULT = {
  "step": 500,
  "task": "copa",
  "method": "loglikelihood",
  "merged_tokens": 3,
  "cut_contexts": 0,
  "metrics": {"n": 1200, "acc": 0.5, "acc_se": 0.05, "perplexity": 9.0},
  "chance": {"unigram": {"n": 1200, "acc": 0.58}},
}


def test_a_result_is_shown_beside_chance():
  lines = evaluate._describe_task(RESULT).splitlines()
  assert lines[0] == "step 500  copa  n 1,200  (loglikelihood)"
  assert " ".join(lines[1].split()) == "acc 0.5000 ± 0.0500 (chance: unigram 0.5800)"
  assert lines[2].split() == ["perplexity", "9.0000"]
  assert lines[3] == "  3 joins inside a token" and len(lines) == 4
  imported = evaluate._describe_task(RESULT | {"step": None})
  assert imported.startswith("copa  n")


def test_without_tasks_the_held_out_loss_is_asked_for():
  args = argparse.Namespace(
    tasks=None, limit=0, task_data="", output=None, against=None, watch=False, step=None
  )
  evaluate._check_flags(args)
