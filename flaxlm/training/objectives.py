"""What the model is asked to predict, as a sum of losses over a batch.

A batch marks the positions to predict: `targets_BL` holds the right token there and -1
everywhere else. Sums, not means: micro-batches, rows and hosts then add up exactly.
"""

import jax
import jax.numpy as jnp

from flaxlm.kernels.cross_entropy import linear_cross_entropy


def token_losses(
  model, batch: dict[str, jax.Array], z_loss: float, chunk_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (cross entropy in nats, z-loss, is predicted) by position, float32 BL."""
  targets_BL = batch["targets"]
  x_BLD, _ = model(batch["tokens"], batch["positions"], batch["segment_ids"])
  losses = linear_cross_entropy(
    x_BLD.reshape(targets_BL.size, -1),
    model.unembedding(),
    targets_BL.reshape(-1),
    z_loss=z_loss,
    chunk_size=chunk_size,
  )
  predicted_BL = (targets_BL >= 0).astype(jnp.float32)
  loss_BL, penalty_BL = (x.reshape(targets_BL.shape) * predicted_BL for x in losses)
  return loss_BL, penalty_BL, predicted_BL


def summed_loss(model, batch, num_predicted, z_loss, chunk_size):
  """The part of the mean loss that `batch` contributes: sum of losses / num_predicted.

  Returns (loss to differentiate, z-loss included; cross entropy alone, in nats).
  """
  loss_BL, penalty_BL, _ = token_losses(model, batch, z_loss, chunk_size)
  cross_entropy = jnp.sum(loss_BL) / num_predicted
  return cross_entropy + jnp.sum(penalty_BL) / num_predicted, cross_entropy
