"""A task on a model: what is known to be right, and what nobody has learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flaxlm.evals.requests import MaskedWords, encode_pairs
from flaxlm.evals.run import fitting_length, prepare_task, run_task
from flaxlm.evals.scoring import Scorer
from flaxlm.evals.tasks import Item, Task, TaskFile
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import one_device
from flaxlm.parallel.sharding import use_mesh
from flaxlm.training.losses import losses

NAMES = ["os", "re", "sys", "json", "time", "math", "csv", "cmd", "bdb", "dis"]
FACTS = {a: b for a, b in zip(NAMES, NAMES[3:] + NAMES[:3], strict=True)}


def facts_task(gold=0, count=60):
  """Asks what follows "A ->": the right name, or another one."""
  draw, items = np.random.default_rng(0), []
  for i in range(count):
    name = NAMES[i % len(NAMES)]
    wrong = draw.choice([x for x in NAMES if x != FACTS[name]])
    options = tuple((f"{name} ->", f" {x}") for x in (FACTS[name], wrong))
    items.append(Item(f"line {i}", options, gold))
  return Task("facts", TaskFile("choice", "none"), "0" * 64, items)


@pytest.fixture(scope="module")
def untrained(make_tiny):
  config = make_tiny()
  config.model.vocab_size = 1024
  with use_mesh(one_device(), config.mesh.rules.to_dict()):
    yield Transformer(TransformerConfig(**config.model), nnx.Rngs(0))


def judge(model, bpe, task):
  prepared = prepare_task(task, bpe, model.config, 32)
  return run_task(prepared, Scorer(model, 8, 32, bpe.vocab_size), model)


def test_an_untrained_model_is_at_chance(untrained, bpe):
  result = judge(untrained, bpe, facts_task(count=200))
  metrics, chance = result["metrics"], result["chance"]["unigram"]
  error = max(metrics["acc_se"], chance["acc_se"])
  assert abs(metrics["acc"] - chance["acc"]) < 4 * error
  assert metrics["n"] == 200 and 0.3 < metrics["acc"] < 0.7
  assert metrics["bits_per_byte"] == pytest.approx(
    np.log2(bpe.vocab_size) * _tokens(bpe) / _bytes(), rel=0.1
  )


def _tokens(bpe) -> float:
  items = facts_task(count=200).items
  return sum(len(bpe.encode(item.options[0][1])) for item in items)


def _bytes() -> int:
  return sum(len(item.options[0][1]) for item in facts_task(count=200).items)


@pytest.mark.slow
def test_what_was_learnt_is_known_and_its_contrary_is_not(untrained, bpe):
  rows = [[bpe.bos_id, *bpe.encode(f"{a} -> {b}")] for a, b in FACTS.items()]
  size = max(map(len, rows))
  tokens, targets = np.zeros((2, len(rows), size), np.int32)
  targets -= 1
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    targets[i, : len(row) - 1] = row[1:]
  positions = np.tile(np.arange(size, dtype=np.int32), (len(rows), 1))
  batch = {
    "tokens": tokens,
    "targets": targets,
    "positions": positions,
    "segment_ids": np.ones_like(tokens),
  }
  tx = optax.adam(3e-3)

  @jax.jit
  def step(model, state):
    def loss(model):
      return losses(model, batch, scale=1 / jnp.sum(targets >= 0)).total

    updates, state = tx.update(jax.grad(loss)(model), state)
    return optax.apply_updates(model, updates), state

  model, state = untrained, tx.init(untrained)
  for _ in range(200):
    model, state = step(model, state)
  right = judge(model, bpe, facts_task())
  assert right["metrics"]["acc"] == 1.0
  assert right["metrics"]["bits_per_byte"] < 0.1
  assert judge(model, bpe, facts_task(gold=1))["metrics"]["acc"] == 0.0


@pytest.mark.slow
def test_a_masked_model_is_scored_token_by_token(make_tiny, bpe):
  config = make_tiny()
  config.model.vocab_size, config.model.causal = 1024, False
  config.model.head, config.model.head_norm = "mlm", True
  with use_mesh(one_device(), config.mesh.rules.to_dict()):
    model = Transformer(TransformerConfig(**config.model), nnx.Rngs(0))
    task = facts_task(count=5)
    result = judge(model, bpe, task)
    words = MaskedWords(bpe)
    for item, nats in zip(task.items, result["items"]["nats"], strict=True):
      (request,), _ = encode_pairs(bpe, [item.options[0]])
      total = 0.0
      for segment in words.segments(request, 32):
        row = jnp.asarray(segment.tokens)[None]
        positions = jnp.arange(row.shape[1])[None]
        features = model(row, positions, jnp.ones_like(row)).features
        logits = model.logits(features)[0, segment.places[0], : bpe.vocab_size]
        total -= float(jax.nn.log_softmax(logits)[segment.targets[0]])
      assert nats == pytest.approx(total, abs=1e-4)
  assert result["method"] == "pll" and result["metrics"]["n"] == 5


def test_contexts_that_lose_their_beginning_are_counted(untrained, bpe):
  long = "import os\n" * 40
  items = [
    Item("1", ((long, " x"), ("a", " y"))),
    Item("2", (("b", " x"), ("c", " y"))),
  ]
  task = Task("cut", TaskFile("choice", "none"), "0" * 64, items)
  prepared = prepare_task(task, bpe, untrained.config, 32)
  assert prepared.cut == 1 and prepared.longest == 32
  assert [owner for owner in prepared.owners] == [0, 1, 2, 3]


def test_rows_have_few_lengths():
  assert [fitting_length(n) for n in (1, 128, 129, 1000)] == [128, 128, 256, 1024]
