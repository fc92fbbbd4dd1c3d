"""Mixtures of experts: a router sends each token to a few of many small MLPs.

Dropless by default: tokens are sorted by expert and multiplied group by group
(`jax.lax.ragged_dot`, as in MegaBlocks, Gale et al. 2022), so no token is lost however
uneven the load. With `capacity_factor`, each expert takes that many times its fair
share and drops the rest (GShard, Lepikhin et al. 2020): shapes are fixed, tokens lost.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.models.config import MoeConfig, TransformerConfig
from flaxlm.models.layers import (
  Mlp,
  bias,
  find_activation,
  project,
  residual_scale,
  weight,
)
from flaxlm.parallel.sharding import constrain, current_layout, gather, shard_map


class Routing(NamedTuple):
  """What the routers did; with a leading S after the scan over layers.

  All are float32 sums over tokens, without padding: those of parts of a batch add up.
  """

  load_E: jax.Array  # tokens sent to each expert
  probability_E: jax.Array  # what the router gave each expert, of 1 per token
  log_z_squared: jax.Array  # log(Z)^2 of the router's scores
  dropped: jax.Array  # (token, expert) pairs without room


def route(scores_TE, balance_bias_E, moe: MoeConfig):
  """Returns (chosen experts TK, their weights TK, probabilities TE), from logits.

  The balancing bias changes which experts are chosen, not their weights, so it gets no
  gradient (Wang et al. 2024, arXiv 2408.15664).
  """
  if moe.router == "softmax":
    probability_TE = jax.nn.softmax(scores_TE)
  elif moe.router == "sigmoid":
    probability_TE = jax.nn.sigmoid(scores_TE)
  else:
    raise ConfigError("config.model.moe.router", moe.router, "softmax or sigmoid")
  ranked_TE = probability_TE
  if balance_bias_E is not None:
    ranked_TE = probability_TE + jax.lax.stop_gradient(balance_bias_E)[None, :]
  _, chosen_TK = jax.lax.top_k(ranked_TE, moe.experts_per_token)
  weight_TK = jnp.take_along_axis(probability_TE, chosen_TK, axis=1)
  if moe.renormalize:
    weight_TK = weight_TK / (jnp.sum(weight_TK, axis=1, keepdims=True) + 1e-20)
  return chosen_TK, weight_TK * moe.routed_scale, probability_TE


def _sums(scores_TE, probability_TE, chosen_TK, is_token_T) -> tuple[jax.Array, ...]:
  """Returns (tokens per expert E, probability per expert E, log(Z)^2), all summed."""
  sent_TE = jnp.sum(jax.nn.one_hot(chosen_TK, scores_TE.shape[1]), axis=1)
  # Balancing needs shares, and sigmoids do not sum to 1.
  share_TE = probability_TE / jnp.sum(probability_TE, axis=1, keepdims=True)
  log_z_T = jax.nn.logsumexp(scores_TE, axis=1)
  load_E, probability_E = (
    jnp.sum(x_TE * is_token_T[:, None], axis=0) for x_TE in (sent_TE, share_TE)
  )
  return load_E, probability_E, jnp.sum(jnp.square(log_z_T) * is_token_T)


def routing_loss(
  routing: Routing, seen_SE: jax.Array, tokens: jax.Array, moe: MoeConfig
) -> jax.Array:
  """Returns what a micro-batch adds to the step's loss for its routing.

  Balancing: E * sum_e (share of tokens sent to e) * (mean probability of e), summed
  over layers. Its least value, k, means equal loads (Switch, Fedus et al. 2021, eq. 4,
  for top k). z: the mean of log(Z)^2 over the tokens (ST-MoE, Zoph et al. 2022, eq. 5).

  Args:
    routing: of all layers, in this micro-batch.
    seen_SE: loads of the step up to this micro-batch, which give the shares. Only a
      second pass could know those of the whole batch (Qiu et al. 2025, arXiv
      2501.11873, section 3).
    tokens: in the step's whole batch.
  """
  loss = jnp.zeros(())
  if moe.balance == "loss" and moe.aux_loss:
    pairs_S1 = jnp.sum(seen_SE, axis=1, keepdims=True)
    share_SE = seen_SE * moe.experts_per_token / jnp.maximum(pairs_S1, 1.0)
    balance = jnp.sum(share_SE * routing.probability_E) / tokens
    loss += moe.aux_loss * moe.num_experts * balance
  if moe.z_loss:
    loss += moe.z_loss * jnp.sum(routing.log_z_squared) / tokens
  return loss


class MoeMlp(nnx.Module):
  """Replaces `Mlp`; returns (output TD, Routing of this layer)."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    moe, D, E = config.moe, config.embed_dim, config.moe.num_experts
    X = moe.expert_dim or config.mlp_dim
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    self.config = config
    self.router = weight(rngs, (D, E), ("embed", None))
    self.expert_up = weight(rngs, (E, D, X), into)
    self.expert_gate = weight(rngs, (E, D, X), into) if config.gated_mlp else None
    self.expert_down = weight(rngs, (E, X, D), out, residual_scale(config))
    if moe.balance not in ("loss", "bias", "none"):
      raise ConfigError("config.model.moe.balance", moe.balance, "loss, bias or none")
    self.balance_bias = bias((E,), (None,)) if moe.balance == "bias" else None
    self.shared = Mlp(config, rngs, moe.shared_dim) if moe.shared_dim else None
    self.shared_gate = (
      weight(rngs, (D, 1), ("embed", None)) if moe.shared_gate else None
    )

  def __call__(self, x_TD: jax.Array, is_token_T: jax.Array):
    scores_TE = jnp.einsum(
      "TD,DE->TE", x_TD, gather(self.router[...].astype(x_TD.dtype), self.router.axes),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    offset_E = None if self.balance_bias is None else self.balance_bias[...]
    chosen_TK, weight_TK, probability_TE = route(scores_TE, offset_E, self.config.moe)
    sums = _sums(scores_TE, probability_TE, chosen_TK, is_token_T)
    if self.config.moe.capacity_factor:
      out_TD, dropped = self.with_capacity(x_TD, chosen_TK, weight_TK, is_token_T)
    else:
      out_TD, dropped = self.dropless(x_TD, chosen_TK, weight_TK), jnp.zeros(())
    if self.shared is not None:
      shared_TD = self.shared(x_TD)
      if self.shared_gate is not None:
        gate_TO = project(x_TD, self.shared_gate)
        shared_TD *= jax.nn.sigmoid(gate_TO)
      out_TD += shared_TD
    return out_TD, Routing(*sums, dropped)

  def weights(self, dtype) -> tuple[jax.Array, ...]:
    """Returns up, down and the gate, if there is one, in the dtype of activations."""
    matrices = (self.expert_up, self.expert_down, self.expert_gate)
    return tuple(m[...].astype(dtype) for m in matrices if m is not None)

  def experts(self, x, weights, multiply) -> jax.Array:
    """Applies the experts' MLPs; `multiply(x, weight)` uses each row's own expert."""
    activate = find_activation(self.config.activation)
    up, down, *gate = weights
    hidden = multiply(x, up)
    hidden = activate(multiply(x, gate[0])) * hidden if gate else activate(hidden)
    return multiply(hidden, down)

  def dropless(self, x_TD, chosen_TK, weight_TK) -> jax.Array:
    """Returns output TD; tokens travel to the devices of their experts, if need be."""
    weight_TK, weights = weight_TK.astype(x_TD.dtype), self.weights(x_TD.dtype)
    now = current_layout()
    if now is None or now.mesh.size == 1:
      return self.local(x_TD, chosen_TK, weight_TK, weights)
    gathered, summed = now.axes("embed"), now.axes("mlp")
    gathered = tuple(axis for axis in gathered if axis not in now.rules["expert"])
    into, out = self.expert_up.axes, self.expert_down.axes

    def on_device(x_TD, chosen_TK, weight_TK, *weights):
      up, down, *gate = weights
      if gathered:  # of this layer, as elsewhere with fsdp
        up, *gate = (
          jax.lax.all_gather(w, gathered, axis=1, tiled=True) for w in (up, *gate)
        )
        down = jax.lax.all_gather(down, gathered, axis=2, tiled=True)
      weights = (up, down, *gate)
      out_TD = self.local(x_TD, chosen_TK, weight_TK, weights, now.axes("expert"))
      return jax.lax.psum(out_TD, summed) if summed else out_TD

    tokens = ("tokens", None)
    dims = [tokens, tokens, tokens, into, out, *(into,) * (len(weights) - 2)]
    return shard_map(on_device, dims, tokens)(x_TD, chosen_TK, weight_TK, *weights)

  def local(self, x_TD, chosen_TK, weight_TK, weights, axes=()) -> jax.Array:
    """Returns output TD for one device's tokens; the mesh `axes` split the experts."""
    T, K = chosen_TK.shape
    expert_P = chosen_TK.reshape(-1)  # P = T*K pairs of token and expert
    order_P = jnp.argsort(expert_P)
    sizes_E = jnp.bincount(expert_P, length=self.config.moe.num_experts)
    x_PD = x_TD[order_P // K]
    if axes:
      room = T * min(K, len(weights[0]))
      out_PD = _exchange(
        x_PD, sizes_E, room, axes, lambda x, sizes: self.grouped(x, weights, sizes)
      )
    else:
      out_PD = self.grouped(x_PD, weights, sizes_E)
    # A gather restores the order of tokens, so that sums have a fixed order.
    out_TKD = out_PD[jnp.argsort(order_P)].reshape(T, K, -1)
    return jnp.einsum("TKD,TK->TD", out_TKD, weight_TK)

  def grouped(self, x_PD, weights, sizes_E) -> jax.Array:
    """Applies each row's expert, to rows sorted by expert; surplus rows become 0."""
    return self.experts(x_PD, weights, lambda x, w: jax.lax.ragged_dot(x, w, sizes_E))

  def with_capacity(self, x_TD, chosen_TK, weight_TK, is_token_T):
    """Returns (output TD, dropped pairs). All first choices come before second ones."""
    (T, K), E = chosen_TK.shape, self.config.moe.num_experts
    C = min(math.ceil(self.config.moe.capacity_factor * T * K / E), T)
    expert_KT = chosen_TK.T
    wanted_KTE = jax.nn.one_hot(expert_KT, E, dtype=jnp.int32)
    wanted_KTE *= is_token_T.astype(jnp.int32)[None, :, None]  # padding takes no room
    rank_PE = jnp.cumsum(wanted_KTE.reshape(K * T, E), axis=0) - 1
    rank_P = jnp.take_along_axis(rank_PE, expert_KT.reshape(-1, 1), axis=1)[:, 0]
    real_P = jnp.tile(is_token_T > 0, K)
    kept_P = real_P & (rank_P < C)
    # Dropped pairs go to one extra slot at the end.
    slot_P = jnp.where(kept_P, expert_KT.reshape(-1) * C + rank_P, E * C)
    token_P = jnp.tile(jnp.arange(T), K)
    slots_SD = jnp.zeros((E * C + 1, x_TD.shape[1]), x_TD.dtype)
    slots_SD = slots_SD.at[slot_P].set(x_TD[token_P])
    x_ECD = constrain(slots_SD[:-1].reshape(E, C, -1), "expert", None, None)
    weights = self.weights(x_TD.dtype)
    out_ECD = self.experts(
      x_ECD, weights, lambda x, w: jnp.einsum("ECI,EIO->ECO", x, w)
    )
    out_SD = jnp.pad(out_ECD.reshape(E * C, -1), ((0, 1), (0, 0)))
    out_KTD = out_SD[slot_P].reshape(K, T, -1)
    dropped = jnp.sum((real_P & ~kept_P).astype(jnp.float32))
    return jnp.einsum("KTD,TK->TD", out_KTD, weight_TK.astype(x_TD.dtype)), dropped


def without_capacity(model):
  """Returns a Transformer with room for all tokens in each expert.

  With limited room, the neighbours of a text would decide which tokens are dropped.
  """
  model = jax.tree.map(lambda x: x, model)  # the caller's stays as it is
  for blocks in (model.first_blocks, model.blocks):
    for block in blocks if isinstance(blocks, tuple) else (blocks,):
      if block is not None and isinstance(block.mlp, MoeMlp):
        config = block.mlp.config
        moe = dataclasses.replace(config.moe, capacity_factor=0.0)
        block.mlp.config = dataclasses.replace(config, moe=moe)
  return model


def _exchange(x_PD, sizes_E, room: int, axes: tuple, compute) -> jax.Array:
  """Sends rows to the devices of their experts, and the results back.

  Each pair of devices has room for the worst case, so that no row is ever dropped and
  shapes are static. Unless experts are few, most of what is sent is empty.

  Args:
    x_PD: rows sorted by expert.
    sizes_E: rows of each expert, including those on other devices.
    room: the most rows that one device can have for another.
    axes: mesh axes that split the experts, E / X per device.
    compute: (rows sorted by local expert, rows of each) -> rows.
  """
  X = jax.lax.axis_size(axes)
  sizes_XE = sizes_E.reshape(X, -1)
  rows_X = jnp.sum(sizes_XE, axis=1)
  device_P = jnp.repeat(jnp.arange(X), rows_X, total_repeat_length=len(x_PD))
  slot_P = jnp.arange(len(x_PD)) - (jnp.cumsum(rows_X) - rows_X)[device_P]
  send_XSD = jnp.zeros((X, room, x_PD.shape[1]), x_PD.dtype)
  send_XSD = send_XSD.at[device_P, slot_P].set(x_PD)

  def swap(x):
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)

  received_XSD, sizes_XE = swap(send_XSD), swap(sizes_XE)
  # The local expert of each slot; empty slots count as one after the last.
  ends_XE = jnp.cumsum(sizes_XE, axis=1)
  expert_XS = jnp.sum(jnp.arange(room)[None, :, None] >= ends_XE[:, None, :], axis=2)
  order = jnp.argsort(expert_XS.reshape(-1))
  out = compute(received_XSD.reshape(X * room, -1)[order], jnp.sum(sizes_XE, axis=0))
  out_XSD = out[jnp.argsort(order)].reshape(X, room, -1)
  return swap(out_XSD)[device_P, slot_P]


def rebalance(model, load_SE: jax.Array, rate: float):
  """Returns the model with its balancing biases moved one step against the loads.

  After each training step, without a gradient: b += rate * sign(mean load - load) (Wang
  et al. 2024, algorithm 1).
  """
  change_SE = rate * jnp.sign(jnp.mean(load_SE, axis=1, keepdims=True) - load_SE)

  def move(path, leaf):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return leaf + change_SE if "balance_bias" in names else leaf

  return jax.tree_util.tree_map_with_path(move, model)
