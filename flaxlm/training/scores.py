"""Metrics of fine-tuned models, computed on the host from predictions and references.

All are fractions from 0 to 1 (Matthews: from -1), as in GLUE and SQuAD but for their
factor of 100. Where a ratio is 0 / 0 it is 0.
"""

import collections
import re
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_ANSWER = 30  # tokens of an extracted answer (Devlin et al. 2018 use the same)
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
TAG = re.compile(r"([BIES])-(.+)")


def score(
  kind: str,
  predictions: Sequence,
  references: Sequence,
  label_names: Sequence[str] = (),
) -> dict[str, float]:
  """Returns the metrics of a kind of task, by name.

  Args:
    kind: classify (accuracy, macro_f1, matthews; f1 of class 1 if there are two) |
      tag (accuracy; precision, recall, f1 of entities if the names are BIO tags, else
      macro_f1) | choice (accuracy) | qa (exact_match, f1).
    predictions: classify, choice: N classes. tag: an array of classes a sentence.
      qa: N texts, "" for no answer.
    references: the same; qa: a list of right texts for each, empty for no answer.
  """
  if len(predictions) != len(references):
    raise ValueError(f"{len(predictions)} predictions, {len(references)} references")
  if kind == "qa":
    return score_answers(predictions, references)
  if kind == "tag":
    return score_tags(predictions, references, label_names)
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
  return float(np.mean(predicted_N == true_N)) if len(true_N) else 0.0


def confusion(predicted_N: np.ndarray, true_N: np.ndarray, classes: int) -> np.ndarray:
  """Counts by (true class, predicted class), int64 CC."""
  pairs_N = true_N.astype(np.int64) * classes + predicted_N
  return np.bincount(pairs_N, minlength=classes**2).reshape(classes, classes)


def f1_of_classes(counts_CC: np.ndarray) -> np.ndarray:
  """The F1 of each class against the rest, C."""
  hits_C = np.diagonal(counts_CC)
  total_C = counts_CC.sum(0) + counts_CC.sum(1)
  return 2 * hits_C / np.maximum(total_C, 1)


def macro_f1(counts_CC: np.ndarray) -> float:
  """The mean F1 of the classes that occur, predicted or true."""
  occurs_C = counts_CC.sum(0) + counts_CC.sum(1) > 0
  return float(f1_of_classes(counts_CC)[occurs_C].mean()) if occurs_C.any() else 0.0


def matthews(counts_CC: np.ndarray) -> float:
  """The correlation of predicted and true classes (Gorodkin 2004; phi for two)."""
  counts_CC = counts_CC.astype(float)
  total, hits = counts_CC.sum(), np.trace(counts_CC)
  predicted_C, true_C = counts_CC.sum(0), counts_CC.sum(1)
  covariance = hits * total - predicted_C @ true_C
  spread = (total**2 - predicted_C @ predicted_C) * (total**2 - true_C @ true_C)
  return float(covariance / np.sqrt(spread)) if spread else 0.0


def score_tags(predictions, references, label_names: Sequence[str]) -> dict[str, float]:
  """Accuracy of the words, and F1 of entities or of classes."""
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
  """The (type, first, last) of what BIO or BIOES tags mark.

  As in conlleval, I without a beginning, or of another type, begins an entity too.
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
  """Exact match and F1 of words, of the right answer that fits best (SQuAD)."""
  exact = overlap = 0.0
  for predicted, answers in zip(predictions, references, strict=True):
    # As in SQuAD 2: an answer of nothing but articles is no answer to compare with.
    answers = [text for text in answers if normalize(text)] or [""]
    exact += max(normalize(predicted) == normalize(text) for text in answers)
    overlap += max(word_f1(predicted, text) for text in answers)
  count = max(len(predictions), 1)
  return {"exact_match": exact / count, "f1": overlap / count}


def normalize(text: str) -> str:
  """Lower case, without punctuation, articles and surplus space (SQuAD)."""
  return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def word_f1(predicted: str, true: str) -> float:
  """F1 of the bags of normalised words; of empty ones, whether both are empty."""
  ours, theirs = normalize(predicted).split(), normalize(true).split()
  if not ours or not theirs:
    return float(ours == theirs)
  common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
  return 2 * common / (len(ours) + len(theirs))


def best_spans(
  scores_B2L: jax.Array, token_types_BL: jax.Array, max_answer: int = MAX_ANSWER
) -> tuple[jax.Array, jax.Array]:
  """Finds the likeliest answer in each row; rows are windows of a context.

  A span lies in the text of type 1, without the token that ends it, is in order and has
  at most `max_answer` tokens. Span l..l+d is tried for one d after another: L x
  `max_answer` sums, not L x L.

  Args:
    scores_B2L: of each column to be the answer's first and last.
  Returns:
    (columns B2, int32; scores B2, float32: of the span, and of column 0, "no answer").
    Without any possible span the columns are 0 and the score is -inf.
  """
  L = scores_B2L.shape[2]
  inside_BL = token_types_BL == 1
  inside_BL &= jnp.roll(inside_BL, -1, axis=1).at[:, -1].set(False)
  first_BL, last_BL = jnp.where(inside_BL[:, None], scores_B2L, -jnp.inf).swapaxes(0, 1)

  def try_length(best, d):
    # The last column of a span of d + 1 tokens, for each first one; -inf beyond L.
    ends_BL = jnp.where(jnp.arange(L)[None] < L - d, jnp.roll(last_BL, -d, 1), -jnp.inf)
    total_BL = first_BL + ends_BL
    at_B = jnp.argmax(total_BL, axis=1)
    score_B = jnp.max(total_BL, axis=1)
    better_B = score_B > best[0]
    found_B2 = jnp.stack([at_B, at_B + d], axis=1)
    spans_B2 = jnp.where(better_B[:, None], found_B2, best[1])
    return (jnp.where(better_B, score_B, best[0]), spans_B2.astype(jnp.int32)), None

  none_B = jnp.full(scores_B2L.shape[0], -jnp.inf, scores_B2L.dtype)
  start = none_B, jnp.zeros((scores_B2L.shape[0], 2), jnp.int32)
  lengths = jnp.arange(min(max_answer, L))
  (score_B, spans_B2), _ = jax.lax.scan(try_length, start, lengths)
  no_answer_B = scores_B2L[:, 0, 0] + scores_B2L[:, 1, 0]
  return spans_B2, jnp.stack([score_B, no_answer_B], axis=1).astype(jnp.float32)
