"""Attention over a sequence that is split over devices: keys travel round a ring.

Each device keeps its queries; shards of keys and values pass from device to device and
are folded into a running softmax, so that none ever holds the whole sequence (Ring
Attention, Liu et al. 2023, arXiv 2310.01889). With a causal mask the first device would
idle while the last one works; the sequence is therefore dealt out in zig-zag: device c
of C holds the chunks c and 2C - 1 - c of 2C (Llama 3, arXiv 2407.21783, section 3.3.2).
All then do the same work at every step, and blocks that nobody sees are not computed.

Dims beside the legend's, on one device: P its 2 chunks · J blocks of keys in both of
them · l queries and m keys, in `ring_attention` of the device, elsewhere of a chunk and
of a block.
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
  """Returns the slot of each place of the dealt out sequence `x_BL[:, zigzag(L, C)]`.

  Split evenly over C devices, that gives device c the chunks c and 2C - 1 - c.

  Raises:
    ValueError: L is no multiple of 2C.
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
  """Returns `attention` over the whole sequence at this device's queries, as BlNH.

  To be called inside a `jax.shard_map` (check_vma=False) that is manual over
  `axis_name`, on shards of a sequence in the order of `zigzag`. Arguments and result
  are those of `kernels.attention.attention`, where slots are places before `zigzag`;
  but a query that sees no key gets 0. Scores exist for half of the local queries and
  at most `block_size` keys at a time. The backward pass computes them again, while
  keys, values and their float32 gradients go round once more.

  Raises:
    ValueError: the shapes do not fit, or the arguments contradict each other.
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

  out_PBKGlH = ring(
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
def ring(rule: Rule, *arrays):
  """`ring_attention` on blocks: PBKGlH, in the type of the queries."""
  return ring_fwd(rule, *arrays)[0]


def ring_fwd(
  rule, q_PBKGlH, k_JBKmH, v_JBKmH, sinks_KG, q_segments, k_segments, prefix, window
):
  # Masks depend on no weight: in a scan over layers JAX would compute all of them once,
  # and keep L x L of them. The barrier makes them depend on the queries of this layer.
  device = jax.lax.axis_index(rule.axis_name)
  device, q_PBKGlH, q_segments = jax.lax.optimization_barrier(
    (device, q_PBKGlH, q_segments)
  )
  half = q_PBKGlH.shape[4]
  slot_P = first_slots(rule, device, half, half)
  queries = Queries(slot_P, q_PBKGlH, q_segments)
  keys = Keys(None, k_JBKmH, v_JBKmH, k_segments, prefix)
  out_PBKGlH, lse_PBKGl = ring_forward(rule, window, device, queries, keys, sinks_KG)
  out_PBKGlH, lse_PBKGl = checkpoint_name((out_PBKGlH, lse_PBKGl), "attention")
  return out_PBKGlH, (window, device, queries, keys, sinks_KG, out_PBKGlH, lse_PBKGl)


def ring_bwd(rule, saved, dout_PBKGlH):
  window, device, queries, keys, sinks_KG, out_PBKGlH, lse_PBKGl = saved
  queries = blockwise.with_gradient(queries, out_PBKGlH, lse_PBKGl, dout_PBKGlH)
  dsinks_KG = blockwise.sinks_gradient(sinks_KG, queries)  # of our queries alone
  dq, dk, dv = ring_backward(rule, window, device, queries, keys)
  return dq, dk, dv, dsinks_KG, None, None, None, None


ring.defvjp(ring_fwd, ring_bwd)


def ring_forward(rule: Rule, window, device, queries: Queries, keys: Keys, sinks_KG):
  """Returns the output, and log(sum(exp(scores))) of each query (PBKGl, float32)."""

  def see(state, _, queries, keys):
    return blockwise.see(rule, window, state, queries, keys), None

  def visit(state_P, keys):
    return for_pairs(rule, window, see, queries, keys, state_P, None)[0]

  half = queries.q_BKGlH.shape[4]
  state_P = blockwise.start(queries.q_BKGlH, sinks_KG)
  state_P = travel(rule, device, visit, state_P, keys, half)
  return blockwise.finish_rows(state_P, queries.q_BKGlH.dtype)


def ring_backward(rule: Rule, window, device, queries: Queries, keys: Keys):
  """Returns the gradients of queries, keys and values, in their types."""

  def see(dq_BKGlH, dkv_BKmH, queries, keys):
    return blockwise.see_back(rule, window, dq_BKGlH, dkv_BKmH, queries, keys)

  def visit(gradients, keys):
    dq_PBKGlH, dkv_J = gradients
    # What the devices before found for these keys is under way while we add our part.
    dkv_J = pass_on(rule, dkv_J)
    zeros_J = jax.tree.map(jnp.zeros_like, dkv_J)
    dq_PBKGlH, ours_J = for_pairs(rule, window, see, queries, keys, dq_PBKGlH, zeros_J)
    return dq_PBKGlH, jax.tree.map(jnp.add, dkv_J, ours_J)

  values = (queries.q_BKGlH, (keys.k_BKmH, keys.v_BKmH))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), values)
  dq_PBKGlH, dkv_J = travel(rule, device, visit, zeros, keys, queries.q_BKGlH.shape[4])
  gradients = (dq_PBKGlH, pass_on(rule, dkv_J))  # home
  dq, (dk, dv) = jax.tree.map(lambda dx, x: dx.astype(x.dtype), gradients, values)
  return dq, dk, dv


def travel(rule: Rule, device, visit, state, keys: Keys, half: int):
  """Folds `state = visit(state, keys)` over the keys of all devices, our own first."""
  C = jax.lax.axis_size(rule.axis_name)
  block_size = keys.k_BKmH.shape[3]

  def arrive(state, keys, step):
    source = (device - step) % C
    slot_J = first_slots(rule, source, half, block_size)
    return visit(state, dataclasses.replace(keys, slot=slot_J))

  def step(carry, step):
    state, keys = carry
    coming = pass_on(rule, keys)  # under way while we compute
    return (arrive(state, keys, step), coming), None

  (state, keys), _ = jax.lax.scan(step, (state, keys), jnp.arange(C - 1))
  return arrive(state, keys, C - 1)


def pass_on(rule: Rule, tree):
  """Sends arrays to the next device of the ring, and returns those of the previous."""
  C = jax.lax.axis_size(rule.axis_name)
  return jax.lax.ppermute(tree, rule.axis_name, [(c, (c + 1) % C) for c in range(C)])


def first_slots(rule: Rule, device, half: int, size: int) -> jax.Array:
  """The first slot of each run of `size` in the two chunks of a device."""
  last = 2 * jax.lax.axis_size(rule.axis_name) - 1
  chunks_P = half * jnp.stack([device, last - device])
  return (chunks_P[:, None] + jnp.arange(0, half, size)[None, :]).reshape(-1)


def for_pairs(rule: Rule, window, see, queries, keys, ours_P, theirs_J):
  """Calls `ours, theirs = see(ours, theirs, queries, keys)` for each chunk and block.

  `ours` belong to a chunk of queries, `theirs` to a block of keys. A pair in which no
  query sees a key is left out.
  """

  def chunk(theirs_J, one):
    queries, ours = one

    def block(ours, one):
      keys, theirs = one
      return jax.lax.cond(
        blockwise.any_visible(rule, window, queries, keys),
        lambda: see(ours, theirs, queries, keys),
        lambda: (ours, theirs),
      )

    ours, theirs_J = jax.lax.scan(block, ours, (keys, theirs_J))
    return theirs_J, ours

  theirs_J, ours_P = jax.lax.scan(chunk, theirs_J, (queries, ours_P))
  return ours_P, theirs_J
