"""Metrics against values computed by hand and against their definitions."""

import itertools
import math

import jax
import numpy as np
import pytest

from flaxlm.data.tasks import scores
from flaxlm.data.tasks.scores import entities, score_predictions
from flaxlm.models.heads import best_spans

TWO = ("no", "yes")


def test_two_classes_by_hand():
  # 3 true positives, 1 false negative, 2 false positives, 4 true negatives.
  true = np.array([1] * 4 + [0] * 6)
  predicted = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
  found = score_predictions("classify", predicted, true, TWO)
  assert found == pytest.approx(
    {
      "accuracy": 0.7,
      "f1": 2 * 3 / (2 * 3 + 2 + 1),
      "macro_f1": (6 / 9 + 8 / 11) / 2,
      "matthews": (3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5),
    }
  )
  assert score_predictions("classify", true, true, TWO)["matthews"] == pytest.approx(1)
  assert score_predictions("classify", 1 - true, true, TWO)[
    "matthews"
  ] == pytest.approx(-1)
  # A constant answer scores 0: it knows nothing, and never predicts the other class.
  found = score_predictions("classify", np.zeros_like(true), true, TWO)
  assert (found["matthews"], found["f1"]) == (0, 0)
  assert found["macro_f1"] == pytest.approx((2 * 6 / 16) / 2)


def test_several_classes_against_the_definitions():
  rng = np.random.default_rng(0)
  true = rng.integers(0, 4, 200)
  predicted = np.where(rng.random(200) < 0.6, true, rng.integers(0, 4, 200))
  # A fifth class never occurs: it does not count.
  found = score_predictions("classify", predicted, true, tuple("abcde"))
  assert "f1" not in found
  f1 = []
  for c in range(4):
    precision = np.mean(true[predicted == c] == c)
    recall = np.mean(predicted[true == c] == c)
    f1.append(2 * precision * recall / (precision + recall))
  assert found["macro_f1"] == pytest.approx(np.mean(f1))
  # The correlation of the centred indicators of the classes, all taken together.
  x, y = (np.eye(4)[labels] - np.eye(4)[labels].mean(0) for labels in (predicted, true))
  correlation = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
  assert found["matthews"] == pytest.approx(correlation)
  # Three classes, 21 of 30 right.
  counts = np.array([[8, 1, 1], [2, 6, 2], [1, 2, 7]])
  true, predicted = (np.repeat(i.ravel(), counts.ravel()) for i in np.indices((3, 3)))
  found = score_predictions("classify", predicted, true, tuple("abc"))
  assert found["accuracy"] == pytest.approx(0.7)
  spread = (900 - 11**2 - 9**2 - 10**2) * (900 - 300)
  assert found["matthews"] == pytest.approx((21 * 30 - 300) / math.sqrt(spread))


def test_choice_and_nothing_at_all():
  found = score_predictions("choice", np.array([1, 0, 2]), np.array([1, 0, 0]))
  assert found == pytest.approx({"accuracy": 2 / 3})
  none = np.zeros(0, np.int32)
  assert set(score_predictions("classify", none, none, TWO).values()) == {0}
  assert set(score_predictions("tag", [], [], ("O", "B-X")).values()) == {0}
  assert score_predictions("qa", [], []) == {"exact_match": 0, "f1": 0}
  with pytest.raises(ValueError, match="2 predictions, 1"):
    score_predictions("choice", [1, 2], [1])


@pytest.mark.parametrize(
  "tags, expected",
  [
    ("B-P I-P O B-P", {("P", 0, 1), ("P", 3, 3)}),
    ("B-P B-P I-P", {("P", 0, 0), ("P", 1, 2)}),
    ("I-P I-P O I-L", {("P", 0, 1), ("L", 3, 3)}),  # IOB1: no B where none is needed
    ("B-P I-L I-L", {("P", 0, 0), ("L", 1, 2)}),
    ("S-P B-L E-L I-L", {("P", 0, 0), ("L", 1, 2), ("L", 3, 3)}),
    ("B-P E-P S-P S-P", {("P", 0, 1), ("P", 2, 2), ("P", 3, 3)}),
    ("B-P S-P", {("P", 0, 0), ("P", 1, 1)}),
    ("B-a-b I-a-b", {("a-b", 0, 1)}),
    ("O O", set()),
    ("", set()),
  ],
)
def test_entities(tags, expected):
  assert entities(tags.split()) == expected


def test_tags_by_hand():
  names = ("O", "B-P", "I-P", "B-L")
  true = [[1, 2, 0, 3], [0, 1]]
  predicted = [[1, 2, 0, 1], [0, 1]]
  found = score_predictions("tag", predicted, true, names)
  # Three entities each; the one of another type is wrong.
  assert found == pytest.approx(
    {"accuracy": 5 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
  )
  found = score_predictions(
    "tag", [[1, 0, 0, 3], [0, 0]], true, names
  )  # half an entity does not count
  assert found["f1"] == pytest.approx(2 * 1 / (2 + 3))
  assert found["precision"] == 1 / 2 and found["recall"] == pytest.approx(1 / 3)
  # Entities end with their sentence.
  assert score_predictions("tag", [[1], [2]], [[1], [2]], names)["f1"] == 1
  found = score_predictions(
    "tag", [[1], [2]], [[1], [1]], names
  )  # I begins one as well as B
  assert found["f1"] == 1 and found["accuracy"] == 0.5
  # Part-of-speech tags are not entities.
  found = score_predictions("tag", [[0, 1, 1]], [[0, 1, 0]], ("NOUN", "VERB"))
  assert found == pytest.approx({"accuracy": 2 / 3, "macro_f1": 2 / 3})


def test_answers_by_hand():
  answers = [["the Eiffel Tower", "Eiffel Tower in Paris"], ["308"], [], []]
  predicted = ["An eiffel  tower!", "308 points", "", "x"]
  found = score_predictions("qa", predicted, answers)
  assert found["exact_match"] == pytest.approx(2 / 4)
  assert found["f1"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
  # A word counts as often as it occurs in both.
  found = score_predictions("qa", ["b b b c"], [["b b d"]])
  assert found["f1"] == pytest.approx(2 * 2 / (4 + 3))
  assert scores.normalize("The cat's  (a) theory, an U.S. one") == "cats theory us one"
  assert score_predictions("qa", [""], [["a cat"]]) == {"exact_match": 0, "f1": 0}


def test_best_spans_against_all_spans():
  rng = np.random.default_rng(0)
  B, L = 6, 20
  types = np.zeros((B, L), np.int32)
  # Row 4 has one token of context, row 5 is padding, and row 3's context fills it.
  for row, (first, last) in enumerate([(5, 12), (8, 18), (1, 19), (10, 19), (6, 7)]):
    types[row, first : last + 1] = 1
  for max_answer in (1, 3, 30):
    logits = rng.normal(size=(B, 2, L)).astype(np.float32)
    spans, found = jax.jit(best_spans, static_argnums=2)(logits, types, max_answer)
    assert spans.dtype == np.int32 and spans.shape == found.shape == (B, 2)
    for row in range(B - 1):
      context = np.flatnonzero(types[row])[:-1]  # without the token that ends it
      possible = {
        (a, b): logits[row, 0, a] + logits[row, 1, b]
        for a, b in itertools.product(context, context)
        if a <= b < a + max_answer
      }
      best = max(possible, key=possible.get)
      assert tuple(spans[row].tolist()) == best
      assert found[row, 0] == pytest.approx(possible[best])
      assert found[row, 1] == pytest.approx(logits[row, :, 0].sum())
    assert spans[5].tolist() == [0, 0] and found[5, 0] == -np.inf
