"""Tasks on saved models: each result is a file, named after the weights and the task.

So nothing is computed twice. The predictions of a task in progress are kept too, batch
by batch, and a killed evaluation ends with the same bytes as one that was not.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import flaxlm
from flaxlm.evals.run import (
  batch_rows,
  fitting_length,
  prepare_task,
  run_task,
  write_answers,
)
from flaxlm.evals.scoring import Predictions, Scorer
from flaxlm.evals.tasks import Task
from flaxlm.files import write_atomically, writing
from flaxlm.inference.language_model import LanguageModel
from flaxlm.json_files import parse_json, read_json
from flaxlm.parallel.sharding import use_mesh
from flaxlm.runs.directory import RunFiles, split_address
from flaxlm.training.manifest import hash_files, read_manifest


def weights_sha256(directory: str | os.PathLike, step: int | None) -> str:
  """Returns a hash of the weights that a result is about.

  Args:
    directory: of a run, or of a Hugging Face model; a checkpoint of a run will do.
    step: of the run's checkpoint; None for a Hugging Face model.
  """
  directory, _ = split_address(os.fspath(directory))
  files = RunFiles(directory)
  if step is not None:
    manifest = read_manifest(files.checkpoints / str(step))
    content = [manifest["files"], files.config.read_text("utf-8")]
  else:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    content = hash_files(directory, sync=False, names=names)
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def result_path(output: pathlib.Path, weights: str, task: Task) -> pathlib.Path:
  """Returns the file of a result."""
  return output / f"{task.name}-{weights[:12]}-{task.sha256[:12]}.json"


def read_result(output: pathlib.Path, weights: str, task: Task) -> dict | None:
  """Returns the result of these weights on a task, if there is one."""
  path = result_path(output, weights, task)
  if not path.is_file():
    return None
  result = read_json(path, {"weights_sha256": str, "task_sha256": str})
  same = (result["weights_sha256"], result["task_sha256"]) == (weights, task.sha256)
  return result if same else None


def evaluate_saved(
  loaded: LanguageModel,
  weights: str,
  tasks: Sequence[Task],
  output: pathlib.Path,
  on_batch: Callable[[], None] = lambda: None,
) -> Iterator[dict]:
  """Yields the result of each task, as soon as it is there.

  Args:
    weights: `weights_sha256` of the model.
    output: directory of the results; it is made if need be.
    on_batch: called after each batch that was computed.
  """
  with writing(output):
    output.mkdir(parents=True, exist_ok=True)
  scorers: dict[int, Scorer] = {}
  for task in tasks:
    result = read_result(output, weights, task)
    if result is None:
      with use_mesh(loaded.mesh, loaded.rules):
        result = _evaluate(loaded, weights, task, output, scorers, on_batch)
    yield result


def _evaluate(
  loaded: LanguageModel, weights: str, task: Task, output, scorers, on_batch
) -> dict:
  """Computes one result and writes it."""
  tokenizer, config = loaded.tokenizer, loaded.config
  prepared = prepare_task(task, tokenizer, config, config.max_len)
  length = fitting_length(prepared.longest)
  if length not in scorers:
    rows = batch_rows(length)
    scorers[length] = Scorer(loaded.model, rows, length, tokenizer.vocab_size)
  path = result_path(output, weights, task)
  with _kept_predictions(path, scorers[length]) as (known, keep):

    def keep_and_tell(predictions: Predictions) -> None:
      keep(predictions)
      on_batch()

    result = run_task(
      prepared,
      scorers[length],
      loaded.model,
      known,
      keep_and_tell,
      write=lambda prompts: write_answers(loaded, task.file, prompts),
    )
    result = {
      "flaxlm": flaxlm.__version__,
      "step": loaded.step,
      "weights_sha256": weights,
      **result,
    }
    write_atomically(path, json.dumps(result) + "\n")
  return result


@contextlib.contextmanager
def _kept_predictions(path: pathlib.Path, scorer: Scorer):
  """Yields (predictions of a killed evaluation, what keeps further ones).

  They are one batch per line, and are removed when the result is written.
  """
  partial = path.with_suffix(".partial.jsonl")
  shape = {"rows": scorer.batch_rows, "length": scorer.length}
  known: list[Predictions] = []
  if partial.is_file():
    lines = partial.read_text("utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill tears the last
    values = [parse_json(line, partial, finite=False) for line in whole]
    if values and values[0] == shape:
      known = [_predictions(value) for value in values[1:]]
  with partial.open("w", encoding="utf-8") as file:

    def write(value: dict) -> None:
      file.write(json.dumps(value) + "\n")
      file.flush()

    def keep(found: Predictions) -> None:
      write({"log_p": found.log_p.tolist(), "greedy": found.greedy.tolist()})

    write(shape)
    for found in known:
      keep(found)
    yield known, keep
  partial.unlink()


def _predictions(line: dict) -> Predictions:
  # Each float32 is written as the float64 of the same value: nothing is lost.
  return Predictions(
    np.array(line["log_p"], np.float32), np.array(line["greedy"], bool)
  )


def watch_steps(
  list_steps: Callable[[], list[int]], last: int, seconds: float
) -> Iterator[int]:
  """Yields the steps of checkpoints as they appear, up to step `last`.

  Args:
    list_steps: returns the steps that there are now.
    seconds: between two looks.
  """
  done: set[int] = set()
  while True:
    for step in list_steps():
      if step not in done:
        done.add(step)
        yield step
    if done and max(done) >= last:
      return
    time.sleep(seconds)
