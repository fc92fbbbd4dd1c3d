"""Chooses the next token from logits: greedy, temperature, top-k, top-p.

The settings are arrays with one value per row, so one compiled program serves them all,
and a row gets the same token whatever the other rows ask for.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError

# A row is served by the first of these that is not below its top_k; above the last, the
# whole vocabulary is sorted, which takes a CPU 50 ms per row.
TOP_K_SIZES = (128, 1024)


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
      raise ConfigError("--temperature", self.temperature, "a number from 0 up", "0.8")
    if self.top_k < 0:
      raise ConfigError("--top_k", self.top_k, "0 (all) or a number of tokens", "50")
    if not 0 < self.top_p <= 1:
      raise ConfigError(
        "--top_p", self.top_p, "a probability above 0, at most 1", "0.95"
      )


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
    """Returns the key of each row's token number `count_B`: no other row enters it."""

    def key(seed, index, count):
      return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), count)

    return jax.vmap(key)(self.seed_B, self.index_B, count_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, rows: SamplingRows) -> jax.Array:
  """Draws one token id per row, int32 B.

  There is one way for all tokens and one per size of top-k. Each is taken only when a
  row asks for it, and changes the token of no other row.
  """
  V = logits_BV.shape[1]
  token_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
  top_k_B = jnp.minimum(rows.top_k_B, V)

  def draw_where_asked(token_B):
    for low, high in itertools.pairwise((-1, 0, *(k for k in TOP_K_SIZES if k < V), V)):
      asks_B = (rows.temperature_B > 0) & (low < top_k_B) & (top_k_B <= high)
      way = functools.partial(_draw_tokens, size=high)
      inputs = token_B, asks_B, logits_BV, keys_B, rows
      token_B = jax.lax.cond(jnp.any(asks_B), way, lambda token_B, *_: token_B, *inputs)
    return token_B

  warm = jnp.any(rows.temperature_B > 0)
  return jax.lax.cond(warm, draw_where_asked, lambda token_B: token_B, token_B)


def _draw_tokens(token_B, asks_B, logits_BV, keys_B, rows: SamplingRows, size: int):
  """Draws for the rows that ask, among their `size` likeliest at most; 0 is all."""
  # From the largest down: a tiny temperature makes no infinity of it.
  scores_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
  scores_BV = scores_BV / jnp.where(asks_B, rows.temperature_B, 1)[:, None]
  ids_BV = None
  if size:
    scores_BV, ids_BV = jax.lax.top_k(scores_BV, size)
    inside_BV = jnp.arange(size)[None, :] < rows.top_k_B[:, None]
    scores_BV = jnp.where(inside_BV, scores_BV, -jnp.inf)
  p_BV = jax.nn.softmax(scores_BV)
  p_BV = jax.lax.cond(
    jnp.any(asks_B & (rows.top_p_B < 1)), nucleus, lambda p, _: p, p_BV, rows.top_p_B
  )
  drawn_B = draw(p_BV, keys_B)
  if size:
    drawn_B = jnp.take_along_axis(ids_BV, drawn_B[:, None], axis=1)[:, 0]
  return jnp.where(asks_B, drawn_B.astype(jnp.int32), token_B)


def nucleus(p_BV: jax.Array, mass_B: jax.Array) -> jax.Array:
  """Keeps the likeliest that together have `mass_B`, and makes the others 0.

  Those as likely as the last of them stay too (Holtzman et al. 2020). A mass of 1 keeps
  the row as it is.

  Nothing is sorted, which takes a CPU ten times as long: the smallest probability that
  stays is found by bisection, among the numbers from 0 to 1 as their bits count them.
  """

  def halve(_, bounds):
    low_B, high_B = bounds  # `low` leaves enough, `high` does not
    mid_B = (low_B + high_B) // 2
    enough_B = jnp.sum(kept(mid_B), axis=1) >= mass_B
    return jnp.where(enough_B, mid_B, low_B), jnp.where(enough_B, high_B, mid_B)

  def kept(least_B):
    least_B = jax.lax.bitcast_convert_type(least_B, jnp.float32)
    return jnp.where(p_BV >= least_B[:, None], p_BV, 0)

  above_1 = int(np.float32(1).view(np.int32)) + 1
  bounds = jnp.zeros(len(p_BV), jnp.int32), jnp.full(len(p_BV), above_1, jnp.int32)
  least_B = jax.lax.fori_loop(0, above_1.bit_length(), halve, bounds)[0]
  return kept(jnp.where(mass_B < 1, least_B, 0))


def draw(p_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
  """Draws an index per row, int32 B, in proportion to `p_BV`; it need not sum to 1."""
  sums_BV = jnp.cumsum(p_BV, axis=1)
  at_B = jax.vmap(jax.random.uniform)(keys_B) * sums_BV[:, -1]
  # The first sum above; never one of probability 0, however sums were rounded.
  hit_BV = jnp.where(p_BV > 0, (sums_BV > at_B[:, None]).astype(jnp.int32), -1)
  return jnp.argmax(hit_BV, axis=1).astype(jnp.int32)
