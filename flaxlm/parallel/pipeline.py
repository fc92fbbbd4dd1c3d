"""A pipeline over the layers: microbatches pass through stages of layers.

Stages are a dimension of the arrays, split over the mesh axis `stage`. All stages
compute at once under `jax.vmap`. Activations move on by a roll along that dimension,
which the compiler turns into messages between neighbours.

With R repeats a microbatch goes round R times, and stage p has the layer groups p,
P + p, 2P + p ... (the circular or interleaved schedule; Narayanan et al. 2021, arXiv
2104.04473). The bubble is R times smaller, but weights move to their stage once per
step, because they are stored in layer order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_STAGE = "stage"


def bubble(stages: int, microbatches: int, repeats: int) -> float:
  """Returns the share of a step that a stage is idle: (P - 1) / (MR + P - 1)."""
  return (stages - 1) / (microbatches * repeats + stages - 1)


def pipeline(
  apply: Callable, layers, x_M, sides_M, *, stages: int, repeats: int
) -> tuple:
  """Runs all layers on all microbatches, as if one after the other.

  Args:
    apply: (layers of a group, x, side, number of the microbatch) -> (x, a tree of sums
      over the microbatch, whose leading dimension is the layers of the group).
    layers: a tree of weights, whose leading dimension is all S layers.
    x_M: activations by microbatch.
    sides_M: a tree of what else `apply` reads, by microbatch.
  Returns:
    (x_M, the sums over all microbatches, with leading dimension S).
  """
  M, P, R = x_M.shape[0], stages, repeats
  assert M >= P, "a microbatch would come round before its slot is free"
  stage_P = jnp.arange(P)
  groups_PR = jax.tree.map(lambda w: _to_groups(w, P, R), layers)
  run = jax.vmap(apply, in_axes=(0, 0, 0, 0), spmd_axis_name=_STAGE)

  def pick(tree, index_P):
    return jax.vmap(lambda x, i: x[i], in_axes=(0, 0))(tree, index_P)

  def tick(carry, i):
    x_P, waiting_PM, sums_PR = carry
    # What comes back to stage 0 waits there for its next round, or is finished.
    back = (i - P) % M
    waiting_PM = waiting_PM.at[:, back].set(x_P)
    entering_P = jnp.where(i < M, x_M[i % M][None], waiting_PM[:, i % M])
    first_P = (stage_P == 0).reshape((P,) + (1,) * (x_P.ndim - 1))
    x_P = _split_stages(jnp.where(first_P, entering_P, x_P))
    turn_P = i - stage_P
    number_P = turn_P % M
    round_P = jnp.clip(turn_P // M, 0, R - 1)
    group_P = jax.tree.map(lambda w: w[:, 0] if R == 1 else pick(w, round_P), groups_PR)
    sides_P = jax.tree.map(lambda side: _split_stages(side[number_P]), sides_M)
    x_P, sums_P = run(group_P, x_P, sides_P, number_P)
    busy_PR = (turn_P >= 0) & (turn_P < M * R)
    busy_PR = busy_PR[:, None] & (round_P[:, None] == jnp.arange(R)[None])

    def add(total, part):
      here = busy_PR.reshape(P, R, *(1,) * (part.ndim - 1))
      return total + jnp.where(here, part[:, None], 0)

    sums_PR = jax.tree.map(add, sums_PR, sums_P)
    return (_split_stages(jnp.roll(x_P, 1, axis=0)), waiting_PM, sums_PR), None

  x_P = _split_stages(jnp.zeros((P, *x_M.shape[1:]), x_M.dtype))
  waiting_PM = _split_stages(jnp.zeros((P, *x_M.shape), x_M.dtype))
  one = jax.tree.map(lambda x: x[:, 0], groups_PR)
  side = jax.tree.map(lambda x: x[:P], sides_M)
  _, sums = jax.eval_shape(run, one, x_P, side, stage_P)
  sums_PR = jax.tree.map(lambda s: jnp.zeros((P, R, *s.shape[1:]), s.dtype), sums)
  (x_P, waiting_PM, sums_PR), _ = jax.lax.scan(
    tick, (x_P, waiting_PM, sums_PR), jnp.arange(M * R + P - 1)
  )
  done_M = waiting_PM[0].at[M - 1].set(x_P[0])
  return done_M, jax.tree.map(_from_groups, sums_PR)


def _to_groups(w_S: jax.Array, stages: int, repeats: int) -> jax.Array:
  """Reshapes (S, ...) to (stage, repeat, layers of a group, ...)."""
  w = w_S.reshape(repeats, stages, -1, *w_S.shape[1:])
  return _split_stages(jnp.swapaxes(w, 0, 1))


def _from_groups(x_PR: jax.Array) -> jax.Array:
  x = jnp.swapaxes(x_PR, 0, 1)
  return x.reshape(-1, *x.shape[3:])


def _split_stages(x_P: jax.Array) -> jax.Array:
  """Splits the leading dimension over `stage`; the compiler chooses the others."""
  rest = (PartitionSpec.UNCONSTRAINED,) * (x_P.ndim - 1)
  return jax.lax.with_sharding_constraint(x_P, PartitionSpec(_STAGE, *rest))
