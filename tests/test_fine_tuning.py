"""Pre-train, then fine-tune: each kind of task, from records to scores."""

import csv
import json

import pytest

from flaxlm import prepare
from flaxlm.config import base
from flaxlm.config.check import check_config
from flaxlm.errors import ConfigError
from flaxlm.runs.directory import load_run_config
from flaxlm.runs.held_out import evaluate_run
from flaxlm.runs.loop import train
from flaxlm.training.guards import StopSignal

ANIMALS = ["cat", "dog", "cow", "hen", "fox", "owl"]
TOOLS = ["saw", "axe", "pen", "key", "cup", "bag"]


def sentences():
  for number in range(240):
    name = (ANIMALS, TOOLS)[number % 2][number // 2 % 6]
    place = ("house", "garden", "street", "field", "river")[number % 5]
    yield f"I saw the {name} number {number} near the {place}.", name, place


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, make_tiny):
  """A BERT-like run on a token store that was prepared for it."""
  root = tmp_path_factory.mktemp("pretrained")
  (root / "text.txt").write_text("\n".join(text for text, _, _ in sentences()))
  config = small(make_tiny())
  config.data.store, config.data.loader = str(root / "store"), "numpy"
  source = base.source("text", str(root / "text.txt"), document="line")
  config.data.sources = base.sources(main=source)
  config.data.validation_fraction = 0.1
  config.objective.kind, config.model.head = "masked", "mlm"
  config.tokenizer.vocab_size = 400
  (root / "config.json").write_text(config.to_json())
  prepare.main(["--config", str(root / "config.json")])
  run(config, root / "run")
  return root / "run"


def small(config, causal=False):
  model = config.model
  model.causal, model.num_segment_types = causal, 0 if causal else 2
  config.num_steps, config.log.every = 4, 1
  return config


def run(config, workdir):
  check_config(config)
  workdir.mkdir(exist_ok=True, parents=True)
  with StopSignal() as stop:
    train(config, workdir, stop)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def task_of(pretrained, kind, head, path, **knobs):
  """The config of a fine-tuning run that starts from `pretrained`."""
  config = load_run_config(pretrained)
  config.init_from, config.task.kind = str(pretrained), kind
  config.task.path, config.model.head = str(path), head
  config.num_steps, config.optim.peak_learning_rate = 60, 1e-2
  config.optim.schedule, config.eval.every = "linear", 0
  config.data.validation_fraction = 0.25
  for name, value in knobs.items():
    group = config.task if name in config.task else config.model
    group[name] = value
  return config


def test_masked_words_are_scored_beside_their_frequencies(pretrained):
  result = evaluate_run(load_run_config(pretrained), pretrained, None)
  assert result["loss"] > 0 and "bits_per_byte" not in result
  assert 2 < result["unigram_loss"] < 6
  again = evaluate_run(load_run_config(pretrained), pretrained, None)
  assert result == again


