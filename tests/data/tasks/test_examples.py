"""Labelled examples: the layout of rows, and the reading of predictions."""

import json
import random

import numpy as np
import pytest
from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.tasks import encode, examples, records
from flaxlm.data.tasks.examples import ExampleBatches, load_examples

PAD, UNK, CLS, SEP, BOS, EOS = range(6)


class Threes:
  """A toy tokenizer: lower-case words in pieces of three letters. It is lossy."""

  pad_id, unk_id, cls_id, sep_id, bos_id, eos_id = PAD, UNK, CLS, SEP, BOS, EOS
  vocab_size = 5000

  def __init__(self):
    self.known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]

  def encode(self, text):
    ids = []
    for word in text.lower().split():
      for i in range(0, len(word), 3):
        piece = "##" * bool(i) + word[i : i + 3]
        if piece not in self.known:
          self.known.append(piece)
        ids.append(self.known.index(piece))
    return ids

  def encode_batch(self, texts, num_threads=1):
    return [np.array(self.encode(text), np.int32) for text in texts]

  def pieces(self):
    return [piece.encode() for piece in self.known]

  def show(self, ids):
    return [self.known[i] for i in ids]


def make_task(kind, path, **changes):
  fields = {
    "kind": kind, "path": str(path), "validation_path": "", "format": "auto",
    "split": "train", "validation_split": "validation", "columns": (), "text": "",
    "text_pair": "", "label": "", "labels": (), "choices": (),
    "doc_stride": 128, "pack": True, "chat_template": "",
  }  # fmt: skip
  assert set(changes) <= set(fields)
  return ConfigDict(fields | changes)


def load(task, seq_len=32, tok=None, fraction=0.0, **changes):
  settings = {"causal": False, "validation_fraction": fraction} | changes
  return load_examples(task, tok or Threes(), seq_len, **settings)


def read(path, kind="classify", **changes):
  return list(records.open_records(make_task(kind, path, **changes)).read())


def write(path, text):
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def json_lines(path, items):
  return write(path, "".join(json.dumps(item) + "\n" for item in items))


def batches(loaded, seq_len=32, batch_size=4, **changes):
  return ExampleBatches(loaded, seq_len, batch_size, 5, 5000, PAD, **changes)


@pytest.fixture(scope="module")
def toy_tfds(tmp_path_factory):
  """A prepared TFDS data set with classes, tags and answers, as TFRecord."""
  tfds = pytest.importorskip("tensorflow_datasets")
  from flaxlm.data.lazy_tensorflow import import_tensorflow

  tf = import_tensorflow()
  features = tfds.features.FeaturesDict(
    {
      "sentence": tfds.features.Text(),
      "label": tfds.features.ClassLabel(names=["worse", "better"]),
      "words": tfds.features.Sequence(tfds.features.Text()),
      "ner": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-X"])),
      "answers": tfds.features.Sequence(
        {"text": tfds.features.Text(), "answer_start": tf.int32}
      ),
    }
  )
  tables = {}
  for split, count in {"train": 6, "validation": 2}.items():
    numbers = range(count)
    table = {
      "sentence": [f"text {i}" for i in numbers],
      "label": [i % 2 for i in numbers],
      "words": [["a", f"b{i}"] for i in numbers],
      "ner": [[0, i % 2] for i in numbers],
      "answers": {
        "text": [["t"] for i in numbers],
        "answer_start": [[i] for i in numbers],
      },
    }
    tables[split] = tf.data.Dataset.from_tensor_slices(table)
  root = tmp_path_factory.mktemp("tfds")
  tfds.dataset_builders.store_as_tfds_dataset(
    name="toy",
    version="1.0.0",
    features=features,
    split_datasets=tables,
    data_dir=root,
    disable_shuffling=True,
  )
  return root / "toy/1.0.0"


