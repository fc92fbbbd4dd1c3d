"""Runs a task on a model: texts to segments, segments to scores, scores to a result.

A result is plain JSON. It keeps the numbers of every item, so that checkpoints can be
compared item by item.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.evals.measures import (
  OptionScores,
  measure_answers,
  measure_items,
  summarize_items,
  uniform_scores,
  unigram_scores,
)
from flaxlm.evals.requests import (
  MaskedWords,
  ScoreRequest,
  TextSegment,
  causal_segments,
  empty_context,
  encode_pairs,
  rolling_requests,
  with_prefix,
)
from flaxlm.evals.scoring import Predictions, Scorer, score_segments
from flaxlm.evals.tasks import Item, Task, TaskFile, item_hash
from flaxlm.inference.language_model import LanguageModel
from flaxlm.inference.text import tokenize_prompt
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.sharding import current_layout
from flaxlm.tokenizer.files import AnyTokenizer

_SHORTEST_ROW = 128  # tokens
_CPU_BATCH_TOKENS = 4096  # per device
_FUSED_BATCH_TOKENS = 32768


@dataclasses.dataclass(frozen=True)
class PreparedTask:
  """A task as segments for one tokenizer and kind of model."""

  task: Task
  method: str  # loglikelihood | pll: of masked models, not comparable with the other
  requests: list[list[list[ScoreRequest]]]  # by item, option, window
  segments: list[TextSegment]
  owners: list[int]  # the option that each segment belongs to, counted over all items
  merged: int  # pairs of which a token spanned the join
  cut: int  # requests that lost the beginning of their context

  @property
  def longest(self) -> int:
    """Tokens in the longest segment."""
    return max(len(segment.tokens) for segment in self.segments)


def prepare_task(
  task: Task, tokenizer: AnyTokenizer, config: TransformerConfig, length: int
) -> PreparedTask:
  """Returns a task as segments of at most `length` tokens.

  Raises:
    ConfigError: a model of this kind cannot be asked this.
    DataError: a continuation is longer than that; it names the item.
  """
  shape, masked = task.file.shape, config.head == "mlm"
  if masked and shape in ("rolling", "generate"):
    needed = "a causal model, for a task of shape " + shape
    raise ConfigError("config.eval.tasks", f"{task.name}, with a masked model", needed)
  if config.head not in ("lm", "mlm"):
    needed = "a model that predicts tokens (model.head lm or mlm)"
    raise ConfigError("config.eval.tasks", f"model.head={config.head}", needed)
  requests, merged = _encode_items(task, tokenizer, masked, length)
  make = MaskedWords(tokenizer).segments if masked else causal_segments
  segments, owners, cut, owner = [], [], 0, 0
  for item, options in zip(task.items, requests, strict=True):
    where = f"an option of {item.place} (task {task.name})"
    for windows in options:
      for request in windows:
        made = make(request, length, where)
        segments += made
        owners += [owner] * len(made)
        size = len(request.context) + len(request.continuation)
        cut += size > len(made[0].tokens) + (not masked)
      owner += 1
  method = "pll" if masked else "loglikelihood"
  return PreparedTask(task, method, requests, segments, owners, merged, cut)


def _encode_items(
  task: Task, tokenizer: AnyTokenizer, masked: bool, length: int
) -> tuple[list[list[list[ScoreRequest]]], int]:
  """Returns (requests by item, option and window; pairs that were merged)."""
  pairs = [pair for item in task.items for pair in item.options]
  if task.file.shape == "rolling":
    texts = tokenizer.encode_batch([text for _, text in pairs])
    start, merged = empty_context(tokenizer), 0
    windows = [rolling_requests(ids.tolist(), start, length) for ids in texts]
  else:
    requests, merged = encode_pairs(tokenizer, pairs)
    if not masked:
      requests = [with_prefix(tokenizer, request) for request in requests]
    windows = [[request] for request in requests]
  found, first = [], 0
  for item in task.items:
    found.append(windows[first : first + len(item.options)])
    first += len(item.options)
  return found, merged


def fitting_length(longest: int) -> int:
  """Returns the length of the rows that hold segments of up to `longest` tokens.

  Powers of two, so that tasks share a few compiled programs. It depends on nothing
  else, so that a task gets the same numbers whatever other tasks are asked.
  """
  length = _SHORTEST_ROW
  while length < longest:
    length *= 2
  return length


def batch_rows(length: int) -> int:
  """Returns the rows per batch, under `use_mesh`; more do not help a CPU."""
  layout = current_layout()
  ways, platform = layout.ways("batch"), layout.mesh.devices.flat[0].platform
  tokens = _CPU_BATCH_TOKENS if platform == "cpu" else _FUSED_BATCH_TOKENS
  return ways * max(tokens // length, 1)


def run_task(
  prepared: PreparedTask,
  scorer: Scorer,
  model: Transformer,
  known: Sequence[Predictions] = (),
  on_batch: Callable[[Predictions], None] = lambda predictions: None,
  should_stop: Callable[[], bool] = lambda: False,
  write: Callable[[Sequence[str]], list[str]] | None = None,
) -> dict | None:
  """Returns the result of a task; None if it was stopped before any item was done.

  Args:
    known, on_batch, should_stop: as in `score_segments`.
    write: prompts -> texts, for tasks of shape generate.
  """
  task, found = prepared.task, prepared
  scores = score_segments(
    scorer, model, found.segments, found.owners, known, on_batch, should_stop
  )
  items, options, requests, first = [], [], [], 0
  for item, asked in zip(task.items, found.requests, strict=True):
    own = slice(first, first + len(item.options))
    first = own.stop
    if scores.complete[own].all():
      items.append(item)
      options.append(OptionScores(scores.log_p[own], scores.greedy[own]))
      requests.append([_join(windows) for windows in asked])
  if not items:
    return None
  shape, metric = task.file.shape, task.file.metric
  columns = measure_items(shape, metric, items, options)
  chance = {}
  for name, dummy in (
    ("uniform_bytes", uniform_scores(items)),
    ("unigram", unigram_scores(requests)),
  ):
    chance[name] = summarize_items(shape, measure_items(shape, metric, items, dummy))
  if shape == "generate":
    assert write is not None, "answers need a writer"
    columns |= measure_answers(items, write([item.options[0][0] for item in items]))
  return {
    "task": task.name,
    "task_sha256": task.sha256,
    "shape": shape,
    "method": found.method,
    "items_sha256": item_hash(items),
    "metrics": summarize_items(shape, columns),
    "chance": chance,
    "groups": _groups(shape, items, columns),
    "merged_tokens": found.merged,
    "cut_contexts": found.cut,
    "padding": scores.padding,
    "items": {name: column.tolist() for name, column in columns.items()},
  }


def _join(windows: list[ScoreRequest]) -> ScoreRequest:
  """Returns the request of a whole option: the continuations of its windows."""
  ids = [i for request in windows for i in request.continuation]
  return ScoreRequest(windows[0].context, ids)


def _groups(
  shape: str, items: Sequence[Item], columns: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
  """Returns the metrics of the items of each group, by its name."""
  names = np.array([item.group for item in items])
  return {
    str(name): summarize_items(shape, {k: v[names == name] for k, v in columns.items()})
    for name in np.unique(names)
    if name
  }


def write_answers(
  loaded: LanguageModel, file: TaskFile, prompts: Sequence[str]
) -> list[str]:
  """Returns the likeliest text after each prompt, up to the task's stop text.

  A prompt that leaves no room for an answer loses its beginning.

  Raises:
    ConfigError: the model's context has no room for an answer.
  """
  room = loaded.config.max_len - file.max_tokens
  if room < 1:
    needed = f"more than the {file.max_tokens} tokens of an answer"
    raise ConfigError("config.model.max_len", loaded.config.max_len, needed)
  ids = [tokenize_prompt(loaded.tokenizer, text)[-room:] for text in prompts]
  order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
  stop = (file.stop,) if file.stop else ()
  # Writing changes the form of the weights: those that score keep theirs.
  texts = dataclasses.replace(loaded).generate(
    [ids[i] for i in order], max_tokens=file.max_tokens, temperature=0, stop=stop
  )
  return [text.strip() for _, text in sorted(zip(order, texts, strict=True))]
