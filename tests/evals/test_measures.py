"""Metrics against numbers worked out by hand, chance rows, paired comparisons."""

import math

import numpy as np
import pytest

from flaxlm.errors import DataError
from flaxlm.evals.measures import (
  OptionScores,
  compare_items,
  measure_answers,
  measure_items,
  summarize_items,
  uniform_scores,
  unigram_scores,
)
from flaxlm.evals.requests import ScoreRequest
from flaxlm.evals.tasks import Item, open_task


def scores(*options, greedy=()):
  flags = greedy or [False] * len(options)
  return OptionScores(np.array(options, float), np.array(flags))


TWO = [
  Item("1", (("q", " ab"), ("q", " abcdef")), gold=1),
  Item("2", (("q", " abc"), ("q", " xyz")), gold=0),
]


def test_the_likeliest_option_is_right_and_equal_ones_share():
  columns = measure_items("choice", "acc", TWO, [scores(-4, -6), scores(-2, -2)])
  assert columns["acc"].tolist() == [0, 0.5]
  assert columns["acc_norm"].tolist() == [1, 0.5]  # -4/2 < -6/6
  assert columns["nats"].tolist() == [6, 2] and columns["bytes"].tolist() == [7, 4]
  result = summarize_items("choice", columns)
  assert result["n"] == 2 and result["acc"] == 0.25 and result["acc_norm"] == 0.75
  assert result["acc_se"] == pytest.approx(0.25)  # sd of (0, 0.5) is 0.354
  assert result["bits_per_byte"] == pytest.approx(8 / 11 / math.log(2))


def test_a_cloze_is_right_if_each_token_is_the_likeliest():
  items = [Item("1", (("a", " b"),)), Item("2", (("a", " b"),))]
  found = [scores(-1, greedy=[True]), scores(-3, greedy=[False])]
  result = summarize_items("cloze", measure_items("cloze", "acc", items, found))
  assert result["acc"] == 0.5 and result["perplexity"] == pytest.approx(math.e**2)


def test_a_text_has_bits_per_byte_and_perplexities_of_bytes_and_words():
  items = [Item("1", (("", "one two three"),)), Item("2", (("", "four"),))]
  columns = measure_items("rolling", "acc", items, [scores(-13), scores(-4)])
  result = summarize_items("rolling", columns)
  assert result["bits_per_byte"] == pytest.approx(1 / math.log(2))
  assert result["bits_per_byte_se"] == pytest.approx(0, abs=1e-9)
  assert result["byte_perplexity"] == pytest.approx(math.e)
  assert result["word_perplexity"] == pytest.approx(math.exp(17 / 4))
  assert "acc" not in result


def test_answers_are_compared_as_squad_does():
  items = [Item("1", (("q", " x"),), answers=("The Cat", "dog"))] * 2
  columns = measure_answers(items, ["cat.", "a dog ran"])
  assert columns["exact_match"].tolist() == [1, 0]
  assert columns["f1"].tolist() == [1, pytest.approx(2 / 3)]


def test_the_metric_may_have_another_name():
  columns = measure_items("pairs", "stereotype", TWO[1:], [scores(-1, -2)])
  assert columns["stereotype"].tolist() == [1] and "acc" not in columns


def test_unigrams_know_how_often_a_token_occurs_in_the_task():
  requests = [[ScoreRequest([], [3, 3]), ScoreRequest([3], [4])]]
  ((log_p, greedy),) = unigram_scores(requests)
  # Counts plus one: 1 1 1 4 2, of 9.
  np.testing.assert_allclose(log_p, [2 * math.log(4 / 9), math.log(2 / 9)])
  assert greedy.tolist() == [True, False]


def test_short_answers_make_chance_better_than_one_half(corpora):
  items = open_task("copa", corpora / "from_repos/labelled").items
  columns = measure_items("choice", "acc", items, uniform_scores(items))
  result = summarize_items("choice", columns)
  assert result["acc"] == pytest.approx(0.59, abs=0.03)
  assert result["bits_per_byte"] == pytest.approx(8)


def result(nats, acc, items_sha256="same"):
  columns = {"nats": nats, "bytes": [10] * len(nats), "acc": acc}
  metrics = {"n": len(nats)}
  return {"items": columns, "metrics": metrics, "items_sha256": items_sha256}


def test_checkpoints_are_compared_item_by_item():
  draw = np.random.default_rng(0)
  easy = draw.random(400) < 0.3
  ours, theirs = easy | (draw.random(400) < 0.2), easy | (draw.random(400) < 0.02)
  nats = draw.normal(20, 8, 400)  # items differ far more than the models
  a, b = result(nats - 1, ours * 1.0), result(nats, theirs * 1.0)
  found = compare_items(a, b)
  assert found["acc"]["difference"] == pytest.approx(ours.mean() - theirs.mean())
  assert found["acc"]["better"] == (ours & ~theirs).sum()
  assert found["acc"]["se"] < 0.03 and found["acc"]["p"] < 0.01
  gap = -0.1 / math.log(2)
  assert found["bits_per_byte"]["difference"] == pytest.approx(gap)
  assert (
    found["bits_per_byte"]["low"] <= gap + 1e-9 <= found["bits_per_byte"]["high"] + 1e-8
  )
  same = compare_items(a, a)["acc"]
  assert (same["difference"], same["p"], same["better"]) == (0, 1, 0)
  with pytest.raises(DataError, match="different items"):
    compare_items(a, result(nats, theirs * 1.0, "others"))