def test_tfds_names_its_classes(toy_tfds):
  task = make_task("classify", toy_tfds, text="sentence")
  train, validation = load(task)
  assert train.label_names == ("worse", "better")  # not sorted
  assert train.labels.tolist() == [[0], [1]] * 3 and len(validation) == 2
  train, _ = load(make_task("tag", toy_tfds, text="words", label="ner"))
  assert train.label_names == ("O", "B-X")
  assert [r.tolist() for r in train.references[:2]] == [[0, 0], [0, 1]]
  found = read(toy_tfds, "classify", text="sentence")
  assert found[1].fields == {"sentence": "text 1", "label": "better"}
  assert records.plain(np.int64(-1), ("worse", "better")) is None  # a hidden label
  found = read(toy_tfds, "qa", text="sentence", text_pair="sentence")
  assert found[3].fields["answers"] == {"text": ["t"], "answer_start": [3]}
  with pytest.raises(errors.ConfigError, match=r"validation_split(?s:.*)train valid"):
    load(make_task("classify", toy_tfds, text="sentence", validation_split="test"))
  with pytest.raises(errors.DataError, match="a column body"):
    load(make_task("classify", toy_tfds, text="body"))
  held_out = make_task("classify", toy_tfds, text="sentence", validation_split="")
  assert load(held_out)[1] is None


# Labels and splits


def label_file(path, labels):
  return json_lines(path, [{"text": f"t{i}", "label": x} for i, x in enumerate(labels)])


