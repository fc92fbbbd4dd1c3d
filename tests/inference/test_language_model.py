"""What a model is asked gives what the definitions give, one text at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError, DataError
from flaxlm.inference.language_model import LanguageModel
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import one_device


def language_model(config, tokenizer, **fields) -> LanguageModel:
  """A model with random weights, large enough that greedy choices are unambiguous."""
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(3))
  model = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model)
  rules = config.mesh.rules.to_dict()
  return LanguageModel(model, tokenizer, one_device(), rules, **fields)


@pytest.fixture
def writer(tiny, bpe):
  tiny.model.vocab_size = bpe.vocab_size + 24  # rows to spare
  return language_model(tiny, bpe)


def by_hand(model, context, continuation):
  """The definition: one text, in float64, from the logits of the model."""
  ids = [*context, *continuation][-model.config.max_len - 1 :]
  tokens = jnp.array([ids[:-1]])
  positions = jnp.arange(len(ids) - 1)[None]
  x = model(tokens, positions, jnp.ones_like(tokens)).features
  logits = np.asarray(model.logits(x)[0], np.float64)[-len(continuation) :]
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


def test_logits_are_those_of_the_model_whatever_the_padding(writer):
  ids = list(range(5, 24))
  logits = writer.logits(ids)
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
  # One token spans the join: the two are encoded apart.
  before, after = "retu", "rn"
  assert len(bpe.encode("return")) <= len(bpe.encode("retu"))
  assert writer.encode_pair(before, after) == (
    begin + bpe.encode("retu"),
    bpe.encode("rn"),
  )
  for text in ("a", ""):
    with pytest.raises(DataError, match="no tokens"):
      writer.encode_pair(text, "")
  alone = writer.loglikelihood([("def", " main")])[0]
  assert alone == writer.score([writer.encode_pair("def", " main")])[0]


def test_what_cannot_be_scored_is_refused(writer):
  with pytest.raises(ConfigError, match="a pair"):
    writer.score([([], [5])])
  with pytest.raises(ConfigError, match="1 to 32 in the continuation"):
    writer.score([([5], [5] * 33)])
  assert writer.score([([5], [5] * 32)])[0].tokens == 32
  assert writer.loglikelihood([]) == []
