"""Class numbers never travel without their names."""

import json

import numpy as np
import pytest

from flaxlm.data.tasks.examples import UNTAUGHT
from flaxlm.data.tasks.labels import Labels, same_classes
from flaxlm.data.text.tables import Record
from flaxlm.errors import ConfigError, DataError
from tests.data.tasks.test_examples import label_file, load, make_task

HERE = Record({}, "x.csv", "line", 7)


def numbers(values, labels=None, column="label"):
  """Returns (names, final number of each value) as for a whole file of records."""
  labels = labels or Labels()
  given = [labels.number(value, HERE, column) for value in values]
  final = labels.close()
  return labels.names, final[given].tolist()


def owned(names=("pos", "neg"), **changes):
  """The classes of a model, which are not in sorted order."""
  return Labels(names, owner="config.init_from=runs/a", **changes)


def test_a_model_keeps_the_order_of_its_classes():
  assert numbers(["neg", "pos", "neg"], owned()) == (("pos", "neg"), [1, 0, 1])
  assert numbers(["neg"], owned()) == (("pos", "neg"), [1])  # one of them is enough
  labels = owned()
  numbers(["neg", "pos"], labels)
  assert labels.number("pos", HERE, "label") == 0  # of the validation records
  assert labels.number(1, HERE, "label") == 1
  with pytest.raises(DataError, match="unknown label 'bad'"):
    labels.number("bad", HERE, "label")


@pytest.mark.parametrize("found", [["good", "bad"], ["pos", "neutral"], ["Neg", "Pos"]])
def test_other_names_than_the_models_are_refused_with_both_lists(found):
  with pytest.raises(ConfigError) as error:
    numbers(found, owned())
  text = str(error.value)
  assert " ".join(sorted(found)) in text and "pos neg" in text
  assert "runs/a" in text and f"--config.task.labels={','.join(sorted(found))}" in text


@pytest.mark.parametrize("names", [("pos", "neg"), ("LABEL_0", "LABEL_1")])
def test_numbers_stand_for_classes_that_somebody_has_numbered(names):
  assert numbers([1, "0"], owned(names)) == (names, [1, 0])
  assert numbers([1, "0"], Labels(names)) == (names, [1, 0])
  for labels in (owned(names, numbered=False), Labels(names, numbered=False)):
    with pytest.raises((ConfigError, DataError), match=r"task\.labels"):
      numbers([1, "0"], labels)
  with pytest.raises(ConfigError, match=f"{names[0]} {names[1]}"):
    numbers([1, 2], owned(names))
  # The classes of this model are numbers: it has no class 3 because it has four.
  with pytest.raises(ConfigError):
    numbers([3], owned(("5", "6", "7", "8")))


@pytest.mark.parametrize("value", ["9" * 5000, "-0", "\uff11", "+1", "1e0", "2"])
def test_what_only_looks_like_the_number_of_a_class_is_none(value):
  with pytest.raises(DataError, match="unknown label"):
    numbers([value], Labels(("pos", "neg")))


def test_numbers_are_never_matched_with_sorted_names(tmp_path):
  train = label_file(tmp_path / "train.jsonl", ["neg", "pos"])
  other = label_file(tmp_path / "other.jsonl", [1, 0])
  task = make_task("classify", train, validation_path=str(other))
  match = r"other\.jsonl line 1(?s:.*)neg pos(?s:.*)task\.labels=neg,pos"
  with pytest.raises(DataError, match=match):
    load(task)
  declared = make_task(
    "classify", train, validation_path=str(other), labels=("neg", "pos")
  )
  assert load(declared)[1].references.tolist() == [1, 0]
  train, _ = load(make_task("classify", train))
  assert not train.numbered and load(declared)[0].numbered
  # And not the reverse.
  task = make_task("classify", other, validation_path=str(tmp_path / "train.jsonl"))
  with pytest.raises(DataError, match="unknown label 'neg'"):
    load(task)


@pytest.mark.parametrize(
  "values",
  [[0, -1, 1], ["neg", "-1", "pos"], [-1, -1, 0], [-100, 0, 1], [-1, 2], [-1, 0, 1, 2]],
)
def test_no_label_is_no_class(values):
  """-1 marks unlabelled records in TFDS and GLUE, -100 ignored ones in transformers."""
  with pytest.raises(DataError, match=r"x\.csv line 7(?s:.*)label: -1(?s:.*)no label"):
    numbers(values)
  known = Labels([str(value) for value in dict.fromkeys(values)])
  assert numbers(values, known)[0] == known.names  # a class after all
  with pytest.raises(DataError, match=r"label: -1(?s:.*)no label"):
    numbers([*values, "0"], owned(("no", "yes")))