@pytest.mark.parametrize(
  "given, names, expected",
  [
    (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
    ([10, 9, 10], ("9", "10"), [1, 0, 1]),  # as numbers, not as texts
    (["-1", "1"], ("-1", "1"), [0, 1]),
    ([True, False], ("false", "true"), [1, 0]),
  ],
)
def test_labels_are_sorted(given, names, expected, tmp_path):
  train, _ = load(make_task("classify", label_file(tmp_path / "x.jsonl", given)))
  assert train.label_names == names and train.references.tolist() == expected


def test_labels_in_the_order_of_the_config(tmp_path):
  path = label_file(tmp_path / "x.jsonl", ["low", 2, "0"])
  train, _ = load(make_task("classify", path, labels=("low", "mid", "high")))
  assert train.references.tolist() == [0, 2, 0]
  # Names that look like numbers are names, not positions in the list.
  path = label_file(tmp_path / "y.jsonl", [1, 0])
  train, _ = load(make_task("classify", path, labels=("1", "0")))
  assert train.references.tolist() == [0, 1]
  label_file(tmp_path / "y.jsonl", [1, 0, 2])
  with pytest.raises(errors.DataError, match=r"line 3(?s:.*)unknown label '2'"):
    load(make_task("classify", path, labels=("1", "0", "5")))


def test_validation_knows_the_labels_of_training_only(tmp_path):
  train = label_file(tmp_path / "train.jsonl", ["b", "c"])
  other = label_file(tmp_path / "other.jsonl", ["c", "c"])
  task = make_task("classify", train, validation_path=str(other))
  assert load(task)[1].references.tolist() == [1, 1]
  label_file(tmp_path / "other.jsonl", ["c", "a"])
  with pytest.raises(errors.DataError, match=r"other.jsonl line 2(?s:.*)'a'(?s:.*)b c"):
    load(task)


@pytest.mark.parametrize(
  "items, message",
  [
    ([{"text": "a"}], "line 1(?s:.*)columns text(?s:.*)a column label"),
    ([{"text": 5, "label": "x"}], "text: int 5"),
    ([{"text": "a", "label": None}], "no label"),
    ([{"text": "a", "label": ""}], "no label"),
    ([{"text": "a", "label": 0.5}], "float 0.5"),
    ([{"text": "a", "label": "x"}], "two classes"),
    ([], "no examples|two classes"),
  ],
)
def test_bad_records_are_named(items, message, tmp_path):
  path = json_lines(tmp_path / "x.jsonl", items)
  with pytest.raises(errors.DataError, match=message):
    load(make_task("classify", path))


def test_held_out_by_the_text(tmp_path):
  items = [{"text": f"t{i % 500}", "label": i % 2} for i in range(1000)]
  task = make_task("classify", json_lines(tmp_path / "x.jsonl", items))
  tok = Threes()
  train, validation = load(task, tok=tok, fraction=0.2)
  assert len(train) + len(validation) == 1000 and 150 < len(validation) < 250

  def texts(loaded):
    cuts = np.split(loaded.tokens, loaded.offsets[1:-1])
    return {tuple(ids.tolist()) for ids in cuts}

  assert not texts(train) & texts(validation)  # equal texts stay together
  assert load(task, tok=tok)[1] is None
  with pytest.raises(errors.DataError, match="validation_fraction"):
    load(task, tok=tok, fraction=1e-9)
  none, again = load(task, tok=tok, fraction=0.2, training=False)
  assert none is None and again.fingerprint == validation.fingerprint


@pytest.mark.faults
def test_records_in_training_and_validation_are_counted(tmp_path):
  rows = [{"text": f"text {n % 8}", "label": "ab"[n % 2]} for n in range(10)]
  path = json_lines(tmp_path / "train.jsonl", rows)
  other = json_lines(
    tmp_path / "other.jsonl", [{"text": "new", "label": "a"}, *rows[:3]]
  )
  for held_out, count in ((path, 10), (other, 3)):
    train, _ = load(make_task("classify", path, validation_path=str(held_out)))
    assert train.problems == {examples.IN_TRAINING_TOO: count}
  new = json_lines(tmp_path / "new.jsonl", [{"text": "new", "label": "a"}])
  train, _ = load(make_task("classify", path, validation_path=str(new)))
  assert not train.problems


def test_training_and_validation_files_have_the_same_columns(tmp_path):
  train = write(tmp_path / "train.csv", "text,label\na,x\nb,y\n")
  held_out = write(tmp_path / "test.tsv", "sentence\tlabel\na\tx\n")
  task = make_task("classify", train, validation_path=str(held_out))
  with pytest.raises(
    errors.DataError, match=r"test\.tsv line 2(?s:.*)text, as in .*csv"
  ):
    load(task)


def test_the_fingerprint_is_of_what_is_learnt(tmp_path):
  items = [{"text": f"t{i}", "label": i % 2} for i in range(9)]
  path = json_lines(tmp_path / "x.jsonl", items)
  tok = Threes()
  known = load(make_task("classify", path), tok=tok)[0].fingerprint
  json_lines(tmp_path / "y.jsonl", items)
  other = make_task("classify", tmp_path / "y.jsonl")
  assert load(other, tok=tok)[0].fingerprint == known
  seen = {known}
  for change in ({"text": "other"}, {"label": 0}):
    json_lines(tmp_path / "y.jsonl", [*items[:3], items[3] | change, *items[4:]])
    seen.add(load(other, tok=tok)[0].fingerprint)
  seen.add(load(make_task("classify", path, labels=("1", "0")), tok=tok)[0].fingerprint)
  assert len(seen) == 4


# Rows


def test_classify_rows(tmp_path):
  items = [{"text": "abcd ef", "label": 1}, {"text": "a " * 99, "label": 0}]
  path, tok = json_lines(tmp_path / "x.jsonl", items), Threes()
  train, _ = load(make_task("classify", path), seq_len=8, tok=tok)
  batch = batches(train, 8, 3, in_order=True)[0]
  assert tok.show(batch["tokens"][0]) == [
    *("[CLS]", "abc", "##d", "ef", "[SEP]"),
    *["[PAD]"] * 3,
  ]
  assert tok.show(batch["tokens"][1]) == ["[CLS]", *["a"] * 6, "[SEP]"]
  assert batch["segment_ids"].tolist() == [[1] * 5 + [0] * 3, [1] * 8, [0] * 8]
  assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
  assert batch["labels"].tolist() == [[1], [0], [-1]]
  assert not batch["token_types"].any()
  assert train.problems == {encode.CUT: 1}
  assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_causal_models_get_bos_and_eos(tmp_path):
  items = [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
  task = make_task("classify", json_lines(tmp_path / "x.jsonl", items))
  train, _ = load(task, causal=True)
  assert train.tokens[[0, 2]].tolist() == [BOS, EOS]
  no_cls = Threes()
  no_cls.cls_id = no_cls.sep_id = no_cls.bos_id = -1
  train, _ = load(task, tok=no_cls)
  assert train.tokens[1] == EOS and train.offsets.tolist() == [0, 2, 4]
  no_cls.eos_id = -1
  with pytest.raises(errors.ConfigError, match=r"config\.tokenizer\.path"):
    load(task, tok=no_cls)
  with pytest.raises(errors.ConfigError, match=r"config\.data\.seq_len"):
    load(task, seq_len=7)


def test_pairs_have_types_and_lose_the_longer_text(tmp_path):
  items = [
    {"text": "a b c", "other": "x y", "label": 0},
    {"text": "a b c d e f g h", "other": "x y", "label": 1},
  ]
  path, tok = json_lines(tmp_path / "x.jsonl", items), Threes()
  train, _ = load(make_task("classify", path, text_pair="other"), seq_len=9, tok=tok)
  batch = batches(train, 9, 2, in_order=True)[0]
  shown = [" ".join(tok.show(row)) for row in batch["tokens"]]
  assert shown[0] == "[CLS] a b c [SEP] x y [SEP] [PAD]"
  assert shown[1] == "[CLS] a b c d [SEP] x y [SEP]"
  assert batch["token_types"].tolist() == [
    [0, 0, 0, 0, 0, 1, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1],
  ]
  assert train.problems == {encode.CUT: 1}


def test_the_longer_text_is_cut():
  for first in range(12):
    for second in range(12):
      for room in range(4, 26):
        a, b = encode.fit_pair(first, second, room)
        assert (a, b) == (first, second) or a + b == room
        assert a <= first and b <= second
        if a < first:  # the shorter text loses no tokens
          assert a >= b - 1
        if b < second:
          assert b >= a - 1


def test_tags_sit_on_the_first_token_of_a_word(tmp_path):
  items = [
    {"tokens": ["abcdef", "x", "ghij"], "tags": ["B-P", "O", "I-P"]},
    {"tokens": ["a", "\u0085", "b" * 30], "tags": ["O", "B-P", "O"]},
  ]
  path, tok = json_lines(tmp_path / "x.jsonl", items), Threes()
  train, _ = load(make_task("tag", path), seq_len=8, tok=tok)
  assert train.label_names == ("B-P", "I-P", "O")
  batch = batches(train, 8, 3, in_order=True)[0]
  assert tok.show(batch["tokens"][0])[:5] == ["[CLS]", "abc", "##def", "x", "ghi"]
  assert batch["labels"].tolist() == [
    [-1, 0, -1, 2, 1, -1, -1, -1],
    [-1, 2, 0, 2, -1, -1, -1, -1],  # the word without tokens keeps its tag
    [-1] * 8,
  ]
  assert batch["tokens"][1, 2] == UNK
  predictions, references = train.scored(np.where(batch["labels"] >= 0, 1, 7))
  assert [p.tolist() for p in predictions] == [[1, 1, 1]] * 2
  assert [r.tolist() for r in references] == [[0, 2, 1], [2, 0, 2]]
  json_lines(path, [{"tokens": ["a", "b"], "tags": ["O"]}])
  with pytest.raises(errors.DataError, match=r"line 1(?s:.*)1 tags(?s:.*)list of 2"):
    load(make_task("tag", path))


def test_options_are_segments_of_a_row(tmp_path):
  items = [
    {"query": "ask", "choices": ["x", "y z", "w"], "gold": 2},
    {"query": "a b c d e f", "choices": ["x", "y y y y y y y y y"], "gold": 0},
  ]
  path, tok = json_lines(tmp_path / "x.jsonl", items), Threes()
  train, _ = load(make_task("choice", path), seq_len=20, tok=tok)
  batch = batches(train, 20, 3, in_order=True)[0]
  assert batch["starts"].tolist() == [[0, 5, 11], [0, 10, -1], [-1, -1, -1]]
  assert batch["labels"].tolist() == [[2], [0], [-1]]
  assert batch["segment_ids"][0].tolist() == [1] * 5 + [2] * 6 + [3] * 5 + [0] * 4
  assert batch["positions"][0, :12].tolist() == [*range(5), *range(6), 0]
  assert batch["token_types"][0, :11].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
  assert " ".join(tok.show(batch["tokens"][1])) == (
    "[CLS] a b c d e f [SEP] x [SEP] [CLS] a b c [SEP] y y y y [SEP]"
  )
  assert train.problems == {encode.CUT: 1}
  # One record's options are contexts, another's are columns.
  json_lines(path, [{"context": ["a", "b"], "end": "c", "answer": "B"}])
  changes = {"text": "context", "choices": ("end",), "label": "answer"}
  train, _ = load(make_task("choice", path, **changes, labels=("A", "B")), tok=tok)
  assert train.labels.tolist() == [[1]] and train.num_choices == 2
  json_lines(path, [{"query": "a", "one": "b", "two": "c", "gold": "1"}])
  train, _ = load(make_task("choice", path, choices=("one", "two")), tok=tok)
  assert train.labels.tolist() == [[1]] and train.num_choices == 2
  for item in (
    {"query": "a", "choices": ["b", "c"], "gold": 2},
    {"query": "a", "choices": ["b", "c"], "gold": True},
    {"query": "a", "choices": ["b"], "gold": 0},
    {"query": ["a", "b", "c"], "choices": ["b", "c"], "gold": 0},
    {"query": "a", "choices": "bc", "gold": 0},
    {"query": "a b c", "choices": ["b"] * 9, "gold": 0},
  ):
    json_lines(path, [item])
    with pytest.raises(errors.DataError, match="line 1"):
      load(make_task("choice", path))


def test_all_lengths_fit_into_a_row():
  rng = random.Random(0)
  for _ in range(300):
    lengths = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 7))]
    room = rng.randrange(10, 120)
    limit = encode.fit_all(lengths, room)
    used = sum(min(length, limit) for length in lengths)
    assert used <= room
    more = sum(min(length, limit + 1) for length in lengths)
    assert limit == max(lengths) or more > room


