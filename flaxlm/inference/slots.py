"""The programs of the engine: a prompt's chunk, a slot's contents, one token for all.

Every setting of a request is an array, so none of them compiles anything. A row is
computed by the same program whatever the other rows hold, so its tokens do not depend
on them. The number of tokens per call is an array too: one program makes any number.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from flaxlm.inference.decoding import PORTION
from flaxlm.inference.sampling import SamplingRows, sample
from flaxlm.models.cache import KVCache
from flaxlm.models.transformer import Transformer

MAX_BIASES = 32  # tokens per request whose logits are changed
MAX_LISTED = 20  # likeliest tokens that are listed per position


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Slots:
  """One text per slot, each with its own length and settings."""

  cache: KVCache
  logits_BV: jax.Array  # of the next token, float32
  left_B: jax.Array  # tokens to make; 0 where the slot is idle
  made_B: jax.Array  # tokens made so far
  lists_B: jax.Array  # whether likeliest tokens are listed
  bias_ids_BN: jax.Array
  bias_BN: jax.Array  # added to the logits of these ids
  sampling: SamplingRows

  @classmethod
  def empty(cls, config, slots: int, length: int) -> "Slots":
    """Returns idle slots, with room for `length` tokens each and one that is written
    by idle slots."""
    zeros = functools.partial(jnp.zeros, slots)
    cache = KVCache.empty(config, slots, length + 1)
    return cls(
      dataclasses.replace(cache, length=zeros(jnp.int32)),
      jnp.zeros((slots, config.vocab_size), jnp.float32),
      zeros(jnp.int32),
      zeros(jnp.int32),
      zeros(bool),
      jnp.zeros((slots, MAX_BIASES), jnp.int32),
      jnp.zeros((slots, MAX_BIASES), jnp.float32),
      SamplingRows(
        zeros(jnp.float32), zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.uint32),
        zeros(jnp.uint32),
      ),
    )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Listed:
  """Log probabilities of tokens and of the likeliest ones at their places."""

  log_p: jax.Array
  best: jax.Array  # ids, the likeliest first, N more dimensions
  best_log_p: jax.Array


def list_likeliest(logits: jax.Array, tokens: jax.Array) -> Listed:
  """Returns what the model itself says of tokens: before temperature, bias and masks.

  Args:
    logits: [..., V]
    tokens: [...]
  """
  log_p = jax.nn.log_softmax(logits)
  best_log_p, best = jax.lax.top_k(log_p, min(MAX_LISTED, logits.shape[-1]))
  chosen = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
  return Listed(chosen, best, best_log_p)


def _no_list(tokens: jax.Array, vocab_size: int) -> Listed:
  shape = (*tokens.shape, min(MAX_LISTED, vocab_size))
  zeros = jnp.zeros(shape, jnp.float32)
  return Listed(zeros[..., 0], zeros.astype(jnp.int32), zeros)


@functools.partial(jax.jit, static_argnames="scored", donate_argnames="cache")
def extend(model: Transformer, cache: KVCache, tokens_C, next_C, count, scored: bool):
  """Appends the first `count` tokens of a chunk to a cache of one row.

  Args:
    next_C: the token after each, if `scored`.
  Returns:
    (logits of what follows the last one, V; cache; `Listed` of next_C or None)
  """
  start = cache.length
  is_token_C = jnp.arange(len(tokens_C)) < count
  segment_ids_1C = jnp.where(is_token_C, 1, -1)[None]
  positions_C = jnp.where(is_token_C, start + jnp.arange(len(tokens_C)), 0)
  out = model(tokens_C[None], positions_C[None], segment_ids_1C, cache=cache)
  if scored:
    logits_CV = model.logits(out.features)[0]
    logits_V, listed = logits_CV[count - 1], list_likeliest(logits_CV, next_C)
  else:
    last = jax.lax.dynamic_slice_in_dim(out.features, count - 1, 1, axis=1)
    logits_V, listed = model.logits(last)[0, 0], None
  return logits_V, dataclasses.replace(out.cache, length=start + count), listed


@functools.partial(jax.jit, donate_argnames="slots")
def fill(slots: Slots, slot, cache: KVCache, logits_V, left, lists, biases, sampling):
  """Puts a prompt that `extend` has read into a slot, with the request's settings."""
  ids_N, bias_N = biases

  def put(array, value):
    return array.at[slot].set(value)

  return Slots(
    slots.cache.write_row(slot, cache),
    put(slots.logits_BV, logits_V),
    put(slots.left_B, left),
    put(slots.made_B, 0),
    put(slots.lists_B, lists),
    put(slots.bias_ids_BN, ids_N),
    put(slots.bias_BN, bias_N),
    jax.tree.map(
      lambda array, one: array.at[slot].set(one[0]), slots.sampling, sampling
    ),
  )


@functools.partial(jax.jit, static_argnames="spare")
def take_prefix(slots: Slots, slot, length, spare: int) -> KVCache:
  """Returns a cache of one row with the first `length` tokens of a slot.

  Args:
    spare: places that it has besides those of the slot.
  """
  return slots.cache.read_row(slot, length, spare)


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, slot) -> Slots:
  """Returns the slots with one of them idle."""
  return dataclasses.replace(slots, left_B=slots.left_B.at[slot].set(0))


@functools.partial(jax.jit, donate_argnames="slots")
def make_tokens(model: Transformer, slots: Slots, allowed_V: jax.Array, count):
  """Makes `count` tokens per busy slot, at most PORTION.

  Returns:
    (slots; tokens PB, -1 where none was made; `Listed` PB)
  """
  B, V = slots.logits_BV.shape
  tokens_PB = jnp.full((PORTION, B), -1, jnp.int32)
  listed_PB = _no_list(tokens_PB, V)
  idle_at = slots.cache.segment_ids_BM.shape[1] - 1

  def step(i, carry):
    slots, tokens_PB, listed_PB = carry
    busy_B = slots.left_B > 0
    logits_BV = jax.vmap(lambda x, ids, bias: x.at[ids].add(bias))(
      slots.logits_BV, slots.bias_ids_BN, slots.bias_BN
    )
    logits_BV = jnp.where(allowed_V[None, :], logits_BV, -jnp.inf)
    token_B = sample(logits_BV, slots.sampling.keys(slots.made_B), slots.sampling)
    listed = jax.lax.cond(
      jnp.any(slots.lists_B & busy_B),
      lambda: list_likeliest(slots.logits_BV, token_B),
      lambda: _no_list(token_B, V),
    )
    at_B = slots.cache.length
    cache = dataclasses.replace(slots.cache, length=jnp.where(busy_B, at_B, idle_at))
    segment_ids_BL = jnp.where(busy_B, 1, -1)[:, None]
    positions_BL = jnp.where(busy_B, at_B, 0)[:, None]
    out = model(token_B[:, None], positions_BL, segment_ids_BL, cache=cache)
    new_BV = model.logits(out.features)[:, 0]
    slots = dataclasses.replace(
      slots,
      cache=dataclasses.replace(out.cache, length=at_B + busy_B),
      logits_BV=jnp.where(busy_B[:, None], new_BV, slots.logits_BV),
      left_B=slots.left_B - busy_B,
      made_B=slots.made_B + busy_B,
    )
    tokens_PB = tokens_PB.at[i].set(jnp.where(busy_B, token_B, -1))
    return (
      slots,
      tokens_PB,
      jax.tree.map(lambda x, y: x.at[i].set(y), listed_PB, listed),
    )

  return jax.lax.fori_loop(0, count, step, (slots, tokens_PB, listed_PB))
