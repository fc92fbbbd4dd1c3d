"""Cross entropy of a linear layer's logits, without holding all logits at once.

The T x V logits are the largest array of a step. Here they exist for one chunk of
tokens at a time, and a chunk's gradients are computed while its logits exist: three
matrix products, as without chunks, and nothing is computed twice. The weight of each
token in the loss must therefore be known beforehand (Liger, arXiv 2410.10989).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The most that one device's float32 logits may take. Each chunk reads and writes the
# gradient of the matrix once; with few tokens (on a GPU: 600) that takes as long as the
# chunk's products.
LOGITS_BYTES = 1 << 30


class Split(NamedTuple):
  """The mesh axes that split each dimension; () if none does."""

  tokens: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()  # some of `tokens`: they split the matrix's gradient by D


def chunk_tokens(tokens: int, vocab: int) -> int:
  """Returns how many tokens make a chunk, from the tokens and vocabulary per device."""
  chunks = -(-tokens * vocab * 4 // LOGITS_BYTES)
  if chunks <= 1:
    return tokens
  size = -(-tokens // chunks)
  return min(size + -size % 128, tokens)  # whole tiles of the matrix unit


def linear_cross_entropy(
  x_TD: jax.Array,
  weight_DV: jax.Array,
  targets_T: jax.Array,
  scale_T: jax.Array,
  *,
  bias_V: jax.Array | None = None,
  softcap: float = 0.0,
  z_loss: float = 0.0,
  split: Split | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (sum of scaled losses, cross entropy of each token in nats, T); float32.

  The sum is of scale * (nats + z_loss * log(Z)^2), where nats = log(Z) - logits_target
  and Z = sum_v exp(logits_v); z_loss keeps the logits from drifting (PaLM, arXiv
  2204.02311, section 5). A softcap c limits logits to c * tanh(logits / c) (Gemma 2).
  Gradients flow through the sum alone, to x, weight and bias.

  Args:
    scale_T: the weight of each token's loss; a constant, float32.
    split: how the mesh splits T and V. D is whole on each device.
  """
  options = _Options(float(softcap), float(z_loss), split or Split())
  total, nats_T = _scaled_sum(
    options, x_TD, weight_DV, bias_V, targets_T, jax.lax.stop_gradient(scale_T)
  )
  return total, jax.lax.stop_gradient(nats_T)


class _Options(NamedTuple):
  softcap: float
  z_loss: float
  split: Split


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_sum(options, *arrays):
  return _on_each_device(options, False, *arrays)[:2]


def _forward(options, *arrays):
  total, nats_T, gradients = _on_each_device(options, True, *arrays)
  return (total, nats_T), gradients


def _backward(options, gradients, cotangents):
  factor = cotangents[0]  # 1 if the sum is the loss; then it is compiled away
  scaled = jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradients)
  return *scaled, None, None


_scaled_sum.defvjp(_forward, _backward)


def _on_each_device(options, with_gradients: bool, *arrays):
  """Returns (sum, nats T, gradients of x, weight and bias or None)."""
  compute = functools.partial(_compute, options, with_gradients)
  tokens, vocab, embed = options.split
  if not tokens and not vocab:
    return compute(*arrays)
  P = jax.sharding.PartitionSpec
  of_tokens, of_vocab = P(tokens or None), P(vocab or None)
  gradients = (of_tokens, P(embed or None, vocab or None), of_vocab)
  if not with_gradients:
    gradients = None
  elif arrays[2] is None:
    gradients = (*gradients[:2], None)
  return jax.shard_map(
    compute,
    in_specs=(of_tokens, P(None, vocab or None), of_vocab, of_tokens, of_tokens),
    out_specs=(P(), of_tokens, gradients),
    check_vma=False,
  )(*arrays)


