"""Tasks while a model trains: a sample of each, within a budget of seconds.

The loop is handed `open_tasks`, because it is below this room. Tasks are read, and
everything that could be wrong with them is said, before the first step.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.evals.run import PreparedTask, prepare_task, run_task
from flaxlm.evals.scoring import Scorer
from flaxlm.evals.tasks import open_task
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.tokenizer.files import open_tokenizer


def open_tasks(config, tokenizer: bytes) -> Callable[..., dict[str, float] | None]:
  """Returns `score(model, should_stop, on_batch)`, to call under the run's mesh.

  It returns numbers by "task/metric", or None if `should_stop` said so.

  Args:
    config: resolved; its batches give the shape of the rows.
    tokenizer: the model's, as the bytes of its file.
  Raises:
    ConfigError, MissingInputError, DataError: a task cannot be asked of this model.
  """
  if not tokenizer:
    needed = "data with a tokenizer: tasks are texts"
    raise ConfigError("config.eval.tasks", "a run without a tokenizer", needed)
  opened, shape = open_tokenizer(tokenizer), TransformerConfig(**config.model)
  knobs, length = config.eval, config.data.seq_len
  prepared = []
  for name in knobs.tasks:
    task = open_task(name, knobs.task_data)
    if task.file.shape == "generate":
      needed = "tasks that are scored, not written, while the model trains"
      hint = f"flaxlm evaluate --tasks={task.name} after it"
      raise ConfigError("config.eval.tasks", f"{task.name} (generate)", needed, hint)
    prepared.append(prepare_task(task, opened, shape, length))
  return _TaskScores(prepared, config.data.batch_size, length, opened.vocab_size, knobs)


class _TaskScores:
  """What `open_tasks` returns; its program is compiled at the first call."""

  def __init__(self, prepared, batch_rows: int, length: int, vocab_size: int, knobs):
    self.prepared: list[PreparedTask] = prepared
    self._shape = batch_rows, length, vocab_size
    self._seconds, self._scorer = knobs.task_seconds, None

  def __call__(
    self,
    model: Transformer,
    should_stop: Callable[[], bool],
    on_batch: Callable[[], None],
  ) -> dict[str, float] | None:
    if self._scorer is None:
      self._scorer = Scorer(model, *self._shape)
      self._scorer.warm_up(model)
    start, found = time.monotonic(), {}
    for number, task in enumerate(self.prepared):
      left = self._seconds - (time.monotonic() - start)
      share = left / (len(self.prepared) - number) if self._seconds else float("inf")
      budget, stopped = _Budget(share), []

      def stop(budget=budget, stopped=stopped) -> bool:
        on_batch()
        stopped.append(should_stop())
        return budget.is_spent() or stopped[-1]

      result = run_task(task, self._scorer, model, should_stop=stop)
      if any(stopped):
        return None
      if result is not None:
        found |= _flatten(result)
    return found


class _Budget:
  """Says after each batch whether another one would go beyond the seconds.

  Process 0 decides for all: their clocks differ.
  """

  def __init__(self, seconds: float):
    self._seconds, self._start, self._batches = seconds, time.monotonic(), 0

  def is_spent(self) -> bool:
    self._batches += 1
    used = time.monotonic() - self._start
    spent = used + used / self._batches / 2 > self._seconds
    if jax.process_count() == 1:
      return spent
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(spent)))


def _flatten(result: dict) -> dict[str, float]:
  """Returns the metrics of a result, and chance, by "task/metric"."""
  name, flat = result["task"], dict(result["metrics"])
  for row, metrics in result["chance"].items():
    flat |= {
      f"{key}_{row}": value
      for key, value in metrics.items()
      if key != "n" and not key.endswith("_se")
    }
  return {f"{name}/{key}": value for key, value in flat.items()}
