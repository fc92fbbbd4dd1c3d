"""`flaxlm evaluate --tasks`: flags without effect are refused, results are readable."""

import argparse

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