# Questions


def question(context, answer, start, text="who is it"):
  answers = {"text": [answer], "answer_start": [start]} if answer else []
  return {"question": text, "context": context, "answers": answers}


def gold_spans(loaded):
  """Returns the predictions of a model that knows the labels."""
  here = (loaded.labels > 0).any(axis=1)
  scores = np.stack([np.where(here, 1.0, -1.0), np.where(here, 0.0, 2.0)], axis=1)
  return loaded.labels, scores


def test_windows_show_all_of_a_context(tmp_path):
  context = " ".join(f"{chr(97 + i % 26)}{i}" for i in range(50))
  at = context.index("k36")
  items = [
    question(context, "k36 l37", at),
    question(context, None, 0),
    question("Ab cde", "cde", 3),
    question("ab cde", "cde", 2),
  ]
  path, tok = json_lines(tmp_path / "x.jsonl", items), Threes()
  task = make_task("qa", path, doc_stride=10)
  train, _ = load(task, seq_len=26, tok=tok)
  assert [w[0] for w in train.windows] == [0] * 4 + [1] * 4 + [2, 3]
  assert [w[2] for w in train.windows[:4]] == [0, 10, 20, 30]
  batch = batches(train, 26, 10, in_order=True)[0]
  assert tok.show(batch["tokens"][0])[:6] == ["[CLS]", "who", "is", "it", "[SEP]", "a0"]
  # Each window has 20 tokens of context: 36 and 37 are in the last two.
  assert (
    batch["labels"][:8].tolist() == [[0, 0]] * 2 + [[21, 22], [11, 12]] + [[0, 0]] * 4
  )
  assert tok.show(batch["tokens"][3, 11:13]) == ["k36", "l37"]
  assert batch["labels"][9].tolist() == [-1, -1]  # its offset is wrong
  assert train.problems == {encode.MISPLACED: 1}
  predictions, references = train.scored(*gold_spans(train))
  assert references == [["k36 l37"], [], ["cde"], ["cde"]]
  assert predictions[:3] == ["k36 l37", "", "cde"]
  # A question is left out if some of its windows were not scored.
  spans, scores = gold_spans(train)
  assert len(train.scored(spans[:7], scores[:7])[0]) == 1
  assert train.scored(spans[:8], scores[:8])[0] == ["k36 l37", ""]


