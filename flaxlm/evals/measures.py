"""From log-likelihoods to results: metrics, their errors, chance, paired comparisons.

The same functions measure a model and two dummies that know nothing of language: what
they reach is chance, and it can be far from 1 / the number of options, because right
answers may be short or of common tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flaxlm.data.tasks.scores import score_answers
from flaxlm.errors import DataError
from flaxlm.evals.requests import ScoreRequest
from flaxlm.evals.tasks import Item

_RESAMPLES = 1000


class OptionScores(NamedTuple):
  """What is known of the options of an item, in their order."""

  log_p: np.ndarray  # nats
  greedy: np.ndarray  # bool


def measure_items(
  shape: str, metric: str, items: Sequence[Item], scores: Sequence[OptionScores]
) -> dict[str, np.ndarray]:
  """Returns columns of one number per item.

  They are nats and bytes of the right option (of the whole text: rolling), the words of
  a text (rolling), and whether the item is right: `metric` by the sum of log p (choice,
  schema, pairs) or because all tokens are the likeliest (cloze), `metric`_norm by log p
  per byte of the option (choice). Where k options are equal, each is right by 1/k.
  """
  right = [item.options[item.gold][1] for item in items]
  columns = {
    "nats": [
      -found.log_p[item.gold] for item, found in zip(items, scores, strict=True)
    ],
    "bytes": [len(text.encode()) for text in right],
  }
  if shape in ("choice", "schema", "pairs"):
    pairs = list(zip(items, scores, strict=True))
    columns[metric] = [_share(found.log_p, item.gold) for item, found in pairs]
    if shape == "choice":
      columns[f"{metric}_norm"] = [
        _share(found.log_p / _option_bytes(item), item.gold) for item, found in pairs
      ]
  elif shape == "cloze":
    columns[metric] = [float(found.greedy[0]) for found in scores]
  elif shape == "rolling":
    columns["words"] = [max(len(text.split()), 1) for text in right]
  elif shape != "generate":
    raise ValueError(f"no metrics for shape {shape}")
  return {name: np.array(column, np.float64) for name, column in columns.items()}


def measure_answers(
  items: Sequence[Item], answers: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns the exact match and F1 of each written answer, as SQuAD defines them."""
  found = [
    score_answers([answer], [item.answers])
    for item, answer in zip(items, answers, strict=True)
  ]
  return {name: np.array([x[name] for x in found]) for name in ("exact_match", "f1")}


def _share(log_p: np.ndarray, gold: int) -> float:
  best = log_p == log_p.max()
  return float(best[gold]) / best.sum()


def _option_bytes(item: Item) -> np.ndarray:
  return np.array([max(len(text.strip().encode()), 1) for _, text in item.options])


def summarize_items(shape: str, columns: dict[str, np.ndarray]) -> dict[str, float]:
  """Returns the metrics of columns of items; NAME_se is the standard error of NAME.

  bits_per_byte is a ratio of sums, with the error of a ratio. Of cloze, perplexity is
  per item; of rolling, there are that of bytes and that of words.
  """
  count, nats = len(columns["nats"]), columns["nats"]
  result = {"n": count}
  for name, column in columns.items():
    if name not in ("nats", "bytes", "words"):
      result[name] = float(np.mean(column))
      spread = np.std(column, ddof=1) if count > 1 else 0.0
      result[f"{name}_se"] = float(spread) / math.sqrt(count)
  total = columns["bytes"].sum()
  rate = nats.sum() / total
  residual = nats - rate * columns["bytes"]
  result["bits_per_byte"] = rate / math.log(2)
  error = math.sqrt(float(np.sum(residual**2))) / total
  result["bits_per_byte_se"] = error / math.log(2)
  if shape == "cloze":
    result["perplexity"] = _exp(nats.mean())
  elif shape == "rolling":
    result["byte_perplexity"] = _exp(rate)
    result["word_perplexity"] = _exp(nats.sum() / columns["words"].sum())
  return {
    name: value if name == "n" else float(value) for name, value in result.items()
  }


def _exp(x: float) -> float:
  return math.exp(min(float(x), 700.0))


def uniform_scores(items: Sequence[Item]) -> list[OptionScores]:
  """Returns the scores of a model in which each of 256 bytes is as likely."""
  found = []
  for item in items:
    sizes = np.array([len(text.encode()) for _, text in item.options])
    found.append(OptionScores(-sizes * math.log(256), np.zeros(len(sizes), bool)))
  return found


def unigram_scores(requests: Sequence[Sequence[ScoreRequest]]) -> list[OptionScores]:
  """Returns the scores of a model of token frequencies: those of the task, plus one.

  Args:
    requests: of each item, one per option.
  """
  ids = [np.array([*r.context, *r.continuation]) for rs in requests for r in rs]
  counts = np.bincount(np.concatenate(ids)) + 1
  log_p, likeliest = np.log(counts / counts.sum()), int(np.argmax(counts))
  found = []
  for options in requests:
    texts = [np.array(request.continuation) for request in options]
    greedy = np.array([bool((text == likeliest).all()) for text in texts])
    found.append(OptionScores(np.array([log_p[text].sum() for text in texts]), greedy))
  return found


def compare_items(a: dict, b: dict) -> dict[str, dict[str, float]]:
  """Returns how far result `a` is above result `b`, metric by metric, item by item.

  Both were measured on the same items, so that the error of the difference is that of
  paired numbers. Shares come with an exact McNemar test, bits per byte with the 95%
  interval of a paired bootstrap.

  Args:
    a, b: results as `run_task` returns them.
  Raises:
    DataError: they are of different items.
  """
  if a["items_sha256"] != b["items_sha256"]:
    given = f"{a['metrics']['n']} and {b['metrics']['n']} items"
    raise DataError("results of different items do not compare", given, "the same ones")
  ours, theirs = ({k: np.array(v) for k, v in x["items"].items()} for x in (a, b))
  found = {}
  for name in ours:
    if name not in ("nats", "bytes", "words"):
      found[name] = _compare_shares(ours[name], theirs[name])
  draw, size = np.random.default_rng(0), len(ours["nats"])
  gaps = (ours["nats"] - theirs["nats"]) / math.log(2)
  sums = []
  for _ in range(_RESAMPLES):
    chosen = draw.integers(0, size, size)
    sums.append(gaps[chosen].sum() / ours["bytes"][chosen].sum())
  low, high = np.quantile(sums, [0.025, 0.975])
  found["bits_per_byte"] = {
    "difference": float(gaps.sum() / ours["bytes"].sum()),
    "low": float(low),
    "high": float(high),
  }
  return found


def _compare_shares(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  from scipy.special import bdtr  # P(X <= k) of the binomial distribution

  gaps = ours - theirs
  better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
  spread = np.std(gaps, ddof=1) if len(gaps) > 1 else 0.0
  p = min(2 * bdtr(min(better, worse), better + worse, 0.5), 1.0)
  return {
    "difference": float(gaps.mean()),
    "se": float(spread) / math.sqrt(len(gaps)),
    "better": better,
    "worse": worse,
    "p": float(p),
  }
