"""Attention one block of queries and keys at a time: the steps of a running softmax.

No row of scores is ever whole. Each block is folded into the running maximum, sum and
output (Milakov and Gimelshein 2018, arXiv 1805.02867), and the backward pass computes
the weights again from the logarithm of the sum (FlashAttention-2, Dao 2023, arXiv
2307.08691). `chunked_attention` applies these steps to the blocks of one device,
`ring_attention` to those of several.

Dims beside the legend's: l queries and m keys of one block.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flaxlm.kernels.attention.masks import visible

# The score of a masked key, and where the running maximum starts: so far apart that a
# masked key has weight 0 even in a row that has seen no key yet.
_MASKED, _LOWEST = -1e30, -1e20


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is constant when the step is traced."""

  causal: bool
  scale: float
  softcap: float
  axis_name: str = ""  # the mesh axis of a ring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """One block, or several along a leading dimension; `slot` is that of its first."""

  slot: jax.Array
  q_BKGlH: jax.Array
  segments_Bl: jax.Array | None
  dout_BKGlH: jax.Array | None = None
  lse_BKGl: jax.Array | None = None
  delta_BKGl: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
  """One block, or several along a leading dimension; `slot` is that of its first."""

  slot: jax.Array | None
  k_BKmH: jax.Array
  v_BKmH: jax.Array
  segments_Bm: jax.Array | None
  prefix_Bm: jax.Array | None