def test_the_best_window_answers(tmp_path):
  items = [question("aa bb cc dd ee ff gg hh", "bb", 3)]
  path = json_lines(tmp_path / "x.jsonl", items)
  train, _ = load(make_task("qa", path, doc_stride=2), seq_len=10)
  assert train.windows.tolist() == [
    [0, 0, 0, 5], [0, 0, 2, 5], [0, 0, 4, 5]
  ]  # fmt: skip
  spans = np.array([[5, 6], [5, 8], [8, 8]])
  scores = np.array([[1.0, 9.0], [2.0, 9.0], [1.5, 9.0]])
  assert train.scored(spans, scores)[0] == ["cc dd ee ff"]
  spans[1] = [3, 6]  # begins in the question: no answer at all
  assert train.scored(spans, scores)[0] == ["hh"]


def test_no_answer_has_to_beat_the_best_one(tmp_path):
  items = [question("aa bb cc", "bb", 3), question("aa bb cc", None, 0)]
  train, _ = load(make_task("qa", json_lines(tmp_path / "x.jsonl", items)))
  spans = np.array([[6, 6], [7, 7]])
  for none, expected in ((1.5, ["bb", ""]), (0.5, ["bb", "cc"])):
    scores = np.array([[2.0, none], [1.0, none]])
    assert train.scored(spans, scores) == (expected, [["bb"], []])