def test_two_signs_are_two_classes():
  assert numbers([-1, 1, -1]) == (("-1", "1"), [0, 1, 0])


@pytest.mark.parametrize("value", ["nan", "NaN", "0.5", "-1.25", "3."])
def test_a_measure_is_no_class(value):
  with pytest.raises(
    DataError, match=r"line 7(?s:.*)task\.labels=.*if all are classes"
  ):
    numbers(["1", value])
  assert numbers(["1", value], Labels(("1", value)))[1] == [0, 1]


def test_white_space_around_a_name_means_nothing():
  assert numbers(["pos ", "neg", "pos", "\tneg"]) == (("neg", "pos"), [1, 0, 1, 0])
  assert numbers([" pos"], Labels((" pos ", "neg"))) == (("pos", "neg"), [0])
  with pytest.raises(DataError, match="no label"):
    numbers([" "])


@pytest.mark.parametrize(
  "one, two",
  [("Pos", "pos"), ("a b", "a  b"), ("caf\u00e9", "cafe\u0301"), ("1", "01"),
   ("B-PER", "b-per"), ("pos", "po\u200bs")],
)  # fmt: skip
def test_two_spellings_of_a_class_are_refused(one, two):
  with pytest.raises(DataError, match="one spelling of each class"):
    numbers([one, "other", two])
  assert numbers([one, two], Labels((one, two)))[1] == [0, 1]


@pytest.mark.parametrize("names", [("a", "b", "a"), ("a", ""), ("a", "a ")])
def test_names_of_classes_are_distinct(names):
  with pytest.raises(ConfigError, match=r"config\.task\.labels(?s:.*)distinct names"):
    Labels(names)


def test_new_names_keep_the_classes_where_they_are():
  assert same_classes(("pos", "neg"), ("pos", "neg"))
  assert same_classes(("LABEL_0", "LABEL_1"), ("neg", "pos"))
  assert not same_classes(("pos", "neg"), ("neg", "pos"))
  assert not same_classes(("NEGATIVE", "POSITIVE"), ("positive", "other"))


def test_tags_are_matched_by_name_too(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps({"tokens": ["a", "b"], "tags": ["B-X", "O"]}) + "\n")
  train, _ = load(make_task("tag", path), labels=owned(("O", "B-X")))
  assert train.label_names == ("O", "B-X")
  assert [row.tolist() for row in train.references] == [[1, 0]]
  path.write_text(json.dumps({"tokens": ["a", "b", "c"], "tags": [0, -100, 1]}) + "\n")
  with pytest.raises(DataError, match="tags: -100"):
    load(make_task("tag", path))


def test_a_class_that_is_never_trained_is_counted(tmp_path):
  train, _ = load(
    make_task("classify", label_file(tmp_path / "x.jsonl", ["a", "b"])),
    labels=owned(("a", "b", "c")),
  )
  assert train.problems == {UNTAUGHT: 1}
  items = label_file(tmp_path / "y.jsonl", [i % 3 for i in range(30)])
  assert UNTAUGHT not in load(make_task("classify", items))[0].problems


def test_options_are_named_or_numbered(tmp_path):
  """With names, a digit may be a name of another file's: ARC has A to D and 1 to 4."""
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps({"query": "a", "choices": ["b", "c"], "gold": "1"}))
  task = make_task("choice", path, labels=("A", "B"))
  with pytest.raises(DataError, match="unknown label '1'"):
    load(task)
  path.write_text(json.dumps({"query": "a", "choices": ["b", "c"], "gold": -1}))
  with pytest.raises(DataError, match="the number of an option"):
    load(make_task("choice", path))


def test_questions_without_answers_are_not_unanswerable(tmp_path):
  path, ask = tmp_path / "x.json", {"id": "1", "question": "Who?"}

  def answers(question):
    paragraph = {"context": "The cat sat.", "qas": [question]}
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    return load(make_task("qa", path))[0].answers

  assert answers(ask | {"is_impossible": True}) == [[]]
  assert answers(ask | {"answers": []}) == [[]]
  with pytest.raises(DataError, match="a column answers"):
    answers(ask)


def test_final_numbers_are_in_the_order_of_the_first_ones():
  labels = Labels()
  assert [labels.number(x, HERE, "y") for x in ("b", "a", "b")] == [0, 1, 0]
  np.testing.assert_array_equal(labels.close(), [1, 0])
  assert not labels.open and labels.names == ("a", "b")
