"""Cached decoding = recomputing the text for each token; rows are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.inference.decoding import (
  PORTION,
  decode,
  for_decoding,
  generate,
  round_up,
)
from flaxlm.inference.sampling import Sampling
from flaxlm.models.config import TransformerConfig
from flaxlm.models.layers import Transposed, project, transpose_weight
from flaxlm.models.transformer import Transformer

PROMPTS = [[5, 9, 11], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
ALL = np.ones(64, bool)


@pytest.fixture(params=["rope", "learned"])
def model(request, tiny):
  tiny.model.positions = request.param
  model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(3))
  # Large weights make logits differ enough that greedy choices are unambiguous.
  return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model)


def uncached(model, prompt, num_tokens):
  """Decodes greedily by running the whole text again for each token."""
  run = jax.jit(lambda model, *batch: model.logits(model(*batch)[0]))
  text, made, context = list(prompt), [], model.config.max_len
  positions = jnp.arange(context)[None]
  for _ in range(num_tokens):
    if len(text) > context:
      text = text[-(context // 2) :]
    tokens = jnp.array([text + [0] * (context - len(text))])
    logits = run(model, tokens, positions, jnp.ones_like(positions))
    made.append(int(jnp.argmax(logits[0, len(text) - 1])))
    text.append(made[-1])
  return made


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


SETTINGS = [
  Sampling(temperature=0, top_k=3),
  Sampling(temperature=0.7, seed=1),
  Sampling(temperature=1.5, top_k=5, seed=2),
  Sampling(top_p=0.6, seed=3, index=4),
  Sampling(top_k=40, top_p=0.9, seed=-4),
]


@pytest.mark.parametrize("model", ["rope"], indirect=True)
def test_a_row_depends_on_its_own_settings_alone(model):
  prompts = [PROMPTS[0]] * len(SETTINGS)
  together = written(model, prompts, 20, SETTINGS, ALL)
  assert len({tuple(row) for row in together.tolist()}) == len(SETTINGS)
  for settings, row in zip(SETTINGS, together, strict=True):
    alone = written(model, prompts[:1], 20, [settings], ALL)
    np.testing.assert_array_equal(alone[0], row)


@pytest.mark.parametrize("model", ["rope"], indirect=True)
def test_other_settings_do_not_compile_again(model):
  written(model, PROMPTS[:1], 9, Sampling(), ALL)
  programs = decode._cache_size()
  compiled = []

  def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for settings in SETTINGS:
      written(model, PROMPTS[:1], 9, [settings], ALL)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert decode._cache_size() == programs and not compiled


@pytest.fixture
def long_prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 64, size).tolist() for size in (17, 9, 31)]


def test_the_whole_context_is_used_and_a_text_may_outgrow_it(model, long_prompts):
  """Also where the prompts are padded, and where other rows outgrow it earlier."""
  prompts = [*long_prompts[:2], [*long_prompts[2], 7]]
  args = 28, Sampling(temperature=0), ALL, "continue"
  rows = written(model, prompts, *args)
  np.testing.assert_array_equal(written(model, prompts[:1], *args), rows[:1])
  for prompt, row in zip(prompts, rows, strict=True):
    assert row.tolist() == uncached(model, prompt, 28)
  many = generate(model, [[5]], 70, Sampling(seed=1), ALL, "continue")
  # 32 tokens from a text of 1 to one of 33, then 17 from each of 16.
  assert [p.shape[1] for p in many] == [PORTION] * 4 + [8, 8, 1] * 2 + [4]


@pytest.mark.parametrize("model", ["learned"], indirect=True)
def test_a_full_context_ends_a_text_and_no_other(model, long_prompts):
  rows = written(model, long_prompts, 28, Sampling(temperature=0), ALL)
  assert rows.shape == (3, 32 - 9)
  for prompt, row in zip(long_prompts, rows, strict=True):
    size = 32 - len(prompt)
    assert row[:size].tolist() == uncached(model, prompt, size)
    assert (row[size:] == -1).all()
  with pytest.raises(ConfigError, match=r"32 tokens\n.*at most 31"):
    written(model, [[5], [5] * 32], 4, Sampling(temperature=0), ALL)
  with pytest.raises(ConfigError, match="stop or continue"):
    written(model, [[5]], 4, Sampling(temperature=0), ALL, "maybe")


def test_the_shortest_contexts(tiny):
  greedy = Sampling(temperature=0)
  for tiny.model.max_len in (2, 3):
    model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(3))
    row = written(model, [[5]], 7, greedy, ALL, "continue")[0]
    assert row.tolist() == uncached(model, [5], 7)
    row = written(model, [[5]], 7, greedy, ALL)[0]
    assert row.tolist() == uncached(model, [5], tiny.model.max_len - 1)
  tiny.model.max_len = 1
  model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(3))
  with pytest.raises(ConfigError, match="at least 2"):
    written(model, [[5]], 7, greedy, ALL)


def test_only_allowed_ids_are_drawn(model):
  allowed = np.zeros(64, bool)
  allowed[[7, 33]] = True
  rows = written(model, PROMPTS, 16, Sampling(temperature=2.0), allowed)
  assert set(rows.reshape(-1).tolist()) == {7, 33}


@pytest.mark.parametrize("quantize", ["none", "fp8", "int8"])
@pytest.mark.parametrize("shape, num_summed", [((32, 4, 8), 1), ((4, 8, 48), 2)])
def test_a_turned_weight_gives_the_same_product(quantize, shape, num_summed):
  weight = nnx.Param(jax.random.normal(jax.random.key(0), shape), axes=(None,) * 3)
  x = jax.random.normal(jax.random.key(1), (5, *shape[:num_summed]))
  turned = transpose_weight(weight, num_summed)
  assert turned[...].shape == (*shape[num_summed:], *shape[:num_summed])
  plain = project(x, weight, num_summed, quantize)
  assert plain.shape == (5, *shape[num_summed:])
  np.testing.assert_allclose(
    project(x, turned, num_summed, quantize), plain, rtol=1e-5, atol=1e-5
  )


def test_a_model_for_decoding_is_turned_and_split_and_the_stack_is_left(model):
  ours = for_decoding(model)
  assert len(ours.blocks) == model.config.num_layers
  assert isinstance(ours.blocks[1].mlp.down, Transposed)
  np.testing.assert_array_equal(
    ours.blocks[1].mlp.down[...], model.blocks.mlp.down[...][1].T
  )
  assert not isinstance(model.blocks.mlp.down, Transposed)


def test_lengths_are_rounded_to_few_numbers_a_little_above():
  assert [round_up(n) for n in (1, 3, 100, 129, 160, 161, 1025)] == [
    1, 4, 128, 160, 160, 192, 1280,
  ]  # fmt: skip
  assert all(n <= round_up(n) <= max(1.25 * n + 32, 128) for n in range(1, 3000))