def test_questions_on_one_context_stay_together(tmp_path):
  items = [question(f"aa b{i // 5}", "aa", 0, f"w{i}") for i in range(500)]
  path = json_lines(tmp_path / "x.jsonl", items)
  train, validation = load(make_task("qa", path), fraction=0.3)
  seen = [{text for text, _ in split.contexts} for split in (train, validation)]
  assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 100
  assert 15 < len(seen[1]) < 45


def test_squad_files(tmp_path):
  paragraph = {
    "context": "The cat sat.",
    "qas": [
      {"id": "1", "question": "Who?", "answers": [{"text": "cat", "answer_start": 4}]},
      {"id": "2", "question": "Why?", "is_impossible": True, "answers": []},
    ],
  }
  path = tmp_path / "x.json"
  write(path, json.dumps({"data": [{"paragraphs": [paragraph]}]}))
  train, _ = load(make_task("qa", path))
  assert train.answers == [["cat"], []] and len(train.contexts) == 1
  paragraph["qas"][0]["answers"] = ["cat"]
  write(path, json.dumps({"data": [{"paragraphs": [paragraph]}]}))
  with pytest.raises(errors.DataError, match=r"question 1(?s:.*)answer_start"):
    load(make_task("qa", path))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_of_xquad_come_back(language, corpora, bpe):
  """Answers in text become token spans in windows, and text again."""
  path = corpora / f"from_repos/labelled/xquad/xquad.{language}.json"
  loaded, _ = load(make_task("qa", path, doc_stride=200), seq_len=640, tok=bpe)
  spans, scores = gold_spans(loaded)
  assert len(loaded.answers) == 1190 and loaded.problems == {}
  predictions, references = loaded.scored(spans, scores)
  # They differ where a piece, such as ".\n", reaches beyond the answer.
  same = [a == b[0] for a, b in zip(predictions, references, strict=True)]
  inside = [b[0] in a for a, b in zip(predictions, references, strict=True)]
  assert np.mean(same) > 0.99 and np.mean(inside) > 0.999


