"""The transformer: its config makes it GPT, Llama, Gemma, a mixture of experts or BERT.

Between attention layers, activations are flat, (B*L, D): each projection is then one
2-D matrix product, which XLA:CPU runs 1.3 times as fast as with B and L apart. Layers
are stacked along a leading dimension and run by `jax.lax.scan`, so that compile time
does not grow with depth. What differs between layers (window, rotary base) is scanned
beside the weights; layers of another structure (dense before experts) have their own
stack.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.models.attention import Attention, View
from flaxlm.models.cache import KVCache
from flaxlm.models.config import TransformerConfig
from flaxlm.models.heads import Head, make_head
from flaxlm.models.layers import Mlp, dropout, make_norm, weight
from flaxlm.models.moe import MoeMlp, Routing
from flaxlm.parallel.pipeline import pipeline
from flaxlm.parallel.sharding import (
  Layout,
  constrain,
  current_layout,
  gather,
  join_rows,
  reshard,
  split_rows,
)

_TOKENS, _STREAM = ("tokens", None), ("stream", None)


def _remat_policy(config: TransformerConfig):
  """Returns what `jax.checkpoint` keeps of a layer; the rest is computed again."""
  if config.remat == "dots":
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  elif config.remat == "full":
    return jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=list(config.keep),
      names_which_can_be_offloaded=list(config.offload),
      offload_src="device",
      offload_dst="pinned_host",
    )
  else:
    raise ConfigError("config.model.remat", config.remat, "none, full or dots")


class Output(NamedTuple):
  """What a model returns."""

  features: jax.Array  # x_BLD after the last norm
  cache: KVCache | None
  routing: Routing | None  # of the layers with experts


class Block(nnx.Module):
  """Attention and MLP, each added to the residual stream, with norms around them.

  norm_placement: pre, x + f(norm(x)) (GPT-2, Llama); post, x + norm(f(x)) (OLMo 2);
  both, x + norm(f(norm(x))) (Gemma 2); residual, norm(x + f(x)) (BERT).
  """

  def __init__(
    self,
    config: TransformerConfig,
    rngs: nnx.Rngs,
    first_norm: bool = True,
    experts: bool = False,
  ):
    place = config.norm_placement
    if place not in ("pre", "post", "both", "residual"):
      needed = "pre, post, both or residual"
      raise ConfigError("config.model.norm_placement", place, needed)
    has_norm, has_post_norm = place != "post", place in ("post", "both")
    self.placement, self.dropout = place, config.dropout
    self.attention_norm = make_norm(config) if has_norm and first_norm else None
    self.attention = Attention(config, rngs)
    self.attention_post_norm = make_norm(config) if has_post_norm else None
    self.mlp_norm = make_norm(config) if has_norm else None
    if experts:
      self.mlp = MoeMlp(config, rngs)
    else:
      self.mlp = Mlp(config, rngs, config.mlp_dim)
    self.mlp_post_norm = make_norm(config) if has_post_norm else None

  def __call__(self, x_TD, view: View, window, cache, layer, key):
    keys = (None, None) if key is None else jax.random.split(key)
    # The stream is split between blocks: gathered for the matrices, then split again.
    y_TD = reshard(self._input(x_TD, self.attention_norm), _STREAM, _TOKENS)
    y_TD, cache = self.attention(y_TD, view, window, cache, layer)
    x_TD = self._add(x_TD, y_TD, self.attention_norm, self.attention_post_norm, keys[0])
    y_TD = reshard(self._input(x_TD, self.mlp_norm), _STREAM, _TOKENS)
    routing = None
    if isinstance(self.mlp, MoeMlp):
      is_token_T = (join_rows(view.segment_ids_BL) > 0).astype(jnp.float32)
      y_TD, routing = self.mlp(y_TD, is_token_T)
    else:
      y_TD = self.mlp(y_TD)
    x_TD = self._add(x_TD, y_TD, self.mlp_norm, self.mlp_post_norm, keys[1])
    return x_TD, cache, routing

  def _input(self, x_TD, norm):
    return x_TD if norm is None or self.placement == "residual" else norm(x_TD)

  def _add(self, x_TD, y_TD, norm, post_norm, key):
    y_TD = reshard(y_TD, _TOKENS, _STREAM)
    y_TD = y_TD if post_norm is None else post_norm(y_TD)
    x_TD = x_TD + dropout(y_TD, self.dropout, key)
    if self.placement == "residual":
      x_TD = norm(x_TD)
    return constrain(x_TD, *_STREAM)


class Transformer(nnx.Module):
  """A language model, decoder or encoder: a pytree that is called as a function."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    if config.positions not in ("rope", "learned", "none"):
      needed = "rope, learned or none"
      raise ConfigError("config.model.positions", config.positions, needed)
    V, D, S = config.vocab_size, config.embed_dim, config.num_layers
    first, experts = config.num_first_layers, config.moe.num_experts > 0
    self.config = config
    self.embed = weight(rngs, (V, D), ("vocab", "embed"))
    learned = config.positions == "learned"
    self.positions = (
      weight(rngs, (config.max_len, D), ("position", "embed")) if learned else None
    )
    types = config.num_segment_types
    self.segment_types = weight(rngs, (types, D), (None, "embed")) if types else None
    self.embedding_norm = make_norm(config) if config.embedding_norm else None
    # By vmap, so that each layer draws its own random numbers.
    keys_S = jax.random.split(rngs.params(), S)

    def stack(keys_S, first_norm, experts):
      return jax.vmap(lambda k: Block(config, nnx.Rngs(k), first_norm, experts))(keys_S)

    self.first_blocks = (
      stack(keys_S[:first], config.first_norm, False) if first else None
    )
    self.blocks = stack(keys_S[first:], True, experts) if first < S else None
    has_norm = config.norm_placement != "residual"
    self.final_norm = make_norm(config) if has_norm else None
    self.unembed = (
      None if config.tie_embeddings else weight(rngs, (D, V), ("embed", "vocab"))
    )
    self.head = make_head(config, rngs)
    self.pair_head = (
      Head(config, rngs, 2, True, False, "tanh") if config.pair_head else None
    )

  def __call__(
    self,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    token_types_BL: jax.Array | None = None,
    prefix_BL: jax.Array | None = None,
    cache: KVCache | None = None,
    dropout_key: jax.Array | None = None,
  ) -> Output:
    """Returns the features, the cache with these tokens, and the experts' routing.

    Tokens see tokens of their own segment; if the model is causal, only earlier ones
    and those of the prefix. With a cache, the L tokens are appended to it and see what
    it holds; the caller continues the positions. Without a `dropout_key` nothing is
    dropped.
    """
    config = self.config
    B, L = tokens_BL.shape
    x_BLD = self._embed_tokens(tokens_BL, positions_BL, token_types_BL)
    view = View.of(config, positions_BL, segment_ids_BL, prefix_BL)
    if cache is not None:
      cache = cache.mark(segment_ids_BL)
    x_TD = constrain(join_rows(x_BLD), *_STREAM)
    x_TD = dropout(x_TD, config.dropout, dropout_key)
    first = config.num_first_layers
    routing = None
    for blocks, layers in (
      (self.first_blocks, config.layers[:first]),
      (self.blocks, config.layers[first:]),
    ):
      if blocks is not None:
        x_TD, cache, routing = self._run(blocks, layers, x_TD, view, cache, dropout_key)
    if cache is not None:
      cache = dataclasses.replace(cache, length=cache.length + L)
    if self.final_norm is not None:
      x_TD = self.final_norm(x_TD)
    return Output(split_rows(reshard(x_TD, _STREAM, _TOKENS), B), cache, routing)

  def _embed_tokens(self, tokens_BL, positions_BL, token_types_BL) -> jax.Array:
    config = self.config
    # Whole along D: each device looks up whole rows for its own tokens.
    table_VD = gather(self.embed[...].astype(config.dtype), self.embed.axes)
    x_BLD = constrain(table_VD[tokens_BL], "batch", "length", None)
    if config.scale_embeddings:
      x_BLD *= jnp.asarray(config.embed_dim**0.5, x_BLD.dtype)
    if self.positions is not None:
      table_PD = gather(self.positions[...].astype(config.dtype), self.positions.axes)
      x_BLD += table_PD[positions_BL]
    if self.segment_types is not None:
      types = self.segment_types[...].astype(config.dtype)
      if token_types_BL is None:
        x_BLD += types[0][None, None, :]
      else:
        x_BLD += types[token_types_BL]
    return x_BLD if self.embedding_norm is None else self.embedding_norm(x_BLD)

  def _run(self, blocks, layers: range, x_TD, view: View, cache, dropout_key):
    """Runs one stack of layers; returns (x_TD, cache, Routing with a leading S)."""
    if cache is not None or isinstance(blocks, tuple):
      return self._append(blocks, layers, x_TD, view, cache)
    windows_S = np.array([self.config.windows[i] for i in layers], np.int32)
    stack = blocks, jnp.arange(layers.start, layers.stop), windows_S
    now = current_layout()
    if now is None or now.ways("layer") == 1 or blocks is self.first_blocks:
      x_TD, routing = self._scan(stack, x_TD, view, dropout_key)
    else:
      x_TD, routing = self._run_pipeline(now, stack, x_TD, view, dropout_key)
    return x_TD, None, routing

  def _append(self, blocks, layers: range, x_TD, view: View, cache):
    """`_run`, unrolled: with a cache, a scan would copy that and weights each time."""
    for i, number in enumerate(layers):
      if isinstance(blocks, tuple):
        block = blocks[i]
      else:
        block = jax.tree.map(lambda x, i=i: x[i], blocks)
      window = self.config.windows[number]
      x_TD, cache, _ = block(x_TD, view, window, cache, number, None)
    return x_TD, cache, None

  def _scan(self, stack, x_TD, view: View, dropout_key):
    """`_run`, layer by layer; `stack` is (blocks, their numbers, their windows)."""
    windows = self.config.windows
    same = len(set(windows)) == 1

    def layer(x_TD, xs):
      block, number, window = xs
      window = windows[0] if same else window  # a number, which some kernels need
      key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
      x_TD, _, routing = block(x_TD, view, window, None, number, key)
      return x_TD, routing

    if self.config.remat != "none":
      layer = jax.checkpoint(layer, policy=_remat_policy(self.config))
    unroll = min(self.config.unroll, len(stack[1]))
    return jax.lax.scan(layer, x_TD, stack, unroll=unroll)

  def _run_pipeline(self, now: Layout, stack, x_TD, view: View, dropout_key):
    """`_run` on the mesh's pipeline stages: (x_TD, Routing with a leading S)."""
    B, M = view.segment_ids_BL.shape[0], now.microbatches

    def cut(x_BL):
      # Microbatch m has rows m, m + M, ...: so each device keeps its own rows.
      x = jnp.swapaxes(x_BL.reshape(-1, M, *x_BL.shape[1:]), 0, 1)
      return constrain(x, None, "batch", "length", *(None,) * (x.ndim - 3))

    def apply(stack, x_TD, view, number):
      key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
      return self._scan(stack, x_TD, view, key)

    x_MTD, routing = pipeline(
      apply, stack, jax.vmap(join_rows)(cut(split_rows(x_TD, B))),
      jax.tree.map(cut, view), stages=now.ways("layer"), repeats=now.stage_repeats,
    )  # fmt: skip
    x_MBLD = jax.vmap(lambda x: split_rows(x, B // M))(x_MTD)
    x_BLD = jnp.swapaxes(x_MBLD, 0, 1).reshape(B, *x_MBLD.shape[2:])
    return constrain(join_rows(x_BLD), *_STREAM), routing

  def for_vocabulary(self, x: jax.Array) -> jax.Array:
    """Returns the features that the output matrix takes: after the mlm head, if any."""
    return self.head.transform(x) if self.config.head == "mlm" else x

  def vocab_bias(self) -> jax.Array | None:
    """Returns the bias of the logits, which only the mlm head has."""
    return self.head.vocab_bias[...] if self.config.head == "mlm" else None

  def unembedding(self) -> jax.Array:
    """Returns the output matrix, DV, in the dtype of the activations."""
    weight = self.embed if self.unembed is None else self.unembed
    w = gather(weight[...].astype(self.config.dtype), weight.axes)
    return w.T if self.unembed is None else w

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Returns the scores of the vocabulary in float32, BLV."""
    weight = self.embed if self.unembed is None else self.unembed
    # No transpose: in decoding, XLA:CPU would copy the whole table for each token.
    logits_BLV = jnp.einsum(
      "BLD,VD->BLV" if self.unembed is None else "BLD,DV->BLV",
      self.for_vocabulary(x_BLD),
      gather(weight[...].astype(self.config.dtype), weight.axes),
      preferred_element_type=jnp.float32,
    )
    bias_V, cap = self.vocab_bias(), self.config.logit_softcap
    if bias_V is not None:
      logits_BLV += bias_V[None, None, :]
    return cap * jnp.tanh(logits_BLV / cap) if cap else logits_BLV


def describe_weights(model: Transformer) -> list[tuple[str, tuple[int, ...], tuple]]:
  """Returns (path, shape, names of the dimensions) of each parameter, in tree order.

  The model may be the abstract one of `jax.eval_shape`, which needs no memory.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    model, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  rows = []
  for path, leaf in leaves:
    name = "/".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
    rows.append((name, tuple(leaf.get_value().shape), tuple(leaf.axes)))
  return rows
