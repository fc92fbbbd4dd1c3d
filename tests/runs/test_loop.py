"""The loop: when it evaluates, what it saves, how it stops, what it does not change.

Started, killed and resumed processes are in tests/test_end_to_end.py.
"""

import json
import shutil
import time
import types

import jax
import pytest

from flaxlm.config.load import config_from_json, config_to_json
from flaxlm.config.tree import flatten
from flaxlm.errors import ConfigError, DataError, Preempted
from flaxlm.runs import loop, program
from flaxlm.runs.directory import load_run_config
from flaxlm.training import checkpoint
from flaxlm.training.checkpoint import list_steps, read_meta


class Stop:
  """Requests a stop after a step, or in the evaluation after it."""

  def __init__(self, after: int = 10**9, in_evaluation: bool = False):
    self.after, self.in_evaluation, self.step = after, in_evaluation, 0
    self.requested = False

  def should_stop(self, step: int | None = None) -> bool:
    if step is None:
      return self.in_evaluation and self.step >= self.after
    self.step = step
    return step >= self.after and not self.in_evaluation


@pytest.fixture(scope="module", autouse=True)
def hold_out():
  """Evaluates on two of the training batches."""

  def open_feed(*arguments, **options):
    feed = program.open_feed(*arguments, **options)
    feed.validation, feed.num_eval_batches = feed.train, 2
    feed.bytes_per_token = lambda: None
    return feed

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "open_feed", open_feed)
    yield


def four_steps(config):
  config.num_steps, config.eval.every, config.checkpoint.every = 4, 2, 3
  config.log.every, config.checkpoint.keep_last = 1, 9
  config.model.num_layers = 1
  return config


@pytest.fixture
def config(tiny):
  return four_steps(tiny)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_tiny):
  """An uninterrupted run: (its config, the config before it, its directory)."""
  config, workdir = four_steps(make_tiny()), tmp_path_factory.mktemp("finished")
  asked = config_to_json(config)
  run(config, workdir)
  return config, asked, workdir


def run(config, workdir, stop=None) -> dict[str, dict[int, float]]:
  """Trains; returns all losses in the log, by kind and step."""
  loop.train(config, workdir, stop or Stop())
  return logged(workdir)


def logged(workdir) -> dict[str, dict[int, float]]:
  found = {"train": {}, "eval": {}}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    assert record["step"] not in found[record["kind"]], "a step is logged twice"
    found[record["kind"]][record["step"]] = record["loss"]
  return found


def test_a_run_evaluates_and_saves_on_time_and_leaves_its_config_alone(finished):
  config, asked, workdir = finished
  assert config_to_json(config) == asked
  assert config_to_json(load_run_config(workdir)) == asked
  losses = logged(workdir)
  assert [*losses["train"]] == [1, 2, 3, 4] and [*losses["eval"]] == [2, 4]
  checkpoints = workdir / "checkpoints"
  assert list_steps(checkpoints) == [3, 4]
  meta = read_meta(checkpoints)
  assert (meta["step"], meta["rows"], meta["tokens"]) == (4, 4 * 8, 4 * 8 * 32)
  stored = config_from_json(json.dumps(meta["config"]))
  assert flatten(stored) == flatten(config)


@pytest.mark.faults
def test_a_run_that_is_done_does_only_what_it_owes(finished, tmp_path, capsys):
  workdir = tmp_path / "copy"
  shutil.copytree(finished[2], workdir)
  losses = logged(workdir)
  assert run(load_run_config(workdir), workdir) == losses
  said = capsys.readouterr().out
  assert "nothing to do: step 4 of 4 is reached" in said and "changed" not in said
  # As if it had been killed between the last checkpoint and its evaluation.
  lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
  assert [*logged(workdir)["eval"]] == [2]
  # A signal while it makes up for the evaluation leaves that owed.
  with pytest.raises(Preempted, match=r"step 4 of 4\n.*checkpoints/4\n"):
    run(load_run_config(workdir), workdir, Stop(after=0, in_evaluation=True))
  assert [*logged(workdir)["eval"]] == [2]
  assert run(load_run_config(workdir), workdir) == losses