def test_classification(pretrained, tmp_path, monkeypatch):
  with open(tmp_path / "data.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["text", "label"])
    for text, name, _ in sentences():
      writer.writerow([text, "zoo" if name in ANIMALS else "box"])
  labels = ("zoo", "box")  # not in sorted order
  config = task_of(
    pretrained, "classify", "sequence", tmp_path / "data.csv", num_labels=2,
    labels=labels,
  )  # fmt: skip
  records = run(config, tmp_path / "run")
  final = [record for record in records if record["kind"] == "eval"][-1]
  assert final["accuracy"] == 1.0 and final["matthews"] == 1.0 and final["f1"] == 1.0
  stored = load_run_config(tmp_path / "run")
  assert stored.task.labels == labels
  result = evaluate_run(stored, tmp_path / "run", None)
  assert result["accuracy"] == 1.0 and result["loss"] == pytest.approx(final["loss"])
  stored.task.labels = labels[::-1]
  with pytest.raises(ConfigError, match="zoo box: the model's classes"):
    evaluate_run(stored, tmp_path / "run", None)
  # A run that starts from the classifier keeps its classes, whoever names them.
  config.init_from, config.task.labels = str(tmp_path / "run"), ()

  def stop(asked, mesh, feed, kernel_file):
    raise StopIteration(feed.examples.label_names, feed.examples.references[:2])

  with monkeypatch.context() as patch, pytest.raises(StopIteration) as opened:
    patch.setattr("flaxlm.runs.loop.resolve", stop)
    run(config, tmp_path / "more")
  assert opened.value.args[0] == labels and opened.value.args[1].tolist() == [0, 1]
  config.task.labels = labels[::-1]
  with pytest.raises(ConfigError, match="zoo box: the order of config"):
    run(config, tmp_path / "wrong")
  config.task.labels, config.model.num_labels = (), 3
  with pytest.raises(ConfigError, match="2, the classes of"):
    run(config, tmp_path / "wrong")


def test_tagging_finds_the_words(pretrained, tmp_path):
  lines = []
  for text, name, place in sentences():
    words = text.rstrip(".").split()
    tags = ["B-PLACE" if w == place else "B-THING" if w == name else "O" for w in words]
    lines.append(json.dumps({"tokens": words, "tags": tags}))
  (tmp_path / "data.jsonl").write_text("\n".join(lines))
  config = task_of(
    pretrained, "tag", "token", tmp_path / "data.jsonl", num_labels=3, head_dense=False
  )
  final = run(config, tmp_path / "run")[-1]
  assert final["kind"] == "eval" and final["f1"] > 0.9 and final["accuracy"] > 0.95


@pytest.mark.slow
def test_questions_are_answered_from_the_text(pretrained, tmp_path):
  paragraphs = [
    {
      "context": text,
      "qas": [
        {
          "id": str(number),
          "question": "What did I see?",
          "answers": [{"text": name, "answer_start": text.index(name, 5)}],
        }
      ],
    }
    for number, (text, name, _) in enumerate(sentences())
  ]
  (tmp_path / "data.json").write_text(
    json.dumps({"data": [{"paragraphs": paragraphs}]})
  )
  config = task_of(
    pretrained, "qa", "span", tmp_path / "data.json", format="squad", head_dense=False
  )
  config.num_steps = 120
  final = run(config, tmp_path / "run")[-1]
  assert final["exact_match"] > 0.9 and final["f1"] > 0.9


@pytest.mark.slow
def test_choices_are_compared(pretrained, tmp_path):
  lines = []
  for number, (_, name, _) in enumerate(sentences()):
    other = TOOLS[number % 6] if name in ANIMALS else ANIMALS[number % 6]
    gold = number // 2 % 2
    choices = [name, other] if name in ANIMALS else [other, name]
    choices = choices if gold == 0 else choices[::-1]
    record = {"query": f"Animal {number}?", "choices": choices, "gold": gold}
    lines.append(json.dumps(record))
  (tmp_path / "data.jsonl").write_text("\n".join(lines))
  config = task_of(pretrained, "choice", "choice", tmp_path / "data.jsonl")
  final = run(config, tmp_path / "run")[-1]
  assert final["accuracy"] > 0.9


@pytest.mark.slow
def test_chat_learns_the_assistants_turns_alone(tiny, tmp_path):
  pytest.importorskip("jinja2", reason="chat templates need jinja2: the extra `hf`")
  (tmp_path / "text.txt").write_text("\n".join(text for text, _, _ in sentences()))
  config = small(tiny, causal=True)
  config.data.store, config.data.loader = str(tmp_path / "store"), "numpy"
  source = base.source("text", str(tmp_path / "text.txt"), document="line")
  config.data.sources = base.sources(main=source)
  config.data.validation_fraction = 0.1
  config.data.seq_len = config.model.max_len = 64
  config.tokenizer.vocab_size = 400
  config.tokenizer.user_symbols = ("<|im_start|>", "<|im_end|>")
  (tmp_path / "config.json").write_text(config.to_json())
  prepare.main(["--config", str(tmp_path / "config.json")])
  run(config, tmp_path / "base")
  chats = [
    {"messages": [
      {"role": "user", "content": f"Where is the {name}? Think about {number}."},
      {"role": "assistant", "content": "In the garden."},
    ]}
    for number, (_, name, _) in enumerate(sentences())
  ]  # fmt: skip
  (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
  config = task_of(tmp_path / "base", "chat", "lm", tmp_path / "chat.jsonl")
  records = run(config, tmp_path / "chat")
  # The answer is always the same, so the loss vanishes if only the answer is a target.
  assert records[-1]["loss"] < 0.05 and records[-1]["kind"] == "eval"
  assert "im_start" in (tmp_path / "chat/chat_template.jinja").read_text()
  result = evaluate_run(load_run_config(tmp_path / "chat"), tmp_path / "chat", None)
  assert result["loss"] == pytest.approx(records[-1]["loss"])
