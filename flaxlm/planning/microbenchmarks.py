"""Small programs to time, one for each kind of operation in a step.

Each `_probe_*` returns a function and its arguments; `prepare` adds the backward pass.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxlm.kernels.attention.attention import attention


def _forward_backward(function: Callable) -> Callable:
  """Returns f(cotangent, *args) -> (result, gradients)."""

  def both(cotangent, *args):
    result, gradient = jax.vjp(function, *args)
    return result, gradient(cotangent)

  return both


def _random(*shape, dtype) -> jax.Array:
  values = np.random.default_rng(0).random(shape, dtype=np.float32)
  return jnp.asarray(values - 0.5, dtype)


def _probe_matmul(dtype, batch, m, k, n):
  x, w = _random(batch, m, k, dtype=dtype), _random(batch, k, n, dtype=dtype)
  if batch == 1:  # one plain product, as in the model
    x, w = x[0], w[0]
  equation = "mk,kn->mn" if batch == 1 else "bmk,bkn->bmn"
  return lambda x, w: jnp.einsum(equation, x, w), (x, w)


def _probe_attention(dtype, rows, L, M, N, K, H):
  q = _random(rows, L, N, H, dtype=dtype)
  k, v = _random(rows, M, K, H, dtype=dtype), _random(rows, M, K, H, dtype=dtype)
  ones = jnp.ones((rows, M), jnp.int32)

  def function(q, k, v):
    return attention(
      q, k, v, q_segment_ids_BL=ones[:, :L], k_segment_ids_BM=ones, q_offset=M - L
    )

  return function, (q, k, v)


def _probe_norm(dtype, T, D):
  def function(x, y, scale):
    x = x + y
    z = x.astype(jnp.float32)
    z = z - jnp.mean(z, axis=1, keepdims=True)
    z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=1, keepdims=True) + 1e-5)
    return x, (z * scale[None, :]).astype(dtype)

  x = _random(T, D, dtype=dtype)
  return function, (x, x, jnp.ones(D))


def _probe_rotary(dtype, T, N, H):
  def function(x, sin, cos):
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

  angle = _random(T, 1, H // 2, dtype=dtype)
  return function, (_random(T, N, H, dtype=dtype), angle, angle)


def _probe_activation(dtype, T, F):
  return lambda x: jax.nn.gelu(x, approximate=True), (_random(T, F, dtype=dtype),)


def _probe_gated(dtype, T, F):
  x = _random(T, F, dtype=dtype)
  return lambda x, gate: jax.nn.silu(gate) * x, (x, x)


def _probe_logits(dtype, T, V):
  def function(logits):
    is_target = jnp.arange(V)[None, :] == (jnp.arange(T) % V)[:, None]
    target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
    return jax.nn.logsumexp(logits, axis=1) - target

  return function, (_random(T, V, dtype=jnp.float32),)


def _probe_embedding(dtype, T, V, D):
  tokens = jnp.arange(T) * 7919 % V
  return lambda table: table.astype(dtype)[tokens], (_random(V, D, dtype=jnp.float32),)


def _probe_dispatch(dtype, T, D):
  order = jnp.asarray(np.random.default_rng(0).permutation(T))
  return lambda x: x[order] * 0.5, (_random(T, D, dtype=dtype),)


_PROBES = {
  "matmul": _probe_matmul,
  "attention": _probe_attention,
  "norm": _probe_norm,
  "rotary": _probe_rotary,
  "activation": _probe_activation,
  "gated": _probe_gated,
  "logits": _probe_logits,
  "embedding": _probe_embedding,
  "dispatch": _probe_dispatch,
}


def _probe_optimizer(kind: str, dtype, count: int):
  """Returns AdamW with clipping, or the casts and sums of gradients."""
  weights = _random(count, dtype=jnp.float32)
  if kind == "weights":
    return jax.jit(lambda w, g: (g + w.astype(dtype), w)), (weights, weights)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

  def update(weights, state, gradient):
    changes, state = tx.update(gradient, state, weights)
    return optax.apply_updates(weights, changes), state

  return jax.jit(update), (weights, tx.init(weights), weights)


def prepare(kind: str, dims: tuple, dtype) -> tuple[Callable, tuple]:
  """Returns the compiled function for an operation, and arguments to time it with."""
  if kind in ("optimizer", "weights"):
    return _probe_optimizer(kind, dtype, *dims)
  function, args = _PROBES[kind](dtype, *dims)
  cotangent = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), function(*args))
  return jax.jit(_forward_backward(function)), (cotangent, *args)


def measure_seconds(function: Callable, args: tuple, budget: float) -> float:
  """Returns the mean seconds of the calls that fit in `budget`, at least three.

  The mean, not the median: times are added up to a step, and other programs slow that
  down as well.
  """
  jax.block_until_ready(function(*args))
  calls, start = 0, time.perf_counter()
  while calls < 3 or time.perf_counter() - start < budget:
    jax.block_until_ready(function(*args))
    calls += 1
  return (time.perf_counter() - start) / calls
