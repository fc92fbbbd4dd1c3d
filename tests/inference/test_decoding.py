"""Cached sampling equals recomputing the text each token; knobs do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.inference.decoding import for_decoding, generate, round_up
from flaxlm.inference.sampling import PORTION, Sampling, nucleus, sample
from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import Turned, project, turn
from flaxlm.models.transformer import Transformer

PROMPTS = [[5, 9, 11], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
ALL = np.ones(64, bool)


@pytest.fixture(params=["rope", "learned"])
def model(request, tiny):
  tiny.model.positions = request.param
  model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(3))
  # Large weights: logits that differ enough for greedy choices to be unambiguous.
  return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model)


def uncached(model, prompt, num_tokens):
  """Greedy decoding by running the whole text again for each token."""
  run = jax.jit(lambda model, *batch: model.logits(model(*batch)[0]))
  text = list(prompt)
  for _ in range(num_tokens):
    tokens = jnp.array([text + [0] * (32 - len(text))])
    logits = run(model, tokens, jnp.arange(32)[None], jnp.ones((1, 32), jnp.int32))
    text.append(int(jnp.argmax(logits[0, len(text) - 1])))
  return text[len(prompt) :]


def written(*args, **kwargs):
  return np.concatenate(list(generate(*args, **kwargs)), axis=1)


def test_greedy_equals_uncached_decoding_for_a_batch_of_lengths(model):
  rows = written(model, PROMPTS, 13, Sampling(temperature=0), ALL)
  assert rows.shape == (3, 13)
  for prompt, row in zip(PROMPTS, rows, strict=True):
    assert row.tolist() == uncached(model, prompt, 13)


def test_a_seed_decides_and_the_size_of_portions_does_not(model):
  sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=4)
  rows = written(model, PROMPTS, 20, sampling, ALL)
  np.testing.assert_array_equal(rows, written(model, PROMPTS, 20, sampling, ALL))
  np.testing.assert_array_equal(rows[:, :5], written(model, PROMPTS, 5, sampling, ALL))
  other = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=5)
  assert not np.array_equal(rows, written(model, PROMPTS, 20, other, ALL))
  # A row does not depend on its neighbours in the batch.
  np.testing.assert_array_equal(
    rows[:1], written(model, PROMPTS[:1], 20, sampling, ALL)
  )


def test_a_text_may_outgrow_the_context(model):
  rows = written(model, [[5]], 70, Sampling(temperature=0), ALL)
  assert rows.shape == (1, 70)
  portions = [p.shape[1] for p in generate(model, [[5]], 70, Sampling(seed=1), ALL)]
  assert sum(portions) == 70 and set(portions[:-1]) == {PORTION}


def test_only_allowed_ids_are_drawn(model):
  allowed = np.zeros(64, bool)
  allowed[[7, 33]] = True
  rows = written(model, PROMPTS, 16, Sampling(temperature=2.0), allowed)
  assert set(rows.reshape(-1).tolist()) == {7, 33}


def draws(sampling, logits, n=4000):
  keys = jax.random.split(jax.random.key(0), n)
  tokens = sample(jnp.broadcast_to(logits[None], (n, len(logits))), keys, sampling)
  return np.bincount(tokens, minlength=len(logits)) / n


def test_sampling_follows_the_distribution():
  probabilities = np.array([0.5, 0.3, 0.15, 0.05])
  logits = jnp.log(probabilities)[jnp.array([2, 0, 3, 1])]
  shuffled = probabilities[[2, 0, 3, 1]]
  np.testing.assert_allclose(draws(Sampling(), logits), shuffled, atol=0.03)
  squared = shuffled**2 / (shuffled**2).sum()
  np.testing.assert_allclose(
    draws(Sampling(temperature=0.5), logits), squared, atol=0.03
  )
  top2 = np.array([0, 0.625, 0, 0.375])
  np.testing.assert_allclose(draws(Sampling(top_k=2), logits), top2, atol=0.03)
  # 0.5 + 0.3 do not reach 0.85, so the third stays too.
  top3 = np.array([0.15, 0.5, 0, 0.3]) / 0.95
  np.testing.assert_allclose(draws(Sampling(top_p=0.85), logits), top3, atol=0.03)
  assert draws(Sampling(top_p=0.01), logits)[1] == 1.0
  assert draws(Sampling(temperature=0), logits)[1] == 1.0
  assert draws(Sampling(temperature=1e-37), 1000 * logits)[1] == 1.0


def test_the_nucleus_is_the_shortest_beginning_of_the_sorted_words():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 500)) * np.array([[0.01], [1], [3], [10], [40], [0]])
  p = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
  for mass in (0.001, 0.3, 0.9, 0.999):
    kept = np.asarray(nucleus(jnp.asarray(p), mass))
    for row, kept_row in zip(p[:-1], kept, strict=False):
      down = np.sort(row.astype(np.float64))[::-1]
      least = down[np.searchsorted(np.cumsum(down), mass)]
      np.testing.assert_array_equal(kept_row, np.where(row >= least, row, 0))
    np.testing.assert_array_equal(kept[-1], p[-1])  # all equal: none goes alone


@pytest.mark.parametrize("quantize", ["none", "fp8", "int8"])
@pytest.mark.parametrize("shape, num_summed", [((32, 4, 8), 1), ((4, 8, 48), 2)])
def test_a_turned_weight_gives_the_same_product(quantize, shape, num_summed):
  weight = nnx.Param(jax.random.normal(jax.random.key(0), shape), axes=(None,) * 3)
  x = jax.random.normal(jax.random.key(1), (5, *shape[:num_summed]))
  turned = turn(weight, num_summed)
  assert turned[...].shape == (*shape[num_summed:], *shape[:num_summed])
  plain = project(x, weight, num_summed, quantize)
  assert plain.shape == (5, *shape[num_summed:])
  np.testing.assert_allclose(
    project(x, turned, num_summed, quantize), plain, rtol=1e-5, atol=1e-5
  )


def test_a_model_for_decoding_is_turned_and_split_and_the_stack_is_left(model):
  ours = for_decoding(model)
  assert len(ours.blocks) == model.config.num_layers
  assert isinstance(ours.blocks[1].mlp.down, Turned)
  np.testing.assert_array_equal(
    ours.blocks[1].mlp.down[...], model.blocks.mlp.down[...][1].T
  )
  assert not isinstance(model.blocks.mlp.down, Turned)


def test_lengths_are_rounded_to_few_numbers_a_little_above():
  assert [round_up(n) for n in (1, 3, 100, 129, 160, 161, 1025)] == [
    1, 4, 128, 160, 160, 192, 1280,
  ]  # fmt: skip
  assert all(n <= round_up(n) <= max(1.25 * n + 32, 128) for n in range(1, 3000))


@pytest.mark.parametrize(
  "wrong",
  [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}],
)
def test_impossible_sampling_is_refused(wrong):
  with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
    Sampling(**wrong)
