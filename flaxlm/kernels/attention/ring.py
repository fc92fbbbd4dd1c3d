"""Attention over a sequence that is split over devices: keys travel round a ring.

Each device keeps its queries. Shards of keys and values pass from device to device and
are folded into a running softmax, so that no device ever holds the whole sequence (Ring
Attention, Liu et al. 2023, arXiv 2310.01889). In plain order, a causal mask would leave
the first device idle while the last one works. The sequence is therefore dealt out in
zigzag order: device c of C holds chunks c and 2C - 1 - c of 2C (Llama 3, arXiv
2407.21783, section 3.3.2). All devices then do the same work at every step, and blocks
that no query sees are not computed.

Dims beside the legend's, on one device: P its 2 chunks · J blocks of keys in both
chunks · l queries and m keys: the device's in `ring_attention`, elsewhere those of a
chunk and of a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flaxlm.errors import UserError
from flaxlm.kernels.attention import blockwise
from flaxlm.kernels.attention.blockwise import Keys, Queries, Rule
from flaxlm.kernels.attention.masks import check_masks, check_shapes


def zigzag(L: int, C: int) -> np.ndarray:
  """Returns the column order that deals out a sequence: `x_BL[:, zigzag(L, C)]`.

  Split evenly over C devices, this gives device c the chunks c and 2C - 1 - c.

  Raises:
    UserError: L is not a multiple of 2C.
  """
  if L % (2 * C):
    raise UserError(
      "the sequence cannot be dealt out over the mesh axis `context`",
      f"data.seq_len={L} mesh.context={C}",
      f"a sequence length that is a multiple of {2 * C}",
    )
  chunks = np.arange(L).reshape(2, C, L // (2 * C))
  return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(L)


def ring_attention(
  q_BlNH: jax.Array,
  k_BmKH: jax.Array,
  v_BmKH: jax.Array,
  q_segment_ids_Bl: jax.Array | None = None,
  k_segment_ids_Bm: jax.Array | None = None,
  k_prefix_Bm: jax.Array | None = None,
  sinks_N: jax.Array | None = None,
  *,
  axis_name: str,
  causal: bool = True,
  window: jax.Array | int = 0,
  scale: float = 0.0,
  softcap: float = 0.0,
  block_size: int = 512,
) -> jax.Array:
  """Returns `attention` over the whole sequence for this device's queries, as BlNH.

  Call it inside a `jax.shard_map` (check_vma=False) that is manual over `axis_name`, on
  shards of a sequence in `zigzag` order. Arguments and result are those of `attention`,
  with slots counted before `zigzag`; but a query that sees no key gets 0. Scores exist
  for half of the local queries and at most `block_size` keys at a time. The backward
  pass computes them again, while keys, values and their float32 gradients go round once
  more.

  Raises:
    UserError: the shapes do not fit, or the arguments contradict each other.
  """
  check_shapes(q_BlNH, k_BmKH, v_BmKH)
  L, N, H = q_BlNH.shape[1:]
  K = k_BmKH.shape[2]
  if L % 2 or k_BmKH.shape[1] != L:
    raise UserError(
      "ring attention needs as many keys as queries, and an even number of them",
      f"{L} queries and {k_BmKH.shape[1]} keys on each device",
    )
  check_masks(q_segment_ids_Bl, k_segment_ids_Bm, k_prefix_Bm, causal)
  half = L // 2
  block_size = max(m for m in range(1, min(half, block_size) + 1) if half % m == 0)

  out_PBKGlH = _ring(
    Rule(causal, scale or H**-0.5, softcap, axis_name),
    blockwise.split_heads(q_BlNH, half, K),
    blockwise.split_heads(k_BmKH, block_size),
    blockwise.split_heads(v_BmKH, block_size),
    None if sinks_N is None else sinks_N.reshape(K, N // K),
    blockwise.split_blocks(q_segment_ids_Bl, half),
    blockwise.split_blocks(k_segment_ids_Bm, block_size),
    blockwise.split_blocks(k_prefix_Bm, block_size),
    jnp.asarray(window, jnp.int32),
  )
  return blockwise.join_heads(out_PBKGlH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(rule: Rule, *arrays):
  """Returns `ring_attention` of blocks, as PBKGlH in the dtype of the queries."""
  return _ring_fwd(rule, *arrays)[0]


def _ring_fwd(
  rule, q_PBKGlH, k_JBKmH, v_JBKmH, sinks_KG, q_segments, k_segments, prefix, window
):
  # Masks depend on no weight: in a scan over layers JAX would compute those of all
  # layers first, and keep L x L of each. The barrier ties them to this layer's queries.
  device = jax.lax.axis_index(rule.axis_name)
  device, q_PBKGlH, q_segments = jax.lax.optimization_barrier(
    (device, q_PBKGlH, q_segments)
  )
  half = q_PBKGlH.shape[4]
  slot_P = _first_slots(rule, device, half, half)
  queries = Queries(slot_P, q_PBKGlH, q_segments)
  keys = Keys(None, k_JBKmH, v_JBKmH, k_segments, prefix)
  out_PBKGlH, lse_PBKGl = _compute_outputs(
    rule, window, device, queries, keys, sinks_KG
  )
  out_PBKGlH, lse_PBKGl = checkpoint_name((out_PBKGlH, lse_PBKGl), "attention")
  return out_PBKGlH, (window, device, queries, keys, sinks_KG, out_PBKGlH, lse_PBKGl)


def _ring_bwd(rule, saved, dout_PBKGlH):
  window, device, queries, keys, sinks_KG, out_PBKGlH, lse_PBKGl = saved
  queries = blockwise.with_gradient(queries, out_PBKGlH, lse_PBKGl, dout_PBKGlH)
  dsinks_KG = blockwise.sinks_gradient(sinks_KG, queries)  # from our queries alone
  dq, dk, dv = _compute_gradients(rule, window, device, queries, keys)
  return dq, dk, dv, dsinks_KG, None, None, None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _compute_outputs(
  rule: Rule, window, device, queries: Queries, keys: Keys, sinks_KG
):
  """Returns the output, and log(sum(exp(scores))) of each query (PBKGl, float32)."""

  def fold(state, _, queries, keys):
    return blockwise.fold_block(rule, window, state, queries, keys), None

  def visit(state_P, keys):
    return _fold_pairs(rule, window, fold, queries, keys, state_P, None)[0]

  half = queries.q_BKGlH.shape[4]
  state_P = blockwise.start_softmax(queries.q_BKGlH, sinks_KG)
  state_P = _fold_ring(rule, device, visit, state_P, keys, half)
  return blockwise.finish_rows(state_P, queries.q_BKGlH.dtype)


def _compute_gradients(rule: Rule, window, device, queries: Queries, keys: Keys):
  """Returns the gradients of queries, keys and values, in their dtypes."""

  def fold(dq_BKGlH, dkv_BKmH, queries, keys):
    return blockwise.add_gradients(rule, window, dq_BKGlH, dkv_BKmH, queries, keys)

  def visit(gradients, keys):
    dq_PBKGlH, dkv_J = gradients
    # The sums of earlier devices for these keys travel while we compute our part.
    dkv_J = _pass_on(rule, dkv_J)
    zeros_J = jax.tree.map(jnp.zeros_like, dkv_J)
    dq_PBKGlH, ours_J = _fold_pairs(
      rule, window, fold, queries, keys, dq_PBKGlH, zeros_J
    )
    return dq_PBKGlH, jax.tree.map(jnp.add, dkv_J, ours_J)

  values = (queries.q_BKGlH, (keys.k_BKmH, keys.v_BKmH))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), values)
  dq_PBKGlH, dkv_J = _fold_ring(
    rule, device, visit, zeros, keys, queries.q_BKGlH.shape[4]
  )
  gradients = (dq_PBKGlH, _pass_on(rule, dkv_J))  # home
  dq, (dk, dv) = jax.tree.map(lambda dx, x: dx.astype(x.dtype), gradients, values)
  return dq, dk, dv


def _fold_ring(rule: Rule, device, visit, state, keys: Keys, half: int):
  """Folds `state = visit(state, keys)` over the keys of all devices, ours first."""
  C = jax.lax.axis_size(rule.axis_name)
  block_size = keys.k_BKmH.shape[3]

  def arrive(state, keys, step):
    source = (device - step) % C
    slot_J = _first_slots(rule, source, half, block_size)
    return visit(state, dataclasses.replace(keys, slot=slot_J))

  def step(carry, step):
    state, keys = carry
    coming = _pass_on(rule, keys)  # travels while we compute
    return (arrive(state, keys, step), coming), None

  (state, keys), _ = jax.lax.scan(step, (state, keys), jnp.arange(C - 1))
  return arrive(state, keys, C - 1)


def _pass_on(rule: Rule, tree):
  """Sends arrays to the next device of the ring; returns those of the previous one."""
  C = jax.lax.axis_size(rule.axis_name)
  return jax.lax.ppermute(tree, rule.axis_name, [(c, (c + 1) % C) for c in range(C)])


def _first_slots(rule: Rule, device, half: int, size: int) -> jax.Array:
  """Returns the first slot of each run of `size` slots in a device's two chunks."""
  last = 2 * jax.lax.axis_size(rule.axis_name) - 1
  chunks_P = half * jnp.stack([device, last - device])
  return (chunks_P[:, None] + jnp.arange(0, half, size)[None, :]).reshape(-1)


def _fold_pairs(rule: Rule, window, fold, queries, keys, ours_P, theirs_J):
  """Folds `ours, theirs = fold(ours, theirs, queries, keys)` over all pairs.

  A pair is a chunk of queries, to which `ours` belongs, and a block of keys, to which
  `theirs` belongs. Pairs in which no query sees a key are skipped.
  """

  def chunk(theirs_J, one):
    queries, ours = one

    def block(ours, one):
      keys, theirs = one
      return jax.lax.cond(
        blockwise.any_visible(rule, window, queries, keys),
        lambda: fold(ours, theirs, queries, keys),
        lambda: (ours, theirs),
      )

    ours, theirs_J = jax.lax.scan(block, ours, (keys, theirs_J))
    return theirs_J, ours

  theirs_J, ours_P = jax.lax.scan(chunk, theirs_J, (queries, ours_P))
  return ours_P, theirs_J