# Chats


@pytest.fixture
def chat(monkeypatch):
  """Calls encode_chat with a template that marks roles by their first letter."""

  def encode_chat(messages, tokenizer, template):
    assert template == "the template"
    ids, is_predicted = [BOS], [False]
    for message in messages:
      if "content" not in message:
        raise errors.DataError("no content")
      text = [
        tokenizer.encode(message["role"])[0],
        *tokenizer.encode(message["content"]),
      ]
      ids += [*text, EOS]
      own = message["role"] == "assistant"
      is_predicted += [False] + [own] * len(text)
    return ids, is_predicted

  monkeypatch.setattr(encode, "encode_chat", encode_chat)


def talk(*texts):
  roles = ("user", "assistant")
  return {
    "messages": [
      {"role": roles[i % 2], "content": text} for i, text in enumerate(texts)
    ]
  }


def test_only_the_assistant_is_learnt(chat, tmp_path):
  items = [
    talk("a b", "c d", "e", "f"),
    talk("g"),
    talk("h " * 40, "i"),
    talk("j", "k"),
  ]
  path, tok = json_lines(tmp_path / "x.jsonl", items), Threes()
  for pack in (True, False):
    task = make_task("chat", path, pack=pack)
    train, _ = load(task, tok=tok, chat_template="the template")
    assert train.problems == {encode.NO_TARGET: 2}
    assert len(train) == 2 - pack
    batch = batches(train, 32, 2, in_order=True)[0]
    assert set(batch) == {"tokens", "segment_ids", "positions", "targets"}
    assert tok.show(batch["tokens"][0, :8]) == [
      *["<s>", "use", "a", "b", "</s>", "ass", "c", "d"]
    ]
    shown = [tok.known[i] if i >= 0 else "" for i in batch["targets"][0, :14].tolist()]
    assert shown == [*[""] * 5, "c", "d", "</s>", *[""] * 4, "f", "</s>"]
    if pack:
      assert batch["segment_ids"][0, [0, 13, 14, 19, 20]].tolist() == [1, 1, 2, 2, 0]
      assert batch["positions"][0, 13:16].tolist() == [13, 0, 1]
      assert (batch["segment_ids"][1] == 0).all()
    # No target belongs to another conversation or follows padding.
    assert (batch["targets"][batch["segment_ids"] == 0] == -1).all()
  json_lines(path, [{"messages": [{"role": "user"}]}])
  with pytest.raises(errors.DataError, match=r"x\.jsonl line 1: no content"):
    load(make_task("chat", path), chat_template="the template")
  json_lines(path, [talk("a")])
  with pytest.raises(errors.DataError, match="nothing to predict"):
    load(make_task("chat", path), chat_template="the template")


def test_chats_of_a_real_template(english, tmp_path):
  pytest.importorskip("jinja2")
  from flaxlm.tokenizer.chat_template import open_template
  from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer

  lines = sample_lines([english], 50_000)
  names = ("<|im_start|>", "<|im_end|>")
  model = train_tokenizer(lines, "bpe", 500, user_symbols=names)
  tok = Tokenizer(model)
  path = json_lines(tmp_path / "x.jsonl", [talk("class A:", "a class", "if", "")])
  template = open_template("", tok)
  train, _ = load(make_task("chat", path), 128, tok, chat_template=template)
  batch = batches(train, 128, 1)[0]
  targets = batch["targets"][0]
  learnt = targets[targets >= 0]
  end = tok.control_id("<|im_end|>")
  assert tok.decode(learnt) == "a class" and (learnt == end).sum() == 2
  at = np.flatnonzero(targets >= 0)[:-1]  # the end of the text is not a token
  np.testing.assert_array_equal(targets[at], batch["tokens"][0, at + 1])


