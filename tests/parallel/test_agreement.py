"""Finds which process differs and how; test_multihost.py has real processes."""

import threading

import jax
import pytest

from flaxlm.errors import ConfigError
from flaxlm.parallel import agreement
from flaxlm.parallel.one_fate import OneFate


def gathered(*facts):
  return [{"host": f"host{i}", "facts": one} for i, one in enumerate(facts)]


@pytest.mark.faults
def test_the_process_that_differs_is_named():
  same = {"code": "a", "config.seed": 0, "config.b": [1, 2]}
  assert agreement._difference(gathered(same, same, same)) == []
  # The usual value is the majority's, even if process 0 is the odd one.
  other = same | {"config.seed": 1, "config.b": [1, 3]}
  error = ConfigError(*agreement._difference(gathered(other, same, same)))
  assert str(error).splitlines() == [
    "config.seed cannot be used",
    "  given:  1 in process 0 (on host0)",
    "  needed: the same in all processes: 0, as in 2 of 3",
    "  try:    the same command, files and versions on every host; "
    "also different: config.b",
  ]
  assert "2 in processes 1 and 3 (on host1)" in str(
    agreement._difference(gathered({"n": 1}, {"n": 2}, {"n": 1}, {"n": 2}))
  )
  missing = agreement._difference(gathered({"n": 1}, {"n": 1, "new": 0}))
  assert missing[:2] == ["new", "0 in process 1 (on host1)"]


def test_the_version_of_the_code_is_that_of_its_files(tmp_path, monkeypatch):
  package = tmp_path / "flaxlm"
  (package / "parallel").mkdir(parents=True)
  monkeypatch.setattr(agreement, "__file__", str(package / "parallel/agreement.py"))
  (package / "loop.py").write_text("a = 1\n")
  before = agreement.local_facts()
  assert before["the number of devices of a process"] == 8
  assert before["the version of jax"] == jax.__version__
  (package / "notes.txt").write_text("not code")
  assert agreement.local_facts() == before
  (package / "loop.py").write_text("a = 2\n")
  changed = agreement.local_facts()
  assert [name for name in changed if changed[name] != before[name]] == [
    "the code of flaxlm"
  ]


def test_alone_there_is_nobody_to_agree_or_die_with():
  agreement.agree("the start", {"config.seed": 0})
  with pytest.raises(KeyError), OneFate():
    raise KeyError("it is raised as ever")
  assert "one-fate" not in [thread.name for thread in threading.enumerate()]
