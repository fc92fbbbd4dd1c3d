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

from flaxlm.kernels.attention import check_shapes, visible

# Scores of masked keys, and where the running maximum starts: so far apart that a
# masked key weighs 0 even in a row that has seen nothing yet.
MASKED, LOWEST = -1e30, -1e20


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is known when the step is traced."""

  axis_name: str
  causal: bool
  scale: float
  softcap: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """One chunk, or with P in front both; `slot` is the first one's."""

  slot: jax.Array
  q_BlKGH: jax.Array
  segments_Bl: jax.Array | None
  dout_BlKGH: jax.Array | None = None
  lse_BKGl: jax.Array | None = None
  delta_BKGl: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
  """One block, or with J in front all of a device; `slot` is the first one's."""

  slot: jax.Array | None
  k_BmKH: jax.Array
  v_BmKH: jax.Array
  segments_Bm: jax.Array | None
  prefix_Bm: jax.Array | None


def zigzag(L: int, C: int) -> np.ndarray:
  """Returns the slot of each place of the dealt out sequence `x_BL[:, zigzag(L, C)]`.

  Split evenly over C devices, that gives device c the chunks c and 2C - 1 - c.

  Raises:
    ValueError: L is no multiple of 2C.
  """
  if L % (2 * C):
    raise ValueError(
      "the sequence cannot be dealt out over the mesh axis `context`\n"
      f"  given:  data.seq_len={L} mesh.context={C}\n"
      f"  needed: a sequence length that is a multiple of {2 * C}"
    )
  chunks = np.arange(L).reshape(2, C, L // (2 * C))
  return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(L)


def ring_attention(
  q_BlNH: jax.Array,
  k_BmKH: jax.Array,
  v_BmKH: jax.Array,
  *,
  axis_name: str,
  q_segment_ids_Bl: jax.Array | None = None,
  k_segment_ids_Bm: jax.Array | None = None,
  k_prefix_Bm: jax.Array | None = None,
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
  B, L, N, H = q_BlNH.shape
  K = k_BmKH.shape[2]
  if L % 2 or k_BmKH.shape[1] != L:
    raise ValueError(
      "ring attention needs as many keys as queries, and an even number of them\n"
      f"  given:  {L} queries and {k_BmKH.shape[1]} keys on each device"
    )
  if (q_segment_ids_Bl is None) != (k_segment_ids_Bm is None):
    raise ValueError("segment ids are needed for queries and keys, or for neither")
  if k_prefix_Bm is not None and not causal:
    raise ValueError("a prefix is defined for causal attention only")
  half = L // 2
  block_size = max(m for m in range(1, min(half, block_size) + 1) if half % m == 0)

  def blocks(x_Bl, size):
    if x_Bl is None:
      return None
    return jnp.moveaxis(x_Bl.reshape(B, L // size, size, *x_Bl.shape[2:]), 1, 0)

  out_PBlKGH = ring(
    Rule(axis_name, causal, scale or H**-0.5, softcap),
    blocks(q_BlNH.reshape(B, L, K, N // K, H), half),
    blocks(k_BmKH, block_size),
    blocks(v_BmKH, block_size),
    blocks(q_segment_ids_Bl, half),
    blocks(k_segment_ids_Bm, block_size),
    blocks(k_prefix_Bm, block_size),
    jnp.asarray(window, jnp.int32),
  )
  return jnp.moveaxis(out_PBlKGH, 0, 1).reshape(B, L, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(rule: Rule, *arrays):
  """`ring_attention` on blocks: PBlKGH, in the type of the queries."""
  return ring_fwd(rule, *arrays)[0]


def ring_fwd(rule, q_PBlKGH, k_JBmKH, v_JBmKH, q_segments, k_segments, prefix, window):
  # Masks depend on no weight: in a scan over layers JAX would compute all of them once,
  # and keep L x L of them. The barrier makes them depend on the queries of this layer.
  device = jax.lax.axis_index(rule.axis_name)
  device, q_PBlKGH, q_segments = jax.lax.optimization_barrier(
    (device, q_PBlKGH, q_segments)
  )
  half = q_PBlKGH.shape[2]
  slot_P = first_slots(rule, device, half, half)
  queries = Queries(slot_P, q_PBlKGH, q_segments)
  keys = Keys(None, k_JBmKH, v_JBmKH, k_segments, prefix)
  out_PBlKGH, lse_PBKGl = forward(rule, window, device, queries, keys)
  return out_PBlKGH, (window, device, queries, keys, out_PBlKGH, lse_PBKGl)


def ring_bwd(rule, saved, dout_PBlKGH):
  window, device, queries, keys, out_PBlKGH, lse_PBKGl = saved
  delta_PBKGl = jnp.einsum(
    "PBlKGH,PBlKGH->PBKGl", dout_PBlKGH, out_PBlKGH, preferred_element_type=jnp.float32
  )
  queries = dataclasses.replace(
    queries, dout_BlKGH=dout_PBlKGH, lse_BKGl=lse_PBKGl, delta_BKGl=delta_PBKGl
  )
  return *backward(rule, window, device, queries, keys), None, None, None, None


ring.defvjp(ring_fwd, ring_bwd)


def forward(rule: Rule, window, device, queries: Queries, keys: Keys):
  """Returns the output, and log(sum(exp(scores))) of each query (PBKGl, float32)."""

  def see(state, _, queries, keys):
    # The running softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867).
    out_BKGlH, sum_BKGl, max_BKGl = state
    scores_BKGlm, mask_BKGlm = score(rule, window, queries, keys)
    scores_BKGlm = jnp.where(mask_BKGlm, scores_BKGlm, MASKED)
    new_max_BKGl = jnp.maximum(max_BKGl, jnp.max(scores_BKGlm, axis=-1))
    weights_BKGlm = jnp.exp(scores_BKGlm - new_max_BKGl[..., None])
    shrink_BKGl = jnp.exp(max_BKGl - new_max_BKGl)
    sum_BKGl = shrink_BKGl * sum_BKGl + jnp.sum(weights_BKGlm, axis=-1)
    new_BKGlH = product("BKGlm,BmKH->BKGlH", weights_BKGlm, keys.v_BmKH)
    out_BKGlH = shrink_BKGl[..., None] * out_BKGlH + new_BKGlH
    return (out_BKGlH, sum_BKGl, new_max_BKGl), None

  def visit(state_P, keys):
    return for_pairs(rule, window, see, queries, keys, state_P, None)[0]

  P, B, half, K, G, H = queries.q_BlKGH.shape
  zeros_PBKGl = jnp.zeros((P, B, K, G, half), jnp.float32)
  state_P = (
    jnp.zeros((P, B, K, G, half, H), jnp.float32),
    zeros_PBKGl,
    zeros_PBKGl + LOWEST,
  )
  out_PBKGlH, sum_PBKGl, max_PBKGl = travel(rule, device, visit, state_P, keys, half)
  sum_PBKGl = jnp.where(sum_PBKGl == 0.0, 1.0, sum_PBKGl)  # queries that see nothing
  out_PBlKGH = jnp.moveaxis(out_PBKGlH / sum_PBKGl[..., None], 4, 2)
  return out_PBlKGH.astype(queries.q_BlKGH.dtype), max_PBKGl + jnp.log(sum_PBKGl)


def backward(rule: Rule, window, device, queries: Queries, keys: Keys):
  """Returns the gradients of queries, keys and values, in their types."""

  def see(dq_BlKGH, dkv_BmKH, queries, keys):
    # The weights are W = exp(scores - lse); dscores = W * (dW - sum(W * dW)), and that
    # sum is delta = dout . out (FlashAttention-2, Dao 2023, arXiv 2307.08691, 3.1.2).
    q_BlKGH, dout_BlKGH = queries.q_BlKGH, queries.dout_BlKGH
    scores_BKGlm, mask_BKGlm = score(rule, window, queries, keys)
    masked_BKGlm = jnp.where(mask_BKGlm, scores_BKGlm, MASKED)
    weights_BKGlm = jnp.exp(masked_BKGlm - queries.lse_BKGl[..., None])
    dweights_BKGlm = product("BlKGH,BmKH->BKGlm", dout_BlKGH, keys.v_BmKH)
    dscores_BKGlm = weights_BKGlm * (dweights_BKGlm - queries.delta_BKGl[..., None])
    if rule.softcap:
      dscores_BKGlm *= 1.0 - jnp.square(scores_BKGlm / rule.softcap)
    dscores_BKGlm *= rule.scale
    dq_BlKGH += product("BKGlm,BmKH->BlKGH", dscores_BKGlm, keys.k_BmKH)
    dk_BmKH, dv_BmKH = dkv_BmKH
    dk_BmKH += product("BKGlm,BlKGH->BmKH", dscores_BKGlm, q_BlKGH)
    dv_BmKH += product("BKGlm,BlKGH->BmKH", weights_BKGlm, dout_BlKGH)
    return dq_BlKGH, (dk_BmKH, dv_BmKH)

  def visit(gradients, keys):
    dq_PBlKGH, dkv_J = gradients
    # What the devices before found for these keys is under way while we add our part.
    dkv_J = pass_on(rule, dkv_J)
    zeros_J = jax.tree.map(jnp.zeros_like, dkv_J)
    dq_PBlKGH, ours_J = for_pairs(rule, window, see, queries, keys, dq_PBlKGH, zeros_J)
    return dq_PBlKGH, jax.tree.map(jnp.add, dkv_J, ours_J)

  values = (queries.q_BlKGH, (keys.k_BmKH, keys.v_BmKH))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), values)
  dq_PBlKGH, dkv_J = travel(rule, device, visit, zeros, keys, queries.q_BlKGH.shape[2])
  gradients = (dq_PBlKGH, pass_on(rule, dkv_J))  # home
  dq, (dk, dv) = jax.tree.map(lambda dx, x: dx.astype(x.dtype), gradients, values)
  return dq, dk, dv


def travel(rule: Rule, device, visit, state, keys: Keys, half: int):
  """Folds `state = visit(state, keys)` over the keys of all devices, our own first."""
  C = jax.lax.axis_size(rule.axis_name)
  block_size = keys.k_BmKH.shape[2]

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
        any_visible(rule, window, queries, keys),
        lambda: see(ours, theirs, queries, keys),
        lambda: (ours, theirs),
      )

    ours, theirs_J = jax.lax.scan(block, ours, (keys, theirs_J))
    return theirs_J, ours

  theirs_J, ours_P = jax.lax.scan(chunk, theirs_J, (queries, ours_P))
  return ours_P, theirs_J


def any_visible(rule: Rule, window, queries: Queries, keys: Keys) -> jax.Array:
  """Whether `visible` could be true anywhere in the block, from its borders alone."""
  q_first, q_last = queries.slot, queries.slot + queries.q_BlKGH.shape[1] - 1
  k_first, k_last = keys.slot, keys.slot + keys.k_BmKH.shape[1] - 1
  distance = jnp.maximum(k_first - q_last, q_first - k_last)  # of the nearest two
  seen = (window == 0) | (distance < window)  # of each row, B, if they differ
  if rule.causal:
    past = k_first <= q_last
    if keys.prefix_Bm is not None:
      past |= jnp.any(keys.prefix_Bm > 0, axis=1)
    seen &= past
  if keys.segments_Bm is not None:  # mostly in order, and padding, 0, comes last
    q, k = ((x - 1).astype(jnp.uint32) for x in (queries.segments_Bl, keys.segments_Bm))
    seen &= (q.min(1) <= k.max(1)) & (k.min(1) <= q.max(1))
  return jnp.any(seen)


def score(rule: Rule, window, queries: Queries, keys: Keys):
  """Returns float32 scores that are not masked yet, and the mask, both BKGlm."""
  mask_Blm = visible(
    queries.q_BlKGH.shape[1],
    keys.k_BmKH.shape[1],
    queries.segments_Bl,
    keys.segments_Bm,
    keys.prefix_Bm,
    queries.slot - keys.slot,
    rule.causal,
    window,
  )
  scores_BKGlm = product("BlKGH,BmKH->BKGlm", queries.q_BlKGH, keys.k_BmKH)
  scores_BKGlm *= rule.scale
  if rule.softcap:
    scores_BKGlm = rule.softcap * jnp.tanh(scores_BKGlm / rule.softcap)
  return scores_BKGlm, mask_Blm[:, None, None]


def product(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """An einsum in the type of `y`, summed in float32."""
  return jnp.einsum(dims, x.astype(y.dtype), y, preferred_element_type=jnp.float32)
