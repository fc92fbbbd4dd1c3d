"""Task files: each shape reads its items, and says what is wrong with a record."""

import json
import zipfile

import pytest

from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.evals.tasks import SHAPES, item_hash, open_task, shipped_tasks


@pytest.fixture
def task(tmp_path):
  """Writes a task file and its records; returns the opened task."""

  def make(records, limit=0, data="data.jsonl", **fields):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / data).write_text(lines)
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"data": data, **fields}))
    return open_task(str(path), limit=limit)

  return make


CHOICE = {"shape": "choice", "prompt": "{q}:", "options": "choices", "gold": "gold"}


def test_options_follow_one_context_or_several_lead_to_one_continuation(task):
  records = [{"q": "two and two", "choices": ["four", "five"], "gold": 0}]
  (item,) = task(records, **CHOICE).items
  assert item.options == (("two and two:", " four"), ("two and two:", " five"))
  records = [{"who": ["the cup", "the bag"], "rest": "is big", "gold": 1}]
  fields = {"options": "who", "continuation": "{rest}.", "gold": "gold"}
  (item,) = task(records, shape="schema", **fields).items
  assert item.options == (("the cup", " is big."), ("the bag", " is big."))
  assert item.gold == 1


def test_a_cloze_asks_for_its_last_word_or_for_what_is_named(task):
  records = [{"text": "the cat sat", "next": "down"}]
  (item,) = task(records, shape="cloze", prompt="{text}").items
  assert item.options == (("the cat", " sat"),)
  fields = {"prompt": "{text}", "continuation": "{next}", "delimiter": "-"}
  (item,) = task(records, shape="cloze", **fields).items
  assert item.options == (("the cat sat", "-down"),)
  with pytest.raises(DataError, match=r"line 1[^$]*last word"):
    task([{"text": "cat"}], shape="cloze", prompt="{text}")


def test_pairs_texts_and_answers(task):
  pair = [{"right": "he sits", "wrong": "he sit", "kind": "verbs"}]
  (item,) = task(pair, shape="pairs", good="right", bad="wrong", group="kind").items
  assert item.options == (("", "he sits"), ("", "he sit")) and item.group == "verbs"
  texts = [{"body": "a"}, {"body": "b"}, {"body": "a"}]  # each text counts once
  items = task(texts, shape="rolling", text="body").items
  assert sorted(item.options[0][1] for item in items) == ["a", "b"]
  asked = [{"q": "who", "said": ["she", "her", "she"]}]
  (item,) = task(asked, shape="generate", prompt="{q}", answers="said").items
  assert item.answers == ("she", "her") and item.options == (("who", " she"),)


def test_a_limit_takes_the_first_of_the_same_random_order(task):
  records = [{"q": str(i), "choices": ["a", "b"], "gold": 0} for i in range(50)]
  whole, part = task(records, **CHOICE), task(records, limit=9, **CHOICE)
  assert part.items == whole.items[:9] and item_hash(part.items) != item_hash([])
  numbers = [int(item.options[0][0][:-1]) for item in whole.items]
  assert sorted(numbers) == list(range(50)) and max(numbers[:9]) > 20
  assert part.sha256 != whole.sha256 == task(records, **CHOICE).sha256
  changed = [*records[:-1], records[-1] | {"gold": 1}]
  assert task(changed, **CHOICE).sha256 != whole.sha256


@pytest.mark.faults
def test_an_archive_holds_several_files(tmp_path):
  with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
    for name in ("b/one.jsonl", "b/two.jsonl"):
      archive.writestr(name, json.dumps({"g": f"good {name}", "b": "bad"}) + "\n")
    archive.writestr("__MACOSX/b/._one.jsonl", b"\xff\x00")
  fields = {"shape": "pairs", "data": "all.zip", "good": "g", "bad": "b"}
  (tmp_path / "t.json").write_text(json.dumps(fields))
  assert len(open_task(str(tmp_path / "t.json")).items) == 2
  (tmp_path / "all.zip").write_bytes(b"no archive")
  with pytest.raises(DataError, match="a zip archive"):
    open_task(str(tmp_path / "t.json"))


GOOD = {"q": "x", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
  ("record", "wrong"),
  [
    ({"choices": ["a", "b"], "gold": 0}, "'q'"),
    (GOOD | {"gold": 2}, "one of 2 options"),
    (GOOD | {"gold": "0"}, "number"),
    (GOOD | {"gold": True}, "number"),
    (GOOD | {"choices": ["a"]}, "two texts"),
    (GOOD | {"choices": "ab"}, "two texts"),
    (GOOD | {"choices": ["a", ""]}, "two texts"),
  ],
)
def test_a_wrong_record_is_named(task, record, wrong):
  with pytest.raises(DataError, match=f"line 2[^$]*{wrong}"):
    task([GOOD, record], **CHOICE)


def test_a_wrong_task_file_is_refused(task, tmp_path):
  for fields, wrong in (
    ({"shape": "quiz"}, "shape: quiz"),
    ({"shape": "choice", "options": "choices"}, "no gold"),
    ({**CHOICE, "colour": "red"}, "colour"),
    ({**CHOICE, "max_tokens": "9"}, "max_tokens"),
  ):
    with pytest.raises(DataError, match=wrong):
      task([GOOD], **fields)
  with pytest.raises(DataError, match="no items"):
    task([], **CHOICE)
  with pytest.raises(DataError, match="ending"):
    task([GOOD], data="data.xml", **CHOICE)
  with pytest.raises(ConfigError, match=r"quizz[^$]*copa"):
    open_task("quizz")
  with pytest.raises(MissingInputError, match=r"own2\.json"):
    open_task(str(tmp_path / "own2.json"))
  with pytest.raises(MissingInputError, match=r"task copa[^$]*--config.eval.task_data"):
    open_task("copa", tmp_path)


SIZES = {
  "arc_challenge": 1172, "arc_easy": 2376, "blimp": 67_000, "boolq": 3270, "copa": 100,
  "crows_pairs": 1508, "lambada": 5153, "openbook_qa": 500, "winograd_wsc": 273,
  "xquad_en": 1190, "xquad_en_text": 240, "xquad_zh": 1190, "xquad_zh_text": 240,
}  # fmt: skip


def test_the_task_files_of_the_package_cover_all_shapes(corpora):
  assert [*SIZES] == shipped_tasks()
  shapes = set()
  for name in SIZES.keys() - {"blimp"}:
    task = open_task(name, corpora / "from_repos/labelled")
    assert len(task.items) == SIZES[name]
    shapes.add(task.file.shape)
  assert shapes == {*SHAPES}


@pytest.mark.slow
def test_blimp_has_67_groups(corpora):
  items = open_task("blimp", corpora / "from_repos/labelled").items
  assert len(items) == SIZES["blimp"] and len({item.group for item in items}) == 67
