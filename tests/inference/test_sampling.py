"""Each row draws by its own settings, whatever the settings of other rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.errors import ConfigError
from flaxlm.inference.sampling import (
  MAX_SORTED,
  Sampling,
  SamplingRows,
  nucleus,
  sample,
)

sample_rows = jax.jit(sample)


def draws(sampling, logits, n=4000):
  keys = jax.random.split(jax.random.key(0), n)
  rows = SamplingRows.stack([sampling] * n)
  tokens = sample_rows(jnp.broadcast_to(logits[None], (n, len(logits))), keys, rows)
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


def test_the_nucleus_is_the_shortest_beginning_of_the_sorted_tokens():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 500)) * np.array([[0.01], [1], [3], [10], [40], [0]])
  p = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
  for mass in (0.001, 0.3, 0.9, 0.999):
    kept = np.asarray(nucleus(jnp.asarray(p), np.full(6, mass, np.float32)))
    for row, kept_row in zip(p[:-1], kept, strict=False):
      down = np.sort(row.astype(np.float64))[::-1]
      least = down[np.searchsorted(np.cumsum(down), mass)]
      np.testing.assert_array_equal(kept_row, np.where(row >= least, row, 0))
    np.testing.assert_array_equal(kept[-1], p[-1])  # all equal: all stay


def test_a_nucleus_of_mass_1_is_all():
  p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 500)))
  kept = nucleus(p, jnp.array([1.0, 0.5, 1.0]))
  np.testing.assert_array_equal(kept[::2], p[::2])
  assert 0 < jnp.count_nonzero(kept[1]) < 500


@pytest.mark.parametrize("top_k", [1, 5, 128, 129, 1500, 2**40])
def test_top_k_keeps_the_likeliest(top_k):
  """Among equal scores the first stay, as in a stable sort; above 128 all of them."""
  scores = np.random.default_rng(0).integers(-40, 0, 3000) / 8
  kept = np.argsort(-scores, kind="stable")[:top_k]
  if top_k > MAX_SORTED:
    kept = np.flatnonzero(scores >= scores[kept[-1]])
  found = draws(Sampling(temperature=9.0, top_k=top_k), jnp.asarray(scores), n=200)
  assert set(np.flatnonzero(found)) <= set(kept.tolist())
  if top_k <= 5:
    assert set(np.flatnonzero(found)) == set(kept.tolist())


def test_a_large_top_k_comes_before_the_nucleus():
  logits = np.random.default_rng(2).normal(size=400).astype(np.float32)
  down = np.argsort(-logits)
  p = np.exp(logits[down[:200]].astype(np.float64))
  kept = down[: np.searchsorted(np.cumsum(p / p.sum()), 0.5) + 1]
  found = draws(Sampling(top_k=200, top_p=0.5), jnp.asarray(logits))
  assert set(np.flatnonzero(found)) == set(kept.tolist())


def test_a_sorted_row_draws_as_numpy_does():
  """A seed keeps its text: tokens go by probability with top_k, by id without."""
  logits = np.random.default_rng(1).normal(size=300).astype(np.float32)
  for top_k in (0, 7, 128):
    settings = [Sampling(0.8, top_k=top_k, seed=seed) for seed in range(50)]
    rows = SamplingRows.stack(settings)
    counts = jnp.full(50, 3)
    tokens = sample_rows(jnp.tile(logits, (50, 1)), rows.keys(counts), rows)
    ids = np.argsort(-logits, kind="stable")[:top_k] if top_k else np.arange(300)
    sums = np.cumsum(np.exp(logits[ids].astype(np.float64) / 0.8))
    for seed, token in enumerate(tokens.tolist()):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 3)
      at = float(jax.random.uniform(key)) * sums[-1]
      assert token == ids[np.searchsorted(sums, at, side="right")]


@pytest.mark.parametrize(
  "wrong",
  [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}],
)
def test_impossible_sampling_is_refused(wrong):
  with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} cannot"):
    Sampling(**wrong)
