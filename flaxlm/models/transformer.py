"""The decoder: GPT-2 or Llama by the fields of its config.

Activations are flat, (B*L, D), between attentions: every projection is one 2-D matrix
product, which XLA:CPU runs 1.3 times as fast as the same product with B and L apart.
Layers are stacked along a leading axis and run by `jax.lax.scan`: compile time does not
grow with depth.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.models.attention import Attention, KVCache
from flaxlm.models.layers import (
  Mlp,
  TransformerConfig,
  make_norm,
  rotary_angles,
  weight,
)
from flaxlm.parallel.sharding import constrain

REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nnx.Module):
  """Pre-norm attention and MLP, each added to the residual stream."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.attention_norm = make_norm(config)
    self.attention = Attention(config, rngs)
    self.mlp_norm = make_norm(config)
    self.mlp = Mlp(config, rngs)

  def __call__(self, x_TD, segment_ids_BL, angles, cache, layer):
    y_TD = self.attention_norm(x_TD)
    y_TD, cache = self.attention(y_TD, segment_ids_BL, angles, cache, layer)
    x_TD = constrain(x_TD + y_TD, "batch", None)
    x_TD = x_TD + self.mlp(self.mlp_norm(x_TD))
    return constrain(x_TD, "batch", None), cache


class Transformer(nnx.Module):
  """A decoder-only language model; a pytree, and a pure function of it."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    V, D, S = config.vocab_size, config.embed_dim, config.num_layers
    self.config = config
    self.embed = weight(rngs, (V, D), ("vocab", "embed"))
    learned = config.positions == "learned"
    self.positions = (
      weight(rngs, (config.max_len, D), ("position", "embed")) if learned else None
    )
    # vmap, not a leading dimension in the shapes: each layer draws its own numbers.
    keys_S = jax.random.split(rngs.params(), S)
    self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys_S)
    self.final_norm = make_norm(config)
    self.unembed = (
      None if config.tie_embeddings else weight(rngs, (D, V), ("embed", "vocab"))
    )

  def __call__(
    self,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segment_ids_BL: jax.Array,
    cache: KVCache | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Returns (features x_BLD after the last norm, cache).

    Tokens see earlier tokens of their own segment. With a cache, the L tokens are
    appended to it and see what it holds; positions are the caller's to continue.
    """
    config = self.config
    B, L = tokens_BL.shape
    x_BLD = self.embed[...].astype(config.dtype)[tokens_BL]
    if self.positions is not None:
      x_BLD += self.positions[...].astype(config.dtype)[positions_BL]
    angles = None
    if config.positions == "rope":
      angles = rotary_angles(positions_BL, config.head_dim, config.rope_theta)
    if cache is not None:
      segment_ids_BM = jax.lax.dynamic_update_slice(
        cache.segment_ids_BM, segment_ids_BL, (0, cache.length)
      )
      cache = dataclasses.replace(cache, segment_ids_BM=segment_ids_BM)

    def layer(carry, block_and_number):
      x_TD, cache = carry
      block, number = block_and_number
      return block(x_TD, segment_ids_BL, angles, cache, number), None

    if config.remat != "none":
      layer = jax.checkpoint(layer, policy=REMAT[config.remat])
    x_TD = constrain(x_BLD.reshape(B * L, -1), "batch", None)
    (x_TD, cache), _ = jax.lax.scan(
      layer,
      (x_TD, cache),
      (self.blocks, jnp.arange(config.num_layers)),
      unroll=config.unroll,
    )
    if cache is not None:
      cache = dataclasses.replace(cache, length=cache.length + L)
    return self.final_norm(x_TD).reshape(B, L, -1), cache

  def unembedding(self) -> jax.Array:
    """The output matrix, DV, in the type of the activations."""
    if self.unembed is None:
      return self.embed[...].astype(self.config.dtype).T
    return self.unembed[...].astype(self.config.dtype)

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Scores of the next token, float32, BLV."""
    return jnp.einsum(
      "BLD,DV->BLV", x_BLD, self.unembedding(), preferred_element_type=jnp.float32
    )


def describe(model: Transformer) -> list[tuple[str, tuple[int, ...], tuple]]:
  """Returns (path, shape, names of the dimensions) of each parameter, in tree order.

  Works on the abstract model that `jax.eval_shape` makes: no memory is needed.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    model, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  rows = []
  for path, leaf in leaves:
    name = "/".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
    rows.append((name, tuple(leaf.get_value().shape), tuple(leaf.axes)))
  return rows
