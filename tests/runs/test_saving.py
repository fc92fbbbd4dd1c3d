"""A save that fails is tried again with a later state, and not for ever."""

import jax
import pytest

from flaxlm import files
from flaxlm.errors import StorageError
from flaxlm.runs import saving
from flaxlm.runs.saving import Saves


class Disk:
  """A checkpointer whose saves fail as `plan` says: begin, end, or None."""

  def __init__(self, *plan):
    self.plan, self.saved, self.running = list(plan), [], None

  def is_due(self, step):
    return step % 10 == 0

  def save(self, step, state, meta):
    self.wait()
    assert meta == {"step": step}
    how = self.plan.pop(0) if self.plan else None
    if how == "begin":
      raise StorageError(f"step {step} cannot be saved", "full")
    self.running = step, how

  def poll(self):
    ended = self.running is not None
    self.wait()
    return ended

  def wait(self):
    (step, how), self.running = self.running or (None, None), None
    if how == "end":
      raise StorageError(f"saving step {step} failed", "full")
    if step is not None:
      self.saved.append(step)


@pytest.fixture
def clock(monkeypatch):
  """Time passes only in sleeps, or when a test says so; returns [seconds]."""
  now = [100.0]
  monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(saving.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
  monkeypatch.setattr(files, "RETRY_SECONDS", (1.0, 4.0))
  return now


def run(disk, clock, last, seconds=1.0):
  """Runs the steps of a loop, each `seconds` long."""
  saves = Saves(disk, lambda step: {"step": step})
  for step in range(1, last + 1):
    clock[0] += seconds
    saves.poll()
    if step == last:
      saves.finish(step, None)
    elif saves.is_due(step):
      saves.begin(step, None)
  return disk.saved


def test_saves_are_on_time_where_nothing_fails(clock):
  assert run(Disk(), clock, 25) == [10, 20, 25]


@pytest.mark.faults
@pytest.mark.parametrize("how", ["begin", "end"])
def test_a_later_state_is_saved_after_a_failure(clock, how, capsys):
  # A failure at the beginning is seen in its step, one at the end in the next.
  expected = {"begin": [11, 20, 25], "end": [12, 20, 25]}[how]
  assert run(Disk(how), clock, 25) == expected
  err = capsys.readouterr().err
  assert "given:  full; trying again in 1 s" in err and err.count("warning") == 1


def test_failures_with_a_success_between_them_are_forgotten(clock):
  saved = run(Disk("begin", "begin", None, "begin", "begin"), clock, 45)
  assert saved == [15, 25, 30, 40, 45]


@pytest.mark.faults
@pytest.mark.parametrize("how", ["begin", "end"])
def test_failures_in_a_row_end_the_run(clock, how):
  with pytest.raises(StorageError) as caught:
    run(Disk(how, how, how), clock, 99)
  assert caught.value.exit_code == 74


def test_the_last_state_is_waited_for_and_tried_again(clock):
  disk = Disk("end", "begin")
  assert run(disk, clock, 5) == [5] and not disk.plan
  with pytest.raises(StorageError):
    run(Disk("end", "begin", "end"), clock, 5)


def test_processes_of_a_job_end_together(clock, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(StorageError):
    run(Disk("begin"), clock, 20)
