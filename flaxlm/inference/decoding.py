"""Sampling from a decoder with a KV cache, a batch of prompts at a time.

Tokens are made a few at a time inside one compiled loop and handed out as they come.
Each random choice depends on (seed, row, number of the token) alone, so neither the
size of those portions nor the other prompts of a batch change what is written.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.inference.sampling import PORTION, Sampling, sample
from flaxlm.models.cache import KVCache
from flaxlm.models.layers import turn
from flaxlm.models.moe import MoeMlp
from flaxlm.models.transformer import Block, Transformer


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(model: Transformer, tokens_BL, segment_ids_BL, cache: KVCache):
  """Runs the prompts; returns (scores of the token that follows, BV; cache)."""
  positions_BL = jnp.maximum(jnp.cumsum(segment_ids_BL, axis=1) - 1, 0)
  out = model(tokens_BL, positions_BL, segment_ids_BL, cache=cache)
  return model.logits(out.features[:, -1:])[:, 0], out.cache


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def decode(
  model, logits_BV, cache, next_position_B, count, allowed_V, sampling: Sampling
):
  """Makes PORTION tokens a row; returns (tokens BP, scores of the next, cache)."""
  B = logits_BV.shape[0]
  row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(sampling.seed), jnp.arange(B)
  )

  def step(carry, i):
    logits_BV, cache = carry
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, count + i)
    logits_BV = jnp.where(allowed_V[None, :], logits_BV, -jnp.inf)
    token_B = sample(logits_BV, keys_B, sampling)
    segment_ids_BL = jnp.ones((B, 1), jnp.int32)
    positions_BL = (next_position_B + i)[:, None]
    out = model(token_B[:, None], positions_BL, segment_ids_BL, cache=cache)
    return (model.logits(out.features)[:, 0], out.cache), token_B

  (logits_BV, cache), tokens_PB = jax.lax.scan(
    step, (logits_BV, cache), jnp.arange(PORTION)
  )
  return tokens_PB.T, logits_BV, cache


def for_decoding(model: Transformer) -> Transformer:
  """Returns the model with arrays for each layer, and turned for few rows: of a stack
  of layers XLA:CPU would copy each layer's part out for every token. `generate` does it
  where it is not done.
  """
  model = jax.tree.map(lambda x: x, model)  # the caller's keeps its stack
  for name in ("first_blocks", "blocks"):
    blocks = getattr(model, name)
    if blocks is not None and not isinstance(blocks, tuple):
      layers = range(len(jax.tree.leaves(blocks)[0]))
      split = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in layers]
      for block in split:
        turn_weights(block)
      setattr(model, name, tuple(split))
  return model


def turn_weights(block: Block) -> None:
  for module in (block.attention, block.mlp):
    for name in ("query", "key", "value", "out", "up", "gate", "down"):
      weight = getattr(module, name, None)
      if weight is not None and not isinstance(module, MoeMlp):
        setattr(module, name, turn(weight, 2 if name == "out" else 1))


def generate(
  model: Transformer,
  prompts: list[list[int]],
  max_tokens: int,
  sampling: Sampling,
  allowed_V: np.ndarray,
) -> Iterator[np.ndarray]:
  """Yields arrays of new tokens, one row a prompt, up to `max_tokens` in all.

  A text that outgrows the model's context goes on from its last half. Rows are
  independent; the caller cuts each at its end-of-text token.

  Args:
    prompts: token ids, at least one each (a beginning-of-text token will do).
    allowed_V: which ids may be drawn.
  """
  assert prompts and all(prompts), "a prompt needs at least one token"
  model, context = for_decoding(model), model.config.max_len
  if context < 2 * PORTION:
    raise ConfigError(
      "config.model.max_len", context, f"at least {2 * PORTION} to decode"
    )
  texts = [list(prompt) for prompt in prompts]
  allowed_V, made, room = jnp.asarray(allowed_V), 0, 0
  while made < max_tokens:
    if room < PORTION:
      keep = context - PORTION if made == 0 else context // 2
      texts = [text[-keep:] for text in texts]
      logits_BV, cache, room = _start(model, texts, max_tokens - made)
      next_position_B = jnp.array([len(text) for text in texts], jnp.int32)
    tokens_BP, logits_BV, cache = decode(
      model, logits_BV, cache, next_position_B, made, allowed_V, sampling
    )
    next_position_B += PORTION
    room -= PORTION
    new = np.asarray(tokens_BP)[:, : max_tokens - made]
    made += new.shape[1]
    for text, row in zip(texts, new, strict=True):
      text.extend(row.tolist())
    yield new


def _start(model: Transformer, texts: list[list[int]], max_tokens: int):
  """Prefills a cache with left-padded texts; returns (scores, cache, its empty slots).

  Lengths are rounded up, to compile less; the cache has no more slots than will be
  filled, as each token reads all of them.
  """
  context, longest = model.config.max_len, max(map(len, texts))
  length = max(longest, min(round_up(longest), context - PORTION))
  slots = min(round_up(length + -(-max_tokens // PORTION) * PORTION), context)
  tokens = np.zeros((len(texts), length), np.int32)
  segment_ids = np.zeros((len(texts), length), np.int32)
  for i, text in enumerate(texts):
    tokens[i, length - len(text) :] = text
    segment_ids[i, length - len(text) :] = 1
  cache = KVCache.empty(model.config, len(texts), slots)
  logits_BV, cache = prefill(model, tokens, segment_ids, cache)
  return logits_BV, cache, slots - length


def round_up(length: int) -> int:
  """The next power of two, or above 128 the next quarter of one."""
  power = 1 << (length - 1).bit_length()
  step = power // 8 if power > 128 else power
  return -(-length // step) * step
