"""What a model is asked gives what the definitions give, one text at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError, DataError
from flaxlm.inference import language_model, text
from flaxlm.inference.language_model import LanguageModel
from flaxlm.models.config import TransformerConfig
from flaxlm.models.heads import label_scores
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import one_device
from flaxlm.tokenizer.chat_template import ChatTemplate
from flaxlm.tokenizer.sentencepiece import Tokenizer


def language_model_of(config, tokenizer, **fields) -> LanguageModel:
  """A model with random weights, large enough that greedy choices are unambiguous."""
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(3))
  model = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model)
  rules = config.mesh.rules.to_dict()
  return LanguageModel(model, tokenizer, one_device(), rules, **fields)


@pytest.fixture(scope="module")
def writer(make_tiny, bpe):
  config = make_tiny()
  config.model.vocab_size = bpe.vocab_size + 24  # rows to spare
  return language_model_of(config, bpe)


@jax.jit
def run(model, tokens_BL, positions_BL, segment_ids_BL):
  return model.logits(model(tokens_BL, positions_BL, segment_ids_BL).features)


def by_hand(model, context, continuation):
  """The definition: one text, in float64, from the logits of the model."""
  ids = [*context, *continuation][-model.config.max_len - 1 :]
  size = len(ids) - 1
  padded = np.zeros((3, 1, model.config.max_len), np.int32)
  padded[:, 0, :size] = ids[:-1], np.arange(size), np.ones(size)
  logits = np.asarray(run(model, *padded)[0], np.float64)
  logits = logits[size - len(continuation) : size]
  log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
  total = sum(row[i] for row, i in zip(log_p, continuation, strict=True))
  return total, logits.argmax(axis=1).tolist() == list(continuation)


def test_scores_are_those_of_the_definition_in_any_order(writer):
  rng = np.random.default_rng(0)
  sizes = [(1, 1), (5, 3), (20, 12), (30, 2), (90, 5), (1, 32), (4, 1), (7, 9)]
  pairs = [[rng.integers(0, 1000, n).tolist() for n in both] for both in sizes]
  likeliest = int(writer.logits(pairs[1][0])[-1].argmax())
  pairs.append((pairs[1][0], [likeliest]))
  scores = writer.score(pairs)
  for (context, continuation), found in zip(pairs, scores, strict=True):
    log_p, is_greedy = by_hand(writer.model, context, continuation)
    assert found.log_p == pytest.approx(log_p, rel=1e-5, abs=1e-5)
    assert found.is_greedy == is_greedy and found.tokens == len(continuation)
  assert scores[-1].is_greedy and not all(found.is_greedy for found in scores)
  again = writer.score(pairs[::-1])[::-1]
  np.testing.assert_allclose([s.log_p for s in again], [s.log_p for s in scores], 1e-5)


def test_a_pair_alone_scores_as_beside_others_in_a_mixture_of_experts(tiny, bpe):
  moe = tiny.model.moe
  moe.num_experts, moe.experts_per_token, moe.expert_dim = 4, 2, 16
  moe.capacity_factor, tiny.model.vocab_size = 0.3, bpe.vocab_size
  model = language_model_of(tiny, bpe)
  rng = np.random.default_rng(0)
  pairs = [rng.integers(0, 1000, (2, 6)).tolist() for _ in range(4)]
  together = model.score(pairs)
  assert together[3].log_p == pytest.approx(model.score(pairs[3:])[0].log_p, rel=1e-5)


def test_logits_are_those_of_the_model_whatever_the_padding(writer):
  ids = list(range(5, 24))
  logits = writer.logits(ids)
  one = np.ones((1, 19), np.int32)
  expected = run(writer.model, np.array([ids]), np.arange(19)[None], one)[0]
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  assert logits.shape == (19, writer.config.vocab_size) and logits.dtype == np.float32
  np.testing.assert_allclose(writer.logits(ids[:7]), logits[:7], atol=1e-4)
  for wrong in ([], [5] * 33, [-1], [writer.config.vocab_size], [0.5]):
    with pytest.raises(ConfigError, match="ids"):
      writer.logits(wrong)


def test_a_pair_is_cut_where_its_tokens_are(writer, bpe):
  begin = [bpe.bos_id]
  assert writer.encode_pair("def", " main") == (
    begin + bpe.encode("def"),
    bpe.encode("def main")[len(bpe.encode("def")) :],
  )
  assert writer.encode_pair("def ", "main") == writer.encode_pair("def", " main")
  assert writer.encode_pair("", "main") == (begin, bpe.encode("main"))
  bare = dataclasses.replace(writer, tokenizer=Tokenizer(bpe.model))
  bare.tokenizer._adds_bos = False  # as in SmolLM2, which has a bos token
  assert bare.encode_pair("def", " main")[0] == bpe.encode("def")
  assert bare.encode_pair("", "main")[0] == begin
  bare.tokenizer.bos_id = -1
  assert bare.encode_pair("", "main")[0] == [bpe.eos_id]
  # One token spans the join: the two are encoded apart.
  before, after = "retu", "rn"
  assert len(bpe.encode("return")) <= len(bpe.encode("retu"))
  assert writer.encode_pair(before, after) == (
    begin + bpe.encode("retu"),
    bpe.encode("rn"),
  )
  for context in ("a", ""):
    with pytest.raises(DataError, match="no tokens"):
      writer.encode_pair(context, "")
  alone = writer.loglikelihood([("def", " main")])[0]
  assert alone == writer.score([writer.encode_pair("def", " main")])[0]


def test_what_cannot_be_scored_is_refused(writer):
  with pytest.raises(ConfigError, match="a pair"):
    writer.score([([], [5])])
  with pytest.raises(ConfigError, match="1 to 32 in the continuation"):
    writer.score([([5], [5] * 33)])
  assert writer.score([([5], [5] * 32)])[0].tokens == 32
  assert writer.loglikelihood([]) == []


def test_texts_are_written_after_prompts_of_texts_or_ids(writer, bpe, monkeypatch):
  monkeypatch.setattr(language_model, "_BATCH_TEXTS", 2)
  before = writer.score([([5], [6, 7])])[0].log_p
  ids = [bpe.bos_id, *bpe.encode("import ")]
  texts = writer.generate(["import ", ids, "import "], max_tokens=9, temperature=0)
  assert len(texts) == 3 and len(set(texts)) == 1 and texts[0]
  drawn = writer.generate(["import "] * 3, max_tokens=9, seed=3)
  assert drawn == writer.generate(["import "] * 3, max_tokens=9, seed=3)
  assert len(set(drawn)) == 3  # also of texts in different batches
  assert writer.generate([]) == []
  # The form for decoding computes the same.
  assert writer.score([([5], [6, 7])])[0].log_p == pytest.approx(before, abs=1e-3)


def test_arguments_of_writing_are_refused_by_name(writer):
  for wrong, named in (
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ["x", ""]}, "stop"),
    ({"when_full": "maybe"}, "when_full"),
  ):
    with pytest.raises(ConfigError, match=f"^{named} cannot"):
      list(writer.stream(["a"], **wrong))
  with pytest.raises(ConfigError, match="a list of texts"):
    writer.generate("a")
  with pytest.raises(ConfigError, match="chat template"):
    writer.chat([{"role": "user", "content": "Hello"}])


class Scripted:
  """Stands for `decoding.generate`: writes given ids, and keeps its arguments."""

  def __init__(self, *rows):
    self.rows = np.array(rows)

  def __call__(self, model, prompts, max_tokens, sampling, allowed_V, when_full):
    self.prompts, self.max_tokens, self.allowed_V = prompts, max_tokens, allowed_V
    yield from np.split(self.rows, self.rows.shape[1], axis=1)


def test_an_answer_ends_with_the_turn(writer, bpe, monkeypatch):
  plain = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  model = dataclasses.replace(writer, template=ChatTemplate(plain))
  messages = [{"role": "user", "content": "Is it?"}]
  script = Scripted(bpe.encode("Yes: it is\nuser: Really?"))
  monkeypatch.setattr(text, "generate", script)
  assert model.chat(messages) == "Yes: it is"
  assert script.prompts == [bpe.encode("user: Is it?\nassistant: ")]
  assert script.max_tokens == writer.config.max_len
  assert (
    model.chat(messages, stop=":", max_tokens=5) == "Yes" and script.max_tokens == 5
  )
  ended = ChatTemplate(plain.replace("m.content", "m.content + '<cls>'"))
  model = dataclasses.replace(writer, template=ended)
  monkeypatch.setattr(
    text, "generate", script := Scripted([*script.rows[0], bpe.cls_id])
  )
  assert model.chat(messages) == "Yes: it is\nuser: Really?"
  assert script.allowed_V[bpe.cls_id] and not script.allowed_V[bpe.sep_id]


def test_a_full_conversation_forgets_its_oldest_turns_if_asked(
  writer, bpe, monkeypatch
):
  plain = "{% for m in messages %}{{ m.content + ',' }}{% endfor %}"
  model = dataclasses.replace(writer, template=ChatTemplate(plain))
  said = [("system", "self"), *[("user", "import"), ("assistant", "return")] * 12]
  messages = [{"role": r, "content": c} for r, c in [*said, ("user", "class")]]
  monkeypatch.setattr(text, "generate", script := Scripted([bpe.eos_id]))
  assert model.chat(messages, when_full="continue") == ""
  (ids,) = script.prompts
  assert 0 < len(ids) <= writer.config.max_len // 2
  kept = bpe.decode(ids)
  assert kept.startswith("self,import,return,") and kept.endswith("return,class,")
  monkeypatch.undo()
  with pytest.raises(ConfigError, match="the prompt"):
    model.chat(messages)


def test_an_encoder_fills_masks_and_embeds_and_writes_nothing(tiny, bpe):
  tiny.model.causal, tiny.model.head, tiny.model.num_segment_types = False, "mlm", 2
  tiny.model.vocab_size = bpe.vocab_size + 24
  model = language_model_of(tiny, bpe)
  (best,) = model.fill_mask("import <mask> as x", top_k=3)
  ids = [
    bpe.cls_id,
    *bpe.encode("import "),
    bpe.mask_id,
    *bpe.encode(" as x"),
    bpe.sep_id,
  ]
  logits = model.logits(ids)[ids.index(bpe.mask_id)]
  is_text = text.text_ids(bpe, model.config.vocab_size)
  p = np.exp(logits) / np.exp(logits).sum()
  order = np.argsort(np.where(is_text, -p, 0))[:3]
  assert best == [
    (bpe.decode([i]).strip(), pytest.approx(p[i], rel=1e-3)) for i in order
  ]
  found = model.embed(["import sys", "", "def main"])
  assert found.shape == (3, 32) and found.dtype == np.float32
  np.testing.assert_allclose(model.embed(["def main"])[0], found[2], atol=1e-5)
  assert not np.allclose(model.embed(["def main"], pooling="first")[0], found[2])
  with pytest.raises(ConfigError, match="<mask> in the text"):
    model.fill_mask("import sys")
  with pytest.raises(ConfigError, match=r"a text.*\n.*152 tokens"):
    model.embed(["import sys\n" * 30])
  for ask in (model.generate, model.loglikelihood, model.classify):
    with pytest.raises(ConfigError, match=r"an encoder with model\.head=mlm"):
      ask([("a", "b")])


def test_classes_of_texts_and_pairs(tiny, bpe):
  model = tiny.model
  model.causal, model.head, model.num_segment_types = False, "sequence", 2
  model.vocab_size, model.num_labels = bpe.vocab_size, 3
  asked = language_model_of(tiny, bpe, labels=("bad", "fair", "good"))
  alone, pair = asked.classify(["import", ("import", "sys")])
  for found in (alone, pair):
    assert list(found) == ["bad", "fair", "good"]
    assert sum(found.values()) == pytest.approx(1)
  ids = [bpe.cls_id, *bpe.encode("import"), bpe.sep_id, *bpe.encode("sys"), bpe.sep_id]
  types = np.array([[0] * (2 + len(bpe.encode("import"))) + [1] * 9])[:, : len(ids)]
  one = np.ones_like(types)
  out = asked.model(
    np.array([ids]), np.arange(len(ids))[None], one, token_types_BL=types
  )
  scores = label_scores(asked.model, out.features, {"segment_ids": one})[0, 0]
  np.testing.assert_allclose(list(pair.values()), jax.nn.softmax(scores), rtol=1e-3)
  with pytest.raises(ConfigError, match=r"logits cannot.*\n.*head=sequence"):
    asked.logits([5])
  with pytest.raises(ConfigError, match=r"classify\(texts\) or embed"):
    asked.generate(["a"])


def test_without_a_tokenizer_ids_are_scored(writer):
  model = dataclasses.replace(writer, tokenizer=None)
  assert model.logits([5]).shape == (1, writer.config.vocab_size)
  for ask in (lambda: model.encode("a"), lambda: model.generate(["a"])):
    with pytest.raises(ConfigError, match="without a tokenizer"):
      ask()
