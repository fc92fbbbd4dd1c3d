"""lm-eval gets the numbers of single requests, and of its `hf` model on our export."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("lm_eval", reason="pip: lm-eval")

from flaxlm.errors import ConfigError
from flaxlm.evals.harness import HarnessModel
from flaxlm.inference.language_model import LanguageModel
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import one_device

PAIRS = [
  ("import", " os"), ("import ", "os, sys"), ("", "return None"), ("(self, sel", "f"),
  ("def f(x):\n  return x" * 30, " + 1"), ("class A", ":\n  pass"),
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded(make_tiny, bpe):
  config = make_tiny()
  config.model.vocab_size, config.model.max_len = 1024, 64
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(3))
  model = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, model)
  return LanguageModel(model, bpe, one_device(), config.mesh.rules.to_dict())


class Hook:
  def __init__(self):
    self.added = []

  def add_partial(self, *entry):
    self.added.append(entry)


@pytest.fixture
def judge(loaded):
  model = HarnessModel(loaded)
  model.set_cache_hook(Hook())
  return model


def instances(arguments):
  return [types.SimpleNamespace(args=args) for args in arguments]


def test_likelihoods_are_those_of_the_library_and_merged_tokens_are_counted(
  judge, loaded
):
  found = judge.loglikelihood(instances(PAIRS), disable_tqdm=True)
  expected = loaded.loglikelihood(PAIRS)
  for (log_p, greedy), single in zip(found, expected, strict=True):
    assert log_p == pytest.approx(single.log_p, abs=1e-4)
    assert greedy == single.is_greedy
  assert judge.merged == 1
  assert [entry[:2] for entry in judge.cache_hook.added] == [
    ("loglikelihood", pair) for pair in PAIRS
  ]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128])
def test_rolling_scores_each_token_once(judge, loaded, bpe, size):
  ids = np.random.default_rng(0).integers(300, 900, size).tolist()
  judge.tok_encode = lambda text, **kwargs: ids
  (total,) = judge.loglikelihood_rolling(instances([("text",)]))
  text, singles = [bpe.bos_id, *ids], []
  for first in range(1, len(text), 64):
    rest = text[first : first + 64]
    end = first + len(rest)
    singles.append((text[max(0, end - 65) : first], rest))
  expected = sum(x.log_p for x in loaded.score(singles)) if singles else 0.0
  assert total == pytest.approx(expected, abs=1e-3)
  kept = [("loglikelihood_rolling", ("text",), total)]
  assert judge.cache_hook.added == kept * (size > 0)


def test_texts_of_several_windows_share_batches(judge):
  texts = ["import os\n" * 40, "", "return None", "class A:\n" * 30]
  together = judge.loglikelihood_rolling(instances([(text,) for text in texts]))
  apart = [judge.loglikelihood_rolling(instances([(text,)]))[0] for text in texts]
  np.testing.assert_allclose(together, apart, atol=1e-3)
  # bos alone is a text too: an empty one has a window.
  kept = [key[0] for _, key, _ in judge.cache_hook.added[:4]]
  assert kept == texts


def test_settings_of_a_generation(judge):
  options, room = judge._options({"until": ["\n"], "max_gen_toks": 10})
  assert room == 54 and options["temperature"] == 0 and options["stop"] == ("\n",)
  options, _ = judge._options(
    {"until": "x", "do_sample": True, "temperature": 0.7, "max_tokens": 4}
  )
  assert options["temperature"] == 0.7 and options["max_tokens"] == 4
  with pytest.raises(ConfigError, match="num_beams"):
    judge._options({"num_beams": 4, "max_gen_toks": 4})
  with pytest.raises(ConfigError, match=r"max_gen_toks=256[^$]*64 tokens"):
    judge._options({"until": ["\n"]})


def test_an_unfinished_message_stays_open(judge, loaded):
  with pytest.raises(ConfigError, match="apply_chat_template"):
    judge.chat_template(True)

  class Template:
    source = "template"

    def render(self, messages, tokenizer, prompt=False):
      text = "".join(f"[{m['role']}]{m['content']}\n" for m in messages)
      return text + "[assistant]" * prompt

  judge.loaded = types.SimpleNamespace(template=Template())
  history = [{"role": "user", "content": "hi"}]
  assert judge.apply_chat_template(history) == "[user]hi\n[assistant]"
  history.append({"role": "assistant", "content": "It is"})
  shown = judge.apply_chat_template(history, add_generation_prompt=False)
  assert shown == "[user]hi\n[assistant]It is"
  assert judge.chat_template(True) == "template" and judge.chat_template(False) is None


def test_a_model_that_predicts_no_text_is_refused(loaded):
  masked = types.SimpleNamespace(
    config=dataclasses.replace(loaded.config, head="mlm", causal=False)
  )
  with pytest.raises(ConfigError, match="flaxlm evaluate"):
    HarnessModel(masked)


@pytest.mark.slow
def test_a_run_of_lm_eval_on_files(loaded, judge, tmp_path, monkeypatch):
  import lm_eval
  from lm_eval.tasks import TaskManager

  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  with (tmp_path / "data.jsonl").open("w") as file:
    for i in range(20):
      record = {"q": f"import a{i}", "options": ["as b", "ab ("], "gold": i % 2}
      file.write(json.dumps(record) + "\n")
  (tmp_path / "mine.yaml").write_text(
    "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
    f"    test: {tmp_path}/data.jsonl\noutput_type: multiple_choice\n"
    'test_split: test\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{options}}"\n'
    "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
  )
  manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
  found = lm_eval.simple_evaluate(
    model=judge, tasks=["mine"], task_manager=manager, bootstrap_iters=0
  )
  pairs = [
    (f"import a{i}", f" {option}") for i in range(20) for option in ("as b", "ab (")
  ]
  log_p = np.array([x.log_p for x in loaded.loglikelihood(pairs)]).reshape(20, 2)
  right = (log_p.argmax(axis=1) == np.arange(20) % 2).mean()
  assert found["results"]["mine"]["acc,none"] == pytest.approx(right)


@pytest.mark.slow
def test_the_hf_model_says_the_same_of_our_export(make_tiny, bpe, tmp_path):
  pytest.importorskip("torch", reason="pip: parity")
  pytest.importorskip("transformers", reason="pip: parity")
  from lm_eval.models.huggingface import HFLM

  import flaxlm
  from flaxlm.interop.export_run import export_model
  from flaxlm.runs.directory import load_run_config
  from flaxlm.runs.loop import train
  from flaxlm.training.guards import StopSignal

  config = make_tiny()
  config.model.vocab_size, config.model.max_len, config.num_steps = 1000, 64, 4
  run, exported = tmp_path / "run", tmp_path / "exported"
  with StopSignal() as stop:
    train(config, run, stop)
  (run / "tokenizer.model").write_bytes(bpe.model)
  export_model(load_run_config(run), run, exported)
  theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4)
  ours = HarnessModel(flaxlm.load(run))
  ours.set_cache_hook(Hook())
  pairs = [pair for pair in PAIRS if pair != ("(self, sel", "f")]
  found = ours.loglikelihood(instances(pairs), disable_tqdm=True)
  expected = theirs.loglikelihood(instances(pairs), disable_tqdm=True)
  for (log_p, greedy), (their_log_p, their_greedy) in zip(found, expected, strict=True):
    assert log_p == pytest.approx(their_log_p, abs=1e-4)
    assert greedy == their_greedy
  texts = instances([("import os\n" * 50,), ("return None",)])
  ours_rolling = ours.loglikelihood_rolling(texts, disable_tqdm=True)
  their_rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
  np.testing.assert_allclose(ours_rolling, their_rolling, rtol=1e-6, atol=1e-4)
