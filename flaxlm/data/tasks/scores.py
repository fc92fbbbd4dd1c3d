"""Metrics of fine-tuned models, computed on the host from predictions and references.

All are fractions from 0 to 1 (Matthews: from -1): those of GLUE and SQuAD, divided by
100. 0 / 0 counts as 0.
"""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
TAG = re.compile(r"([BIES])-(.+)")


def score_predictions(
  kind: str,
  predictions: Sequence,
  references: Sequence,
  label_names: Sequence[str] = (),
) -> dict[str, float]:
  """Returns the metrics of a task, by name.

  Args:
    kind: classify (accuracy, macro_f1, matthews; f1 of class 1 if there are two) |
      tag (accuracy; precision, recall, f1 of entities if the names are BIO tags, else
      macro_f1) | choice (accuracy) | qa (exact_match, f1).
    predictions: classify, choice: N classes. tag: an array of classes per sentence.
      qa: N texts, "" for no answer.
    references: the same, but for qa a list of right texts each, empty for no answer.
  """
  if len(predictions) != len(references):
    raise ValueError(f"{len(predictions)} predictions, {len(references)} references")
  if kind == "qa":
    return score_answers(predictions, references)
  if kind == "tag":
    return score_tags(predictions, references, label_names)
  if kind not in ("classify", "choice"):
    raise ValueError(f"no metrics for a task of kind {kind}")
  predicted_N, true_N = np.asarray(predictions), np.asarray(references)
  if kind == "choice":
    return {"accuracy": accuracy(predicted_N, true_N)}
  counts_CC = confusion(predicted_N, true_N, len(label_names))
  result = {
    "accuracy": accuracy(predicted_N, true_N),
    "macro_f1": macro_f1(counts_CC),
    "matthews": matthews(counts_CC),
  }
  if len(label_names) == 2:
    result["f1"] = float(f1_of_classes(counts_CC)[1])
  return result


def accuracy(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
  """Returns the fraction of right predictions."""
  return float(np.mean(predicted_N == true_N)) if len(true_N) else 0.0


def confusion(predicted_N: np.ndarray, true_N: np.ndarray, classes: int) -> np.ndarray:
  """Returns the counts of (true class, predicted class), int64 CC."""
  pairs_N = true_N.astype(np.int64) * classes + predicted_N
  return np.bincount(pairs_N, minlength=classes**2).reshape(classes, classes)


def f1_of_classes(counts_CC: np.ndarray) -> np.ndarray:
  """Returns the F1 of each class against the rest, C."""
  hits_C = np.diagonal(counts_CC)
  total_C = counts_CC.sum(0) + counts_CC.sum(1)
  return 2 * hits_C / np.maximum(total_C, 1)


def macro_f1(counts_CC: np.ndarray) -> float:
  """Returns the mean F1 of the classes that were predicted or true at least once."""
  occurs_C = counts_CC.sum(0) + counts_CC.sum(1) > 0
  return float(f1_of_classes(counts_CC)[occurs_C].mean()) if occurs_C.any() else 0.0


def matthews(counts_CC: np.ndarray) -> float:
  """Returns the Matthews correlation of the classes (Gorodkin 2004; phi for two)."""
  counts_CC = counts_CC.astype(float)
  total, hits = counts_CC.sum(), np.trace(counts_CC)
  predicted_C, true_C = counts_CC.sum(0), counts_CC.sum(1)
  covariance = hits * total - predicted_C @ true_C
  spread = (total**2 - predicted_C @ predicted_C) * (total**2 - true_C @ true_C)
  return float(covariance / np.sqrt(spread)) if spread else 0.0


def score_tags(predictions, references, label_names: Sequence[str]) -> dict[str, float]:
  """Returns the accuracy of words, and scores of entities or of classes."""
  predicted_N = np.concatenate([*map(np.asarray, predictions), np.zeros(0, int)])
  true_N = np.concatenate([*map(np.asarray, references), np.zeros(0, int)])
  predicted_N, true_N = predicted_N.astype(int), true_N.astype(int)
  result = {"accuracy": accuracy(predicted_N, true_N)}
  if not all(name == "O" or TAG.fullmatch(name) for name in label_names):
    counts_CC = confusion(predicted_N, true_N, len(label_names))
    return result | {"macro_f1": macro_f1(counts_CC)}
  found = hits = wanted = 0
  for predicted, true in zip(predictions, references, strict=True):
    ours = entities([label_names[i] for i in predicted])
    theirs = entities([label_names[i] for i in true])
    hits += len(ours & theirs)
    found, wanted = found + len(ours), wanted + len(theirs)
  return result | {
    "precision": hits / max(found, 1),
    "recall": hits / max(wanted, 1),
    "f1": 2 * hits / max(found + wanted, 1),
  }


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
  """Returns the (type, first, last) of each entity in BIO or BIOES tags.

  As in conlleval, an I after O, or after another type, begins an entity too.
  """
  spans, kind, first, ended = set(), "", 0, True
  for i, tag in enumerate([*tags, "O"]):
    match = TAG.fullmatch(tag)
    place, new = match.groups() if match else ("O", "")
    if kind and (ended or new != kind or place in "BSO"):
      spans.add((kind, first, i - 1))
      kind = ""
    if new and not kind:
      kind, first = new, i
    ended = place in "ES"
  return spans


def score_answers(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Returns exact match and word F1 with the right answer that fits best (SQuAD)."""
  exact = overlap = 0.0
  for predicted, answers in zip(predictions, references, strict=True):
    # As in SQuAD 2, an answer of articles alone is not compared with.
    answers = [text for text in answers if normalize(text)] or [""]
    exact += max(normalize(predicted) == normalize(text) for text in answers)
    overlap += max(word_f1(predicted, text) for text in answers)
  count = max(len(predictions), 1)
  return {"exact_match": exact / count, "f1": overlap / count}


def normalize(text: str) -> str:
  """Lower-cases a text and drops punctuation, articles and extra spaces (SQuAD)."""
  return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def word_f1(predicted: str, true: str) -> float:
  """Returns the F1 of two bags of normalised words; 1 if both are empty."""
  ours, theirs = normalize(predicted).split(), normalize(true).split()
  if not ours or not theirs:
    return float(ours == theirs)
  common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
  return 2 * common / (len(ours) + len(theirs))
