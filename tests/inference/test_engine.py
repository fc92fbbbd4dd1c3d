"""The engine answers each request as if it were alone, and compiles nothing later."""

import random

import jax
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.inference.decoding import generate
from flaxlm.inference.engine import Engine, Request, cut_prompt
from flaxlm.inference.sampling import Sampling
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import make_mesh

V = 64


def make_engine(tiny, slots=3, **changes) -> Engine:
  tiny.model.update(vocab_size=V, max_len=96, **changes)
  model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(3))
  mesh = make_mesh(devices=jax.devices()[:1], data=1)
  engine = Engine(model, mesh, tiny.mesh.rules.to_dict(), np.ones(V, bool), slots)
  engine.warm_up()
  return engine


@pytest.fixture(scope="module")
def engine(make_tiny):
  return make_engine(make_tiny())


def draw(number: int) -> dict:
  """The `number`-th random request, as arguments."""
  chance = random.Random(number)
  return {
    "prompt": [chance.randrange(V) for _ in range(chance.choice([1, 5, 33, 70]))],
    "max_tokens": chance.randint(1, 26),
    "sampling": Sampling(
      chance.choice([0.0, 0.7, 1.3]), chance.choice([0, 5]), chance.choice([1, 0.9]),
      seed=number,
    ),
    "end_ids": frozenset(range(chance.choice([0, 3]))),
    "bias": {chance.randrange(V): 3.0} if chance.random() < 0.3 else {},
    "lists": chance.random() < 0.3,
    "scores_prompt": chance.random() < 0.2,
    "client": chance.choice("abc"),
    "streams": chance.random() < 0.3,
  }  # fmt: skip


def answer(request: Request) -> tuple:
  listed, scored = request.listed, request.prompt_listed
  numbers = listed.log_p, listed.best, scored.log_p, scored.best
  return request.tokens, request.finish, *numbers


def test_greedy_tokens_are_those_of_generate(engine):
  prompt = list(range(7, 27))
  (request,) = engine.run([Request(prompt, 40, Sampling(0.0))])
  rows = generate(engine.model, [prompt], 40, Sampling(0.0), np.ones(V, bool))
  assert request.tokens == np.concatenate(list(rows), axis=1)[0].tolist()
  assert request.finish == "length"


def test_each_answer_is_that_of_the_request_alone(engine):
  together = [Request(**draw(number)) for number in range(24)]
  for request in together[:9]:
    engine.submit(request)
  for request in together[9:]:  # these join while others are served
    engine.step()
    engine.submit(request)
  while engine.step():
    pass
  for number, request in enumerate(together):
    (alone,) = engine.run([Request(**draw(number))])
    assert answer(request) == answer(alone), number
    assert len(request.tokens) <= request.max_tokens
  assert engine.late_compiles == 0
  assert engine.num_busy == engine.num_waiting == 0


@pytest.mark.slow
def test_experts_do_not_tie_one_text_to_another(tiny):
  moe = tiny.model.moe
  moe.update(num_experts=4, experts_per_token=2, expert_dim=16, capacity_factor=0.5)
  engine = make_engine(tiny)
  together = [Request(**draw(number)) for number in range(9)]
  engine.run(together)
  for number, request in enumerate(together):
    (alone,) = engine.run([Request(**draw(number))])
    assert answer(request) == answer(alone), number


def test_scores_of_a_prompt_are_those_of_the_whole_text(engine):
  prompt = [int(x) for x in np.random.default_rng(0).integers(0, V, 75)]
  (request,) = engine.run([Request(prompt, 1, Sampling(0.0), scores_prompt=True)])
  tokens = np.array([prompt])
  out = engine.model(tokens, np.arange(75)[None], np.ones((1, 75), int))
  log_p = np.asarray(jax.nn.log_softmax(engine.model.logits(out.features)[0]))
  expected = log_p[np.arange(74), prompt[1:]]
  np.testing.assert_allclose(request.prompt_listed.log_p, expected, atol=2e-5)
  assert [row[0] for row in request.prompt_listed.best] == log_p[:-1].argmax(1).tolist()


def test_a_common_prefix_is_read_once_and_changes_nothing(engine):
  prefix = [i % V for i in range(64)]
  first, second = [*prefix, 5], [*prefix, 9, 9]
  engine.run([Request(first, 4, Sampling(0.0))])
  (reused,) = engine.run([Request(second, 20, Sampling(0.0))])
  assert reused.reused == 64
  engine.run([Request([int(i)] * 90, 1, Sampling(0.0)) for i in range(3)])  # forget
  (fresh,) = engine.run([Request(second, 20, Sampling(0.0))])
  assert fresh.reused == 0 and fresh.tokens == reused.tokens


def test_a_cancelled_request_leaves_its_slot_and_no_trace(engine):
  keep, gone = Request(**draw(1)), Request([1, 2, 3], 90, Sampling(1.0))
  engine.submit(gone)
  engine.submit(keep)
  for _ in range(3):
    engine.step()
  gone.cancel()
  engine.step()
  assert gone.finish == "cancelled" and len(gone.tokens) < 90
  while engine.step():
    pass
  (alone,) = engine.run([Request(**draw(1))])
  assert answer(keep) == answer(alone)


def test_clients_take_turns(engine):
  order = []
  many = [Request([i], 1, Sampling(0.0), client="many", on_change=order.append)
          for i in range(6)]  # fmt: skip
  few = Request([9], 1, Sampling(0.0), client="few", on_change=order.append)
  engine.run([*many, few])
  assert order.index(few) == 1


@pytest.mark.parametrize(
  ("change", "needle"),
  [
    ({"prompt": []}, "prompt"),
    ({"prompt": [V]}, "prompt"),
    ({"max_tokens": 96}, "context"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"bias": {i: 1.0 for i in range(40)}}, "logit_bias"),
    ({"bias": {-1: 1.0}}, "logit_bias"),
  ],
)
def test_what_cannot_be_served_is_refused_before_it_waits(engine, change, needle):
  given = {"prompt": [1], "max_tokens": 4, "sampling": Sampling(0.0)} | change
  with pytest.raises(ConfigError, match=needle):
    engine.submit(Request(**given))
  assert engine.num_waiting == 0


def test_chunks_follow_from_the_length():
  assert cut_prompt(5) == [(0, 5, 32)]
  assert cut_prompt(160) == [(0, 128, 128), (128, 32, 32)]
  assert cut_prompt(700)[-1] == (672, 28, 32)