def _compute(
  options, with_gradients: bool, x_TD, weight_DV, bias_V, targets_T, scale_T
):
  """Computes one device's share: its tokens, chunk by chunk, and its vocabulary."""
  tokens, vocab, embed = options.split
  (T, D), V = x_TD.shape, weight_DV.shape[1]
  size = chunk_tokens(T, V)
  # Sums over chunks are kept in float32; a single product rounds its own result.
  sum_type = weight_DV.dtype if size == T else jnp.float32
  dw_type = sum_type if with_gradients else None
  part = functools.partial(_chunk, options, dw_type, weight_DV, bias_V)
  if size == T:
    total, nats_T, gradients = part(x_TD, targets_T, scale_T)
  else:

    def cut(x):
      padding = ((0, -T % size),) + ((0, 0),) * (x.ndim - 1)
      return jnp.pad(x, padding).reshape(-1, size, *x.shape[1:])

    def step(sums, chunk):
      total, nats_C, gradients = part(*chunk)
      dx_CD, *rest = gradients or (None,)
      return jax.tree.map(jnp.add, sums, (total, rest)), (nats_C, dx_CD)

    rest = [jnp.zeros((V, D)), None if bias_V is None else jnp.zeros(V)]
    zero = jnp.zeros(()), rest if with_gradients else []
    chunks = cut(x_TD), cut(targets_T), cut(scale_T)
    (total, rest), (nats_T, dx_TD) = jax.lax.scan(step, zero, chunks)
    nats_T = nats_T.reshape(-1)[:T]
    gradients = None
    if with_gradients:
      gradients = dx_TD.reshape(-1, D)[:T], *rest
  total = jax.lax.psum(total, tokens) if tokens else total
  if gradients is None:
    return total, nats_T, None
  # Rounded before they travel, like the gradients of all other weights.
  dx_TD, dw_VD, db_V = gradients
  dw_DV = dw_VD.astype(weight_DV.dtype).T
  db_V = None if bias_V is None else db_V.astype(bias_V.dtype)
  if vocab:
    dx_TD = jax.lax.psum(dx_TD, vocab)
  if embed:
    # The barrier hides the loop over chunks: the TPU compiler fails when it moves the
    # scatter out of a loop over micro-batches (libtpu 0.0.52: RET_CHECK ... kAdd).
    dw_DV = jax.lax.optimization_barrier(dw_DV)
    dw_DV = jax.lax.psum_scatter(dw_DV, embed, tiled=True)
  if replicas := tuple(axis for axis in tokens if axis not in embed):
    dw_DV = jax.lax.psum(dw_DV, replicas)
  if tokens and db_V is not None:
    db_V = jax.lax.psum(db_V, tokens)
  return total, nats_T, (dx_TD, dw_DV, db_V)


def _chunk(options, dw_type, weight_DV, bias_V, x_TD, targets_T, scale_T):
  """Returns (sum, nats T, gradients) of a chunk; no gradients if `dw_type` is None."""
  softcap, z_loss, (_, vocab, _) = options
  logits_TV = jnp.einsum(
    "TD,DV->TV", x_TD, weight_DV, preferred_element_type=jnp.float32
  )
  if bias_V is not None:
    logits_TV += bias_V[None, :]
  if softcap:
    logits_TV = softcap * jnp.tanh(logits_TV / softcap)
  top_T = jnp.max(logits_TV, axis=-1)
  if vocab:
    top_T = jax.lax.pmax(top_T, vocab)
  exp_TV = jnp.exp(logits_TV - top_T[:, None])
  # A comparison, not a gather: it is elementwise, and any device may hold the target.
  V = logits_TV.shape[1]
  ids_V = jax.lax.iota(jnp.int32, V) + (V * jax.lax.axis_index(vocab) if vocab else 0)
  is_target_TV = ids_V[None, :] == targets_T[:, None]
  sums_2T = jnp.stack(
    [jnp.sum(exp_TV, axis=-1), jnp.sum(jnp.where(is_target_TV, logits_TV, 0.0), -1)]
  )
  if vocab:
    sums_2T = jax.lax.psum(sums_2T, vocab)
  z_T, target_logits_T = sums_2T
  log_z_T = top_T + jnp.log(z_T)
  nats_T = log_z_T - target_logits_T
  total = jnp.sum(scale_T * (nats_T + z_loss * jnp.square(log_z_T)))
  if dw_type is None:
    return total, nats_T, None
  share_T = scale_T * (1 + 2 * z_loss * log_z_T) / z_T
  d_TV = share_T[:, None] * exp_TV - jnp.where(is_target_TV, scale_T[:, None], 0.0)
  if softcap:
    d_TV *= 1 - jnp.square(logits_TV / softcap)
  db_V = None if bias_V is None else jnp.sum(d_TV, axis=0)
  d_TV = d_TV.astype(x_TD.dtype)
  dx_TD = jnp.einsum("TV,DV->TD", d_TV, weight_DV)
  # A CPU multiplies faster into this order, which is also that of a tied table.
  dw_VD = jnp.einsum("TV,TD->VD", d_TV, x_TD, preferred_element_type=dw_type)
  return total, nats_T, (dx_TD, dw_VD, db_V)
