"""Decoding with a KV cache, a batch of prompts at a time.

A compiled loop makes a few tokens at a time, which are handed out as they come. Each
random choice depends on the row's settings and the token's number alone, so neither the
size of those portions nor the other prompts of a batch change what is written.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.inference.sampling import Sampling, SamplingRows, sample
from flaxlm.models.cache import KVCache
from flaxlm.models.layers import transpose_weight
from flaxlm.models.moe import MoeMlp, without_capacity
from flaxlm.models.transformer import Block, Transformer

PORTION = 8  # tokens per compiled call: what a reader waits for at once


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(model: Transformer, tokens_BL, segment_ids_BL, cache: KVCache):
  """Runs the prompts; returns (logits of the token that follows, BV; cache)."""
  positions_BL = jnp.maximum(jnp.cumsum(segment_ids_BL, axis=1) - 1, 0)
  out = model(tokens_BL, positions_BL, segment_ids_BL, cache=cache)
  return model.logits(out.features[:, -1:])[:, 0], out.cache


@functools.partial(jax.jit, donate_argnames="cache")
def decode(
  model, logits_BV, cache, position_B, count_B, allowed_V, sampling: SamplingRows
):
  """Makes PORTION tokens per row; returns (tokens BP, logits of the next, cache).

  Args:
    position_B: position of the row's next token in its text.
    count_B: tokens drawn for the row so far.
    allowed_V: which ids may be drawn.
  """
  segment_ids_BL = jnp.ones((logits_BV.shape[0], 1), jnp.int32)

  def step(carry, i):
    logits_BV, cache = carry
    logits_BV = jnp.where(allowed_V[None, :], logits_BV, -jnp.inf)
    token_B = sample(logits_BV, sampling.keys(count_B + i), sampling)
    positions_BL = (position_B + i)[:, None]
    out = model(token_B[:, None], positions_BL, segment_ids_BL, cache=cache)
    return (model.logits(out.features)[:, 0], out.cache), token_B

  (logits_BV, cache), tokens_PB = jax.lax.scan(
    step, (logits_BV, cache), jnp.arange(PORTION)
  )
  return tokens_PB.T, logits_BV, cache


def for_decoding(model: Transformer) -> Transformer:
  """Returns the model with separate arrays for each layer, turned for few rows.

  From a stack of layers XLA:CPU would copy each layer's part out for every token.
  `generate` does this too, unless it was done.
  """
  model = without_capacity(model)  # a copy: the caller's keeps its stack
  for name in ("first_blocks", "blocks"):
    blocks = getattr(model, name)
    if blocks is not None and not isinstance(blocks, tuple):
      layers = range(len(jax.tree.leaves(blocks)[0]))
      split = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in layers]
      for block in split:
        _turn_weights(block)
      setattr(model, name, tuple(split))
  return model


def _turn_weights(block: Block) -> None:
  for module in (block.attention, block.mlp):
    for name in ("query", "key", "value", "out", "up", "gate", "down"):
      weight = getattr(module, name, None)
      if weight is not None and not isinstance(module, MoeMlp):
        setattr(module, name, transpose_weight(weight, 2 if name == "out" else 1))


def generate(
  model: Transformer,
  prompts: list[list[int]],
  max_tokens: int,
  sampling: Sampling | Sequence[Sampling],
  allowed_V: np.ndarray,
  when_full: str = "stop",
) -> Iterator[np.ndarray]:
  """Yields arrays of new tokens, one row per prompt, `max_tokens` per row at most.

  Each token is drawn from the whole text, as far as the model's context goes. Rows are
  independent; the caller cuts each at the token that ends its text.

  Args:
    prompts: token ids, at least one each (a beginning-of-text token will do).
    sampling: one per prompt; or one for all, whose rows then differ in `index`.
    allowed_V: which ids may be drawn.
    when_full: what happens to a text that fills the context. "stop": it ends; where
      others go on, its row holds -1. "continue": it goes on from its last half.
  Raises:
    ConfigError: the model's context is too short to decode in, or is full already.
  """
  assert prompts and all(prompts), "a prompt needs at least one token"
  model, context = for_decoding(model), model.config.max_len
  if context < 2:
    raise ConfigError("config.model.max_len", context, "at least 2 to decode")
  left_B = np.array([context - len(prompt) for prompt in prompts])
  slides = _slides(when_full)
  if not slides:
    _check_room(left_B, context)
    max_tokens = min(max_tokens, int(left_B.max()))
  if isinstance(sampling, Sampling):
    sampling = [dataclasses.replace(sampling, index=i) for i in range(len(prompts))]
  assert len(sampling) == len(prompts)
  rows = jax.tree.map(jnp.asarray, SamplingRows.stack(sampling))
  texts = [list(prompt[-context:]) for prompt in prompts]
  allowed_V, made, room = jnp.asarray(allowed_V), 0, 0
  while made < max_tokens:
    if room == 0:
      half = -(context // 2)
      texts = [text[half:] if len(text) > context else text for text in texts]
      # The last token to draw needs no place in the context itself.
      room = context + 1 - max(map(len, texts)) if slides else max_tokens
      logits_BV, cache = _start(model, texts, min(room, max_tokens - made))
    position_B = np.array([len(text) for text in texts], np.int32)
    count_B = np.full(len(texts), made, np.int32)
    tokens_BP, logits_BV, cache = decode(
      model, logits_BV, cache, position_B, count_B, allowed_V, rows
    )
    new = np.array(tokens_BP)[:, : min(room, max_tokens - made)]
    for text, row in zip(texts, new, strict=True):
      text.extend(row.tolist())
    if not slides:
      new[np.arange(made, made + new.shape[1])[None] >= left_B[:, None]] = -1
    made, room = made + new.shape[1], room - new.shape[1]
    yield new


def _slides(when_full: str) -> bool:
  """Returns whether a text that fills the context goes on from its last half."""
  if when_full == "stop":
    return False
  elif when_full == "continue":
    return True
  else:
    raise ConfigError("when_full", when_full, "stop or continue")


def _check_room(left_B: np.ndarray, context: int) -> None:
  if left_B.min() < 1:
    raise ConfigError(
      "the prompt",
      f"{context - left_B.min()} tokens",
      f"at most {context - 1}, so that one more fits the context of {context}",
      "a shorter one, or when_full=continue, which keeps its end",
    )


def _start(model: Transformer, texts: list[list[int]], max_tokens: int):
  """Prefills a cache with left-padded texts; returns (logits, cache).

  Lengths are rounded up, to compile less. The cache has slots for the padding, which
  takes no place in the context, and for `max_tokens` more; few others, because each
  token reads all of them.
  """
  longest = max(map(len, texts))
  length = max(longest, min(round_up(longest), model.config.max_len))
  slots = round_up(length + -(-max_tokens // PORTION) * PORTION)
  tokens = np.zeros((len(texts), length), np.int32)
  segment_ids = np.zeros((len(texts), length), np.int32)
  for i, text in enumerate(texts):
    tokens[i, length - len(text) :] = text
    segment_ids[i, length - len(text) :] = 1
  cache = KVCache.empty(model.config, len(texts), slots)
  logits_BV, cache = prefill(model, tokens, segment_ids, cache)
  return logits_BV, cache


def round_up(length: int) -> int:
  """Returns the next power of two; above 128 the next multiple of an eighth of it."""
  power = 1 << (length - 1).bit_length()
  step = power // 8 if power > 128 else power
  return -(-length // step) * step
