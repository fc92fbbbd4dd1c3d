"""Cross entropy of a linear layer's logits, without keeping all logits at once.

The logits of V words for T tokens are the largest array of a step. `chunk_size` tokens
of them exist at a time; the backward pass computes each chunk again.
"""

import jax
import jax.numpy as jnp


def linear_cross_entropy(
  x_TD: jax.Array,
  weight_DV: jax.Array,
  targets_T: jax.Array,
  *,
  bias_V: jax.Array | None = None,
  softcap: float = 0.0,
  z_loss: float = 0.0,
  chunk_size: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Returns each token's loss in nats, and log(Z)^2 times `z_loss`; both float32, T.

  loss = log(sum_v exp(logits_v)) - logits_target, and z_loss * log(Z)^2 keeps the
  logits from drifting (PaLM, arXiv 2204.02311, section 5). A softcap c bends logits to
  c * tanh(logits / c) (Gemma 2). chunk_size 0 takes all tokens at once; otherwise T
  need not be a multiple of it.
  """
  T = x_TD.shape[0]

  def losses(x_TD, targets_T):
    logits_TV = jnp.einsum(
      "TD,DV->TV", x_TD, weight_DV, preferred_element_type=jnp.float32
    )
    if bias_V is not None:
      logits_TV += bias_V[None, :]
    if softcap:
      logits_TV = softcap * jnp.tanh(logits_TV / softcap)
    log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
    # A comparison instead of a gather: its gradient is elementwise, and it needs no
    # communication when V is split over devices.
    words_V = jax.lax.iota(jnp.int32, logits_TV.shape[1])
    is_target_TV = words_V[None, :] == targets_T[:, None]
    target_logits_T = jnp.sum(jnp.where(is_target_TV, logits_TV, 0.0), axis=-1)
    return log_z_T - target_logits_T, z_loss * jnp.square(log_z_T)

  if not chunk_size or chunk_size >= T:
    return losses(x_TD, targets_T)
  num_chunks = -(-T // chunk_size)
  padding = num_chunks * chunk_size - T
  # Chunk i takes tokens i, i + n, i + 2n ...: each device then has its share of every
  # chunk, and none has to gather the tokens of others.
  x_TD = jnp.pad(x_TD, ((0, padding), (0, 0))).reshape(chunk_size, num_chunks, -1)
  x_TD = jnp.swapaxes(x_TD, 0, 1)
  targets_T = jnp.pad(targets_T, (0, padding)).reshape(chunk_size, num_chunks).T
  _, chunks = jax.lax.scan(
    lambda _, chunk: (None, jax.checkpoint(losses)(*chunk)), None, (x_TD, targets_T)
  )
  loss, penalty = jax.tree.map(lambda chunk: chunk.T.reshape(-1)[:T], chunks)
  return loss, penalty