def test_a_finished_run_keeps_the_config_that_it_was_trained_with(finished, tmp_path):
  workdir = tmp_path / "copy"
  shutil.copytree(finished[2], workdir)
  stored = (workdir / "config.json").read_bytes()
  run(load_run_config(workdir, ["log.every=3", "eval.every=1"]), workdir)
  assert (workdir / "config.json").read_bytes() == stored
  with pytest.raises(ConfigError, match=r"config.model.norm_epsilon=0.1 \(trained"):
    run(load_run_config(workdir, ["model.norm_epsilon=0.1"]), workdir)
  assert (workdir / "config.json").read_bytes() == stored
  (workdir / "config.json").write_bytes(stored.replace(b"1e-05", b"2e-05"))
  with pytest.raises(DataError, match="not the config that its checkpoints"):
    run(finished[0], workdir)  # with --config: the stored one is not read before
  (workdir / "config.json").unlink()
  run(finished[0], workdir)
  assert (workdir / "config.json").read_bytes() == stored


@pytest.mark.faults
def test_other_data_is_refused(finished, tmp_path, monkeypatch):
  workdir = tmp_path / "copy"
  shutil.copytree(finished[2], workdir)
  monkeypatch.setattr("flaxlm.data.feed.Feed.fingerprint", "of other data")
  with pytest.raises(DataError, match="started with other data"):
    run(load_run_config(workdir), workdir)


@pytest.mark.faults
def test_a_stopped_run_has_saved_and_continues_where_it_was(
  finished, config, tmp_path, capsys
):
  with pytest.raises(Preempted, match="stopped after step 2 of 4"):
    run(config, tmp_path, Stop(after=2))
  assert list_steps(tmp_path / "checkpoints") == [2]
  assert not logged(tmp_path)["eval"]  # nothing delays the end of a stopped run
  # The next signal comes in the evaluation after step 4, which is then not logged.
  with pytest.raises(Preempted, match=r"step 4 of 4\n.*checkpoints/4\n"):
    run(config, tmp_path, Stop(after=4, in_evaluation=True))
  assert list_steps(tmp_path / "checkpoints") == [2, 3, 4]
  assert [*logged(tmp_path)["eval"]] == [2]
  config.log.every = 2
  assert run(config, tmp_path) == logged(finished[2])
  assert "changed since step 4: config.log.every 1 -> 2" in capsys.readouterr().out


def test_a_resumed_run_reads_on_after_the_rows_that_it_has_read(
  finished, tmp_path, monkeypatch
):
  class Read(Exception):
    pass

  def read_train(feed, *arguments):
    raise Read(*arguments)

  workdir = tmp_path / "copy"
  shutil.copytree(finished[2], workdir)
  monkeypatch.setattr("flaxlm.data.feed.Feed.read_train", read_train)
  with pytest.raises(Read) as caught:
    run(load_run_config(workdir, ["data.batch_size=16", "num_steps=6"]), workdir)
  assert caught.value.args == (4, 6, 4 * 8)


@pytest.mark.faults
def test_a_crash_of_the_last_evaluation_costs_no_step(finished, tmp_path, monkeypatch):
  """As when it needs more memory than training did; training resumes at step 3."""
  workdir = tmp_path / "copy"
  shutil.copytree(finished[2], workdir)
  shutil.rmtree(workdir / "checkpoints/4")
  hash_files = checkpoint.hash_files

  def slowly(*arguments, **options):
    time.sleep(0.5)  # the save is not done when the evaluation begins
    return hash_files(*arguments, **options)

  def crash(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "hash_files", slowly)
    patch.setattr(loop, "evaluate", crash)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
      run(load_run_config(workdir), workdir)
  assert list_steps(workdir / "checkpoints") == [3, 4]
  assert [*logged(workdir)["eval"]] == [2]
  assert run(load_run_config(workdir), workdir) == logged(finished[2])


@pytest.mark.parametrize(
  ("every", "due"), [(2, [2, 4, 6, 7]), (0, [7]), (7, [7]), (9, [7])]
)
def test_an_evaluation_is_due_on_time_and_at_the_end(tiny, every, due):
  tiny.num_steps, tiny.eval.every = 7, every
  feed = types.SimpleNamespace(validation=[])
  steps = [n for n in range(8) if loop.evaluation_is_due(tiny, feed, n)]
  assert steps == due
  feed.validation = None
  assert not any(loop.evaluation_is_due(tiny, feed, step) for step in range(8))