def split_blocks(x_BL: jax.Array | None, size: int) -> jax.Array | None:
  """Returns (B, L, ...) as blocks of `size` tokens: (L / size, B, size, ...)."""
  if x_BL is None:
    return None
  B, L = x_BL.shape[:2]
  return jnp.moveaxis(x_BL.reshape(B, L // size, size, *x_BL.shape[2:]), 1, 0)


def split_heads(x_BLNH: jax.Array, size: int, K: int | None = None) -> jax.Array:
  """Returns blocks with heads before tokens: matrix products then need no copies.

  Keys and values become (L / size, B, K, size, H). Queries, for which K is given,
  become (L / size, B, K, G, size, H).
  """
  B, L, N, H = x_BLNH.shape
  x_PBNlH = jnp.transpose(x_BLNH.reshape(B, L // size, size, N, H), (1, 0, 3, 2, 4))
  return x_PBNlH if K is None else x_PBNlH.reshape(-1, B, K, N // K, size, H)


def join_heads(x_PBKGlH: jax.Array) -> jax.Array:
  """Returns blocks of queries as BLNH: the inverse of `split_heads`."""
  P, B, K, G, size, H = x_PBKGlH.shape
  return jnp.transpose(x_PBKGlH, (1, 0, 4, 2, 3, 5)).reshape(B, P * size, K * G, H)


def start_softmax(q_BKGlH: jax.Array, sinks_KG: jax.Array | None) -> tuple:
  """Returns (output BKGlH, sum BKGl, maximum BKGl) before any key, in float32.

  A sink is a key that every query sees first, and whose value is 0.
  """
  zeros_BKGlH = jnp.zeros(q_BKGlH.shape, jnp.float32)
  zeros_BKGl = zeros_BKGlH[..., 0]
  if sinks_KG is None:
    return zeros_BKGlH, zeros_BKGl, zeros_BKGl + _LOWEST
  sinks_BKGl = sinks_KG.astype(jnp.float32)[..., None]
  return zeros_BKGlH, zeros_BKGl + 1.0, jnp.broadcast_to(sinks_BKGl, zeros_BKGl.shape)


def finish_rows(state: tuple, dtype) -> tuple[jax.Array, jax.Array]:
  """Returns the output BKGlH, and log(sum(exp(scores))) of each query (BKGl, float32).

  A query that has seen no key gets 0.
  """
  out_BKGlH, sum_BKGl, max_BKGl = state
  sum_BKGl = jnp.where(sum_BKGl == 0.0, 1.0, sum_BKGl)
  return (out_BKGlH / sum_BKGl[..., None]).astype(dtype), max_BKGl + jnp.log(sum_BKGl)


def fold_block(rule: Rule, window, state: tuple, queries: Queries, keys: Keys) -> tuple:
  """Folds one block of keys into the running softmax of one block of queries."""
  out_BKGlH, sum_BKGl, max_BKGl = state
  scores_BKGlm, mask_BKGlm = _block_scores(rule, window, queries, keys)
  scores_BKGlm = jnp.where(mask_BKGlm, scores_BKGlm, _MASKED)
  new_max_BKGl = jnp.maximum(max_BKGl, jnp.max(scores_BKGlm, axis=-1))
  weights_BKGlm = jnp.exp(scores_BKGlm - new_max_BKGl[..., None])
  shrink_BKGl = jnp.exp(max_BKGl - new_max_BKGl)
  sum_BKGl = shrink_BKGl * sum_BKGl + jnp.sum(weights_BKGlm, axis=-1)
  new_BKGlH = product("BKGlm,BKmH->BKGlH", weights_BKGlm, keys.v_BKmH)
  return shrink_BKGl[..., None] * out_BKGlH + new_BKGlH, sum_BKGl, new_max_BKGl


def add_gradients(rule: Rule, window, dq_BKGlH, dkv_BKmH, queries: Queries, keys: Keys):
  """Adds what a block of queries and one of keys contribute to their gradients.

  The weights are W = exp(scores - lse); dscores = W * (dW - sum(W * dW)), and that sum
  is delta = dout . out (FlashAttention-2, section 3.1.2).
  """
  q_BKGlH, dout_BKGlH = queries.q_BKGlH, queries.dout_BKGlH
  scores_BKGlm, mask_BKGlm = _block_scores(rule, window, queries, keys)
  masked_BKGlm = jnp.where(mask_BKGlm, scores_BKGlm, _MASKED)
  weights_BKGlm = jnp.exp(masked_BKGlm - queries.lse_BKGl[..., None])
  dweights_BKGlm = product("BKGlH,BKmH->BKGlm", dout_BKGlH, keys.v_BKmH)
  dscores_BKGlm = weights_BKGlm * (dweights_BKGlm - queries.delta_BKGl[..., None])
  if rule.softcap:
    dscores_BKGlm *= 1.0 - jnp.square(scores_BKGlm / rule.softcap)
  dscores_BKGlm *= rule.scale
  dq_BKGlH += product("BKGlm,BKmH->BKGlH", dscores_BKGlm, keys.k_BKmH)
  dk_BKmH, dv_BKmH = dkv_BKmH
  dk_BKmH += product("BKGlm,BKGlH->BKmH", dscores_BKGlm, q_BKGlH)
  dv_BKmH += product("BKGlm,BKGlH->BKmH", weights_BKGlm, dout_BKGlH)
  return dq_BKGlH, (dk_BKmH, dv_BKmH)


def with_gradient(queries: Queries, out_BKGlH, lse_BKGl, dout_BKGlH) -> Queries:
  """Returns the queries with all that `add_gradients` needs of them."""
  delta_BKGl = jnp.einsum(
    "...H,...H->...", dout_BKGlH, out_BKGlH,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  return dataclasses.replace(
    queries, dout_BKGlH=dout_BKGlH, lse_BKGl=lse_BKGl, delta_BKGl=delta_BKGl
  )


def sinks_gradient(sinks_KG: jax.Array | None, queries: Queries) -> jax.Array | None:
  """Returns the gradient of the sinks from all blocks: a sink only takes weight."""
  if sinks_KG is None:
    return None
  lse_BKGl = queries.lse_BKGl
  sinks_BKGl = jnp.broadcast_to(sinks_KG.astype(jnp.float32)[..., None], lse_BKGl.shape)
  taken_BKGl = jnp.exp(sinks_BKGl - lse_BKGl) * queries.delta_BKGl
  return -jnp.einsum("...KGl->KG", taken_BKGl).astype(sinks_KG.dtype)


def any_visible(rule: Rule, window, queries: Queries, keys: Keys) -> jax.Array:
  """Returns whether any query may see any key, judged by the blocks' borders alone."""
  q_first, q_last = queries.slot, queries.slot + queries.q_BKGlH.shape[3] - 1
  k_first, k_last = keys.slot, keys.slot + keys.k_BKmH.shape[2] - 1
  distance = jnp.maximum(k_first - q_last, q_first - k_last)  # of the nearest pair
  seen = (window == 0) | (distance < window)  # per row, B, if rows differ
  if rule.causal:
    past = k_first <= q_last
    if keys.prefix_Bm is not None:
      past |= jnp.any(keys.prefix_Bm > 0, axis=1)
    seen &= past
  if keys.segments_Bm is not None:  # mostly ascending, and padding, 0, comes last
    q, k = ((x - 1).astype(jnp.uint32) for x in (queries.segments_Bl, keys.segments_Bm))
    seen &= (q.min(1) <= k.max(1)) & (k.min(1) <= q.max(1))
  return jnp.any(seen)


def _block_scores(rule: Rule, window, queries: Queries, keys: Keys):
  """Returns the float32 scores before masking, and the mask, both BKGlm."""
  mask_Blm = visible(
    queries.q_BKGlH.shape[3],
    keys.k_BKmH.shape[2],
    queries.segments_Bl,
    keys.segments_Bm,
    keys.prefix_Bm,
    queries.slot - keys.slot,
    rule.causal,
    window,
  )
  scores_BKGlm = product("BKGlH,BKmH->BKGlm", queries.q_BKGlH, keys.k_BKmH)
  scores_BKGlm *= rule.scale
  if rule.softcap:
    scores_BKGlm = rule.softcap * jnp.tanh(scores_BKGlm / rule.softcap)
  return scores_BKGlm, mask_Blm[:, None, None]


def product(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns an einsum of inputs in the dtype of `y`, summed in float32."""
  return jnp.einsum(dims, x.astype(y.dtype), y, preferred_element_type=jnp.float32)
