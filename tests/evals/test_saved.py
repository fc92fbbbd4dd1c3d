"""Results of saved models: written once, and the same after a kill."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.evals import run, saved
from flaxlm.evals.run import prepare_task
from flaxlm.evals.saved import evaluate_saved, read_result, watch_steps
from flaxlm.evals.tasks import open_task
from flaxlm.inference.language_model import LanguageModel
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import make_mesh

TEXT = "import return class self None True with open yield lambda print range"
WORDS = TEXT.split(" ")


@pytest.fixture(scope="module")
def loaded(make_tiny, bpe):
  config = make_tiny()
  config.model.vocab_size, config.model.max_len = 1024, 128
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(3))
  mesh = make_mesh(jax.devices()[:1])
  return LanguageModel(model, bpe, mesh, config.mesh.rules.to_dict(), step=7)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  """A task of 300 choices of 2 to 4 words."""
  folder, draw = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
  with (folder / "data.jsonl").open("w") as file:
    for i in range(300):
      words = draw.choice(WORDS, 8).tolist()
      sizes = draw.integers(1, 4, 2)
      options = [" ".join(words[:n]) for n in sizes]
      record = {"q": " ".join(words[4:]), "choices": options, "gold": i % 2}
      file.write(json.dumps(record) + "\n")
  fields = {"shape": "choice", "data": "data.jsonl", "prompt": "{q}"}
  path = folder / "words.json"
  path.write_text(json.dumps(fields | {"options": "choices", "gold": "gold"}))
  return open_task(str(path))


class Killed(Exception):
  pass


def test_a_result_is_computed_once_and_a_kill_changes_no_byte(
  loaded, task, tmp_path, monkeypatch
):
  monkeypatch.setattr(run, "_CPU_BATCH_TOKENS", 512)
  (result,) = evaluate_saved(loaded, "abc", [task], tmp_path / "whole")
  (path,) = (tmp_path / "whole").iterdir()
  assert json.loads(path.read_text()) == result == read_result(path.parent, "abc", task)
  assert result["step"] == 7 and result["metrics"]["n"] == 300
  assert 0.3 < result["metrics"]["acc"] < 0.7 and result["padding"] < 0.1
  uniform = result["chance"]["uniform_bytes"]
  assert uniform["bits_per_byte"] == pytest.approx(8)

  batches = []

  def kill():
    batches.append(1)
    if len(batches) == 3:
      raise Killed

  with pytest.raises(Killed):
    list(evaluate_saved(loaded, "abc", [task], tmp_path / "cut", kill))
  (partial,) = (tmp_path / "cut").iterdir()
  with partial.open("a") as file:
    file.write('{"log_p": [1.0, ')  # a torn line
  batches.clear()
  list(
    evaluate_saved(loaded, "abc", [task], tmp_path / "cut", lambda: batches.append(1))
  )
  (again,) = (tmp_path / "cut").iterdir()
  assert again.read_bytes() == path.read_bytes() and again.name == path.name
  total = len(batches) + 3
  batches.clear()
  list(
    evaluate_saved(loaded, "abc", [task], tmp_path / "cut", lambda: batches.append(1))
  )
  assert not batches and total > 6
  # Other weights have results of their own.
  assert read_result(tmp_path / "cut", "abd", task) is None


@pytest.mark.slow
def test_answers_are_written_and_cut_at_the_stop_text(loaded, tmp_path):
  records = [{"q": f"class {word}", "a": [word]} for word in WORDS[:3]]
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (tmp_path / "data.jsonl").write_text(lines)
  fields = {"shape": "generate", "data": "data.jsonl", "prompt": "{q}", "answers": "a"}
  (tmp_path / "t.json").write_text(json.dumps(fields | {"max_tokens": 8}))
  asked = open_task(str(tmp_path / "t.json"))
  (result,) = evaluate_saved(loaded, "abc", [asked], tmp_path / "out")
  assert set(result["items"]) == {"nats", "bytes", "exact_match", "f1"}
  assert result["metrics"]["exact_match"] == 0 < result["metrics"]["bits_per_byte"]


def test_masked_models_are_asked_only_what_they_can_answer(loaded, task, tmp_path, bpe):
  (tmp_path / "data.jsonl").write_text(json.dumps({"body": "a text"}) + "\n")
  fields = {"shape": "rolling", "data": "data.jsonl", "text": "body"}
  (tmp_path / "t.json").write_text(json.dumps(fields))
  masked = dataclasses.replace(loaded.config, head="mlm", causal=False)
  with pytest.raises(ConfigError, match="t, with a masked model"):
    prepare_task(open_task(str(tmp_path / "t.json")), bpe, masked, 128)
  prepared = prepare_task(task, bpe, masked, 128)
  tokens = sum(len(r.continuation) for rs in prepared.requests for (r,) in rs)
  assert prepared.method == "pll" and len(prepared.segments) == tokens
  classifier = dataclasses.replace(masked, head="sequence", num_labels=2)
  with pytest.raises(ConfigError, match="head=sequence"):
    prepare_task(task, bpe, classifier, 128)


def test_checkpoints_are_yielded_once_until_the_last(monkeypatch):
  looks = iter([[], [10], [10, 20], [20, 30], [30, 40]])
  monkeypatch.setattr(saved.time, "sleep", lambda seconds: None)
  assert list(watch_steps(lambda: next(looks), 40, 1.0)) == [10, 20, 30, 40]
