"""Small programs that stand for the operations of a step, to be timed."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxlm.kernels.attention.attention import attention


def forward_backward(function: Callable) -> Callable:
  """Returns f(cotangent, *args) -> (result, gradients), to be jitted and timed."""

  def both(cotangent, *args):
    result, gradient = jax.vjp(function, *args)
    return result, gradient(cotangent)

  return both


def random(*shape, dtype) -> jax.Array:
  values = np.random.default_rng(0).random(shape, dtype=np.float32)
  return jnp.asarray(values - 0.5, dtype)


def probe_matmul(dtype, batch, m, k, n):
  x, w = random(batch, m, k, dtype=dtype), random(batch, k, n, dtype=dtype)
  if batch == 1:  # as the model has it: one plain product
    x, w = x[0], w[0]
  equation = "mk,kn->mn" if batch == 1 else "bmk,bkn->bmn"
  return lambda x, w: jnp.einsum(equation, x, w), (x, w)


def probe_attention(dtype, rows, L, M, N, K, H):
  q = random(rows, L, N, H, dtype=dtype)
  k, v = random(rows, M, K, H, dtype=dtype), random(rows, M, K, H, dtype=dtype)
  ones = jnp.ones((rows, M), jnp.int32)

  def function(q, k, v):
    return attention(
      q, k, v, q_segment_ids_BL=ones[:, :L], k_segment_ids_BM=ones, q_offset=M - L
    )

  return function, (q, k, v)


def probe_norm(dtype, T, D):
  def function(x, y, scale):
    x = x + y
    z = x.astype(jnp.float32)
    z = z - jnp.mean(z, axis=1, keepdims=True)
    z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=1, keepdims=True) + 1e-5)
    return x, (z * scale[None, :]).astype(dtype)

  x = random(T, D, dtype=dtype)
  return function, (x, x, jnp.ones(D))


def probe_rotary(dtype, T, N, H):
  def function(x, sin, cos):
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

  angle = random(T, 1, H // 2, dtype=dtype)
  return function, (random(T, N, H, dtype=dtype), angle, angle)


def probe_activation(dtype, T, F):
  return lambda x: jax.nn.gelu(x, approximate=True), (random(T, F, dtype=dtype),)


def probe_gated(dtype, T, F):
  x = random(T, F, dtype=dtype)
  return lambda x, gate: jax.nn.silu(gate) * x, (x, x)


def probe_logits(dtype, T, V):
  def function(logits):
    is_target = jnp.arange(V)[None, :] == (jnp.arange(T) % V)[:, None]
    target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
    return jax.nn.logsumexp(logits, axis=1) - target

  return function, (random(T, V, dtype=jnp.float32),)


def probe_embedding(dtype, T, V, D):
  tokens = jnp.arange(T) * 7919 % V
  return lambda table: table.astype(dtype)[tokens], (random(V, D, dtype=jnp.float32),)


def probe_dispatch(dtype, T, D):
  order = jnp.asarray(np.random.default_rng(0).permutation(T))
  return lambda x: x[order] * 0.5, (random(T, D, dtype=dtype),)


MICROBENCHMARKS = {
  "matmul": probe_matmul,
  "attention": probe_attention,
  "norm": probe_norm,
  "rotary": probe_rotary,
  "activation": probe_activation,
  "gated": probe_gated,
  "logits": probe_logits,
  "embedding": probe_embedding,
  "dispatch": probe_dispatch,
}


def optimizer_probe(kind: str, dtype, count: int):
  """AdamW with clipping, or the casts and sums of gradients, of `count` weights."""
  weights = random(count, dtype=jnp.float32)
  if kind == "weights":
    return jax.jit(lambda w, g: (g + w.astype(dtype), w)), (weights, weights)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

  def update(weights, state, gradient):
    changes, state = tx.update(gradient, state, weights)
    return optax.apply_updates(weights, changes), state

  return jax.jit(update), (weights, tx.init(weights), weights)


def prepare(kind: str, dims: tuple, dtype) -> tuple[Callable, tuple]:
  if kind in ("optimizer", "weights"):
    return optimizer_probe(kind, dtype, *dims)
  function, args = MICROBENCHMARKS[kind](dtype, *dims)
  cotangent = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), function(*args))
  return jax.jit(forward_backward(function)), (cotangent, *args)


def measure_seconds(function: Callable, args: tuple, budget: float) -> float:
  """Mean time of the calls that fit in `budget` seconds, at least three.

  Not the median: operations add up to a step, with what other programs take of each.
  """
  jax.block_until_ready(function(*args))
  calls, start = 0, time.perf_counter()
  while calls < 3 or time.perf_counter() - start < budget:
    jax.block_until_ready(function(*args))
    calls += 1
  return (time.perf_counter() - start) / calls
