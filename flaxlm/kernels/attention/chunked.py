"""Attention whose memory grows with the length of a row, not with its square.

Each block of queries visits the blocks of keys from the first to the last that it can
see, by causality, window and documents. Blocks outside that range are not computed.
Scores exist for one block of queries and one block of keys at a time.

Dims beside the legend's: P blocks of l queries · J blocks of m keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention import blockwise
from flaxlm.kernels.attention.blockwise import Keys, Queries, Rule

# In tokens. Of 64, 128 and 256 the fastest on a CPU, whose cache it fits.
LARGEST_BLOCK = 128
# Tokens per row from which chunks pay. On a CPU, forward and backward with the heads of
# GPT-2 124M, they take 4/3 of the time of whole scores at 512 and 1,024 tokens and 9/8
# at 2,048 (AVX-512; AVX2: 8/5 to 9/5), but a tenth of the memory at 2,048
# (tests/benchmarks/attention_speed.py).
# On accelerators, where it is not measured, whole scores outgrow all else from here.
_LEAST = {"cpu": 2048}
_LEAST_ELSEWHERE = 4096


def block_size(length: int) -> int:
  """Returns the largest divisor of `length` that is at most LARGEST_BLOCK."""
  return max(m for m in range(1, min(length, LARGEST_BLOCK) + 1) if length % m == 0)


def chunks_pay(platform: str, L: int, M: int) -> bool:
  """Returns whether chunks are better than whole scores for these shapes."""
  least = _LEAST.get(platform, _LEAST_ELSEWHERE)
  return min(L, M) >= least and min(block_size(L), block_size(M)) >= LARGEST_BLOCK // 2


def chunked_attention(
  q_BLNH: jax.Array,
  k_BMKH: jax.Array,
  v_BMKH: jax.Array,
  sinks_N: jax.Array | None,
  q_segment_ids_BL: jax.Array | None,
  k_segment_ids_BM: jax.Array | None,
  k_prefix_BM: jax.Array | None,
  q_offset: jax.Array | int,
  causal: bool,
  window: jax.Array | int,
  scale: float,
  softcap: float,
) -> jax.Array:
  """Returns what `attention` returns; a query that sees no key gets 0."""
  assert jnp.ndim(q_offset) == 0, "blocks of keys are skipped for all rows alike"
  L, N = q_BLNH.shape[1:3]
  M, K = k_BMKH.shape[1:3]
  length, size = block_size(L), block_size(M)
  out_PBKGlH = _chunked(
    Rule(causal, scale, softcap),
    blockwise.split_heads(q_BLNH, length, K),
    blockwise.split_heads(k_BMKH, size),
    blockwise.split_heads(v_BMKH, size),
    None if sinks_N is None else sinks_N.reshape(K, N // K),
    blockwise.split_blocks(q_segment_ids_BL, length),
    blockwise.split_blocks(k_segment_ids_BM, size),
    blockwise.split_blocks(k_prefix_BM, size),
    jnp.asarray(q_offset, jnp.int32),
    jnp.asarray(window, jnp.int32),
  )
  return blockwise.join_heads(out_PBKGlH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(rule: Rule, *arrays):
  """Returns `chunked_attention` of blocks, as PBKGlH in the dtype of the queries."""
  return _chunked_fwd(rule, *arrays)[0]


def _chunked_fwd(
  rule, q_PBKGlH, k_JBKmH, v_JBKmH, sinks_KG, q_segments, k_segments, prefix, offset,
  window,
):  # fmt: skip
  # Masks depend on no weight: in a scan over layers JAX would compute those of all
  # layers first, and keep L x M of each. The barrier ties them to this layer's queries.
  offset, q_PBKGlH, q_segments = jax.lax.optimization_barrier(
    (offset, q_PBKGlH, q_segments)
  )
  P, length = q_PBKGlH.shape[::4]
  J, size = k_JBKmH.shape[::3]
  queries = Queries(offset + length * jnp.arange(P), q_PBKGlH, q_segments)
  keys = Keys(size * jnp.arange(J), k_JBKmH, v_JBKmH, k_segments, prefix)

  def block(_, one):
    queries, first, last = one

    def visit(j, state):
      return blockwise.fold_block(rule, window, state, queries, _take_block(keys, j))

    state = blockwise.start_softmax(queries.q_BKGlH, sinks_KG)
    state = jax.lax.fori_loop(first, last, visit, state)
    return None, blockwise.finish_rows(state, q_PBKGlH.dtype)

  visible = _visible_range(rule, window, queries, keys)
  _, (out_PBKGlH, lse_PBKGl) = jax.lax.scan(block, None, (queries, *visible))
  out_PBKGlH, lse_PBKGl = checkpoint_name((out_PBKGlH, lse_PBKGl), "attention")
  saved = (window, queries, keys, sinks_KG, out_PBKGlH, lse_PBKGl)
  return out_PBKGlH, saved


def _chunked_bwd(rule, saved, dout_PBKGlH):
  window, queries, keys, sinks_KG, out_PBKGlH, lse_PBKGl = saved
  queries = blockwise.with_gradient(queries, out_PBKGlH, lse_PBKGl, dout_PBKGlH)

  def block(dkv_J, one):
    queries, first, last = one

    def visit(j, gradients):
      dq_BKGlH, dkv_J = gradients
      dq_BKGlH, dkv_BKmH = blockwise.add_gradients(
        rule, window, dq_BKGlH, _take_block(dkv_J, j), queries, _take_block(keys, j)
      )
      return dq_BKGlH, jax.tree.map(lambda x, y: x.at[j].set(y), dkv_J, dkv_BKmH)

    dq_BKGlH = jnp.zeros(queries.q_BKGlH.shape, jnp.float32)
    dq_BKGlH, dkv_J = jax.lax.fori_loop(first, last, visit, (dq_BKGlH, dkv_J))
    return dkv_J, dq_BKGlH.astype(queries.q_BKGlH.dtype)

  values = (keys.k_BKmH, keys.v_BKmH)
  zeros_J = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), values)
  visible = _visible_range(rule, window, queries, keys)
  dkv_J, dq_PBKGlH = jax.lax.scan(block, zeros_J, (queries, *visible))
  dk_JBKmH, dv_JBKmH = jax.tree.map(lambda dx, x: dx.astype(x.dtype), dkv_J, values)
  dsinks_KG = blockwise.sinks_gradient(sinks_KG, queries)
  return dq_PBKGlH, dk_JBKmH, dv_JBKmH, dsinks_KG, None, None, None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _take_block(tree, j):
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), tree
  )


def _visible_range(rule: Rule, window, queries: Queries, keys: Keys) -> tuple:
  """Returns (first, last + 1) of the blocks of keys that each block of queries sees."""

  def seen(queries, keys):
    return blockwise.any_visible(rule, window, queries, keys)

  seen_PJ = jax.vmap(lambda q: jax.vmap(lambda k: seen(q, k))(keys))(queries)
  J = seen_PJ.shape[1]
  first_P = jnp.argmax(seen_PJ, axis=1)
  last_P = jnp.where(seen_PJ.any(1), J - jnp.argmax(seen_PJ[:, ::-1], axis=1), 0)
  return first_P, last_P
