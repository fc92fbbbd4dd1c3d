"""Chooses the next token from logits: greedy, temperature, top-k, top-p.

The settings are arrays with one value per row, so one compiled program serves them all,
and a row gets the same token whatever the other rows ask for.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError

# Up to this top_k the likeliest are sorted. The whole vocabulary never is: that takes a
# CPU 50 ms per row.
MAX_SORTED = 128


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens of one text are drawn. Temperature 0 takes the likeliest (greedy).

  Texts with the same seed and prompt are equal unless their `index` differs.
  """

  temperature: float = 1.0
  top_k: int = 0  # only among the k likeliest; 0 = all
  top_p: float = 1.0  # only among the likeliest that together have this probability
  seed: int = 0  # its low 32 bits count
  index: int = 0  # of the text, among those with this seed

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ConfigError("temperature", self.temperature, "a number from 0 up", "0.8")
    if self.top_k < 0:
      raise ConfigError("top_k", self.top_k, "0 (all) or a number of tokens", "50")
    if not 0 < self.top_p <= 1:
      raise ConfigError("top_p", self.top_p, "a probability above 0, at most 1", "0.95")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
  """The `Sampling` of each row of a batch, as arrays."""

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  seed_B: jax.Array
  index_B: jax.Array

  @classmethod
  def stack(cls, settings: Sequence[Sampling]) -> "SamplingRows":
    return cls(
      np.array([row.temperature for row in settings], np.float32),
      np.array([min(row.top_k, 2**31 - 1) for row in settings], np.int32),
      np.array([row.top_p for row in settings], np.float32),
      np.array([row.seed & 0xFFFFFFFF for row in settings], np.uint32),
      np.array([row.index for row in settings], np.uint32),
    )

  def keys(self, count_B: jax.Array) -> jax.Array:
    """Returns the key of each row's `count_B`-th token, whatever the other rows are."""

    def key(seed, index, count):
      return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), count)

    return jax.vmap(key)(self.seed_B, self.index_B, count_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, rows: SamplingRows) -> jax.Array:
  """Draws one token id per row, int32 B.

  What no row asks for is skipped; what is computed for one row changes no other.
  """
  greedy_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
  uniform_B = jax.vmap(jax.random.uniform)(keys_B)
  is_sorted_B = (rows.top_k_B > 0) & (rows.top_k_B <= MAX_SORTED)

  def choose(token_B, asks_B, draws):
    drawn_B = jax.lax.cond(
      jnp.any(asks_B), draws, lambda *_: token_B, logits_BV, uniform_B, rows
    )
    return jnp.where(asks_B, drawn_B, token_B)

  is_warm_B = rows.temperature_B > 0
  token_B = choose(greedy_B, is_warm_B & is_sorted_B, _draw_sorted)
  return choose(token_B, is_warm_B & ~is_sorted_B, _draw_from_all)


def _draw_sorted(logits_BV, uniform_B, rows: SamplingRows) -> jax.Array:
  """Draws among the `top_k` likeliest, from the likeliest down."""
  size = min(MAX_SORTED, logits_BV.shape[1])
  best_BK, ids_BK = jax.lax.top_k(_scale(logits_BV, rows), size)
  is_kept_BK = jnp.arange(size)[None, :] < rows.top_k_B[:, None]
  p_BK = jax.nn.softmax(jnp.where(is_kept_BK, best_BK, -jnp.inf))
  choice_B = _draw(nucleus(p_BK, rows.top_p_B), uniform_B)
  return jnp.take_along_axis(ids_BK, choice_B[:, None], axis=1)[:, 0]


def _draw_from_all(logits_BV, uniform_B, rows: SamplingRows) -> jax.Array:
  """Draws in the order of ids; tokens as likely as the `top_k`-th stay too."""
  p_BV = jax.nn.softmax(_scale(logits_BV, rows))

  def keep_top_k(p_BV):
    kept_BV = _shortest(p_BV, lambda p: jnp.count_nonzero(p, axis=1) >= rows.top_k_B)
    kept_BV = kept_BV / jnp.sum(kept_BV, axis=1, keepdims=True)
    return jnp.where(rows.top_k_B[:, None] > 0, kept_BV, p_BV)

  p_BV = jax.lax.cond(jnp.any(rows.top_k_B > MAX_SORTED), keep_top_k, lambda p: p, p_BV)
  p_BV = jax.lax.cond(
    jnp.any(rows.top_p_B < 1), lambda p: nucleus(p, rows.top_p_B), lambda p: p, p_BV
  )
  return _draw(p_BV, uniform_B)


def _scale(logits_BV, rows: SamplingRows) -> jax.Array:
  # Relative to the largest, so that a tiny temperature gives no infinity.
  logits_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
  return logits_BV / jnp.where(rows.temperature_B > 0, rows.temperature_B, 1)[:, None]


def nucleus(p_BV: jax.Array, mass_B: jax.Array) -> jax.Array:
  """Keeps the likeliest that together have probability `mass_B`; zeroes the others.

  Tokens as likely as the last of them stay too; a mass of 1 keeps all (Holtzman et al.
  2020).
  """
  kept_BV = _shortest(p_BV, lambda p: jnp.sum(p, axis=1) >= mass_B)
  return jnp.where(mass_B[:, None] < 1, kept_BV, p_BV)


def _shortest(p_BV: jax.Array, is_enough: Callable) -> jax.Array:
  """Keeps the fewest of the likeliest that are enough; zeroes the others.

  Nothing is sorted, which takes a CPU ten times as long. The smallest probability that
  stays is found by bisection over the floats from 0 to 1, which are in the order of
  their bits.
  """

  def halve(_, bounds):
    low_B, high_B = bounds  # `low` leaves enough, `high` does not
    mid_B = (low_B + high_B) // 2
    enough_B = is_enough(kept(mid_B))
    return jnp.where(enough_B, mid_B, low_B), jnp.where(enough_B, high_B, mid_B)

  def kept(least_B):
    least_B = jax.lax.bitcast_convert_type(least_B, jnp.float32)
    return jnp.where(p_BV >= least_B[:, None], p_BV, 0)

  above_1 = int(np.float32(1).view(np.int32)) + 1
  bounds = jnp.zeros(len(p_BV), jnp.int32), jnp.full(len(p_BV), above_1, jnp.int32)
  return kept(jax.lax.fori_loop(0, above_1.bit_length(), halve, bounds)[0])


def _draw(p_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """Returns an index per row, int32 B, in proportion to `p_BV`, whatever its sum."""
  sums_BV = jnp.cumsum(p_BV, axis=1)
  at_B = uniform_B * sums_BV[:, -1]
  # The first sum above; never an index of probability 0, however sums were rounded.
  hit_BV = jnp.where(p_BV > 0, (sums_BV > at_B[:, None]).astype(jnp.int32), -1)
  return jnp.argmax(hit_BV, axis=1).astype(jnp.int32)