def test_packing_loses_nothing_and_fills_rows():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 65, 2000).tolist()
  packed = encode.pack(lengths, 64)
  assert sorted(row for group in packed for row in group) == list(range(2000))
  used = [sum(lengths[row] for row in group) for group in packed]
  assert max(used) <= 64 and len(packed) <= sum(lengths) / 64 * 1.02


# Batches


@pytest.fixture
def hundred(tmp_path):
  items = [{"text": f"t{i:03}", "label": i % 7} for i in range(100)]
  train, _ = load(make_task("classify", json_lines(tmp_path / "x.jsonl", items)))
  return train


def test_each_example_comes_once_an_epoch(hundred):
  for seed_batches in (batches(hundred), batches(hundred, batch_size=7)):
    size = seed_batches.batch_size
    seen = np.concatenate([seed_batches.rows(t) for t in range(300 // size + 1)])
    for epoch in range(3):
      order = seen[epoch * 100 : epoch * 100 + 100]
      np.testing.assert_array_equal(np.sort(order), np.arange(100))
      assert (np.diff(order) != 1).any()
    assert (seen[:100] != seen[100:200]).any()


def test_a_batch_is_a_function_of_its_step_and_hosts_share_it(hundred):
  whole, again = batches(hundred), batches(hundred)
  parts = [batches(hundred, first_row=k, num_rows=2) for k in (0, 2)]
  for step in (0, 17, 10**6):
    again[step + 3]
    expected = whole[step]
    for name, array in again[step].items():
      np.testing.assert_array_equal(array, expected[name])
      joined = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(joined, expected[name])


def test_in_order_with_padding_at_the_end(hundred):
  own = batches(hundred, batch_size=32, in_order=True)
  assert len(own) == 4
  labels = np.concatenate([own[t]["labels"] for t in range(4)])
  assert labels[:100, 0].tolist() == [i % 7 for i in range(100)]
  assert (labels[100:] == -1).all() and len(labels) == 128
  predictions, references = hundred.scored(labels)
  assert len(predictions) == 100 and predictions.tolist() == references.tolist()
  assert len(hundred.scored(labels[:32])[1]) == 32


def test_a_small_vocabulary_is_refused(hundred):
  with pytest.raises(errors.ConfigError, match=r"config\.model\.vocab_size"):
    ExampleBatches(hundred, 32, 4, 0, 20, PAD)


def test_many_records_are_encoded_in_chunks(tmp_path, monkeypatch):
  items = [{"text": f"t{i:03}", "label": i % 7} for i in range(50)]
  task = make_task("classify", json_lines(tmp_path / "x.jsonl", items))
  tok = Threes()
  whole, _ = load(task, tok=tok)
  monkeypatch.setattr(examples, "RECORDS_TOGETHER", 7)
  assert load(task, tok=tok)[0].fingerprint == whole.fingerprint


# Real data


def test_banking77(corpora, bpe):
  folder = corpora / "from_repos/labelled"
  task = make_task("classify", folder / "banking77_train.csv", label="category")
  task.validation_path = str(folder / "banking77_test.csv")
  train, validation = load(task, tok=bpe, seq_len=64)
  assert (len(train), len(validation)) == (10003, 3080)
  assert len(train.label_names) == 77 and train.labels.max() == 76
  assert train.label_names[int(validation.references[0])] == "card_arrival"
  assert train.tokens.dtype == np.uint16


def test_multiple_choice_sets(corpora, bpe):
  folder = corpora / "from_repos/labelled"
  copa, _ = load(make_task("choice", folder / "copa.jsonl"), 256, bpe)
  assert len(copa) == 100 and copa.num_choices == 2
  assert copa.labels[:3, 0].tolist() == [1, 1, 0] and not copa.problems
  arc, _ = load(make_task("choice", folder / "arc_easy.jsonl"), 512, bpe)
  assert len(arc) == 2376 and arc.num_choices == 4
  changes = {"text": "context_options", "choices": ("continuation",)}
  task = make_task("choice", folder / "winograd_wsc.jsonl", **changes)
  winograd, _ = load(task, 128, bpe)
  assert len(winograd) == 273 and winograd.num_choices == 2
