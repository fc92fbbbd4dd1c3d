"""Chooses the next token from logits: greedy, temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError

PORTION = 8  # tokens per compiled call: what a reader waits for at once


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn. temperature 0 takes the likeliest (greedy)."""

  temperature: float = 1.0
  top_k: int = 0  # only among the k likeliest; 0 = all
  top_p: float = 1.0  # only among the likeliest that together have this probability
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ConfigError("--temperature", self.temperature, "a number from 0 up", "0.8")
    if self.top_k < 0:
      raise ConfigError("--top_k", self.top_k, "0 (all) or a number of tokens", "50")
    if not 0 < self.top_p <= 1:
      raise ConfigError(
        "--top_p", self.top_p, "a probability above 0, at most 1", "0.95"
      )


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token id per row, int32 B."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  # From the largest down: a tiny temperature makes no infinity of it.
  logits_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
  logits_BV = logits_BV / sampling.temperature
  if not sampling.top_k:
    return draw(nucleus(jax.nn.softmax(logits_BV), sampling.top_p), keys_B)
  best_BK, ids_BK = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[1]))
  choice_B = draw(nucleus(jax.nn.softmax(best_BK), sampling.top_p), keys_B)
  return jnp.take_along_axis(ids_BK, choice_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def nucleus(p_BV: jax.Array, mass: float) -> jax.Array:
  """Returns the likeliest that together have `mass`, and 0 for others (Holtzman et al.
  2020). Those as likely as the last of them stay too.

  Nothing is sorted, which takes a CPU ten times as long: the smallest probability that
  stays is found by halving, among the numbers from 0 to 1 as their bits count them.
  """
  if mass == 1:
    return p_BV

  def halve(_, bounds):
    low_B, high_B = bounds  # `low` leaves enough, `high` does not
    mid_B = (low_B + high_B) // 2
    enough_B = jnp.sum(kept(mid_B), axis=1) >= mass
    return jnp.where(enough_B, mid_B, low_B), jnp.where(enough_B, high_B, mid_B)

  def kept(least_B):
    least_B = jax.lax.bitcast_convert_type(least_B, jnp.float32)
    return jnp.where(p_BV >= least_B[:, None], p_BV, 0)

  above_1 = int(np.float32(1).view(np.int32)) + 1
  bounds = jnp.zeros(len(p_BV), jnp.int32), jnp.full(len(p_BV), above_1, jnp.int32)
  return kept(jax.lax.fori_loop(0, above_1.bit_length(), halve, bounds)[0])


def draw(p_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
  """Returns an index of each row, int32 B, as likely as its part of the row's sum."""
  sums_BV = jnp.cumsum(p_BV, axis=1)
  at_B = jax.vmap(jax.random.uniform)(keys_B) * sums_BV[:, -1]
  # The first sum above; never one of probability 0, however sums were rounded.
  hit_BV = jnp.where(p_BV > 0, (sums_BV > at_B[:, None]).astype(jnp.int32), -1)
  return jnp.argmax(hit_BV, axis=1).astype(jnp.int32)
