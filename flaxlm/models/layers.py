"""The small parts: weights with named dimensions, norms, rotary positions, the MLP."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.quantized import quantized_matmul
from flaxlm.parallel.sharding import constrain, gather


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """`config.model.rope`."""

  theta: float
  local_theta: float
  scaling: str
  factor: float
  original_max_len: int
  low_frequency_factor: float
  high_frequency_factor: float
  beta_fast: float
  beta_slow: float
  attention_factor: float


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """`config.model.moe`."""

  num_experts: int
  experts_per_token: int
  expert_dim: int
  shared_dim: int
  shared_gate: bool
  first_dense_layers: int
  router: str
  renormalize: bool
  routed_scale: float
  balance: str
  aux_loss: float
  z_loss: float
  bias_rate: float
  capacity_factor: float


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """`config.model`; each field is documented in configs/base.py."""

  vocab_size: int
  max_len: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  causal: bool
  positions: str
  norm: str
  norm_epsilon: float
  norm_placement: str
  zero_centered_norm: bool
  first_norm: bool
  gated_mlp: bool
  activation: str
  use_bias: bool
  qkv_bias: bool
  qk_norm: str
  tie_embeddings: bool
  scale_embeddings: bool
  embedding_norm: bool
  num_segment_types: int
  sliding_window: int
  layer_pattern: tuple[str, ...]
  attention_scale: float
  attention_softcap: float
  attention_sinks: bool
  logit_softcap: float
  head: str
  num_labels: int
  pooling: str
  head_dense: bool
  head_norm: bool
  head_activation: str
  pair_head: bool
  dropout: float
  rope: RopeConfig
  moe: MoeConfig
  attention: str
  dtype: str
  quantize: str
  remat: str
  keep: tuple[str, ...]
  offload: tuple[str, ...]
  unroll: int

  def __post_init__(self):
    # The groups arrive as ConfigDicts, which cannot be hashed.
    if not isinstance(self.rope, RopeConfig):
      object.__setattr__(self, "rope", RopeConfig(**self.rope))
    if not isinstance(self.moe, MoeConfig):
      object.__setattr__(self, "moe", MoeConfig(**self.moe))

  @property
  def windows(self) -> tuple[int, ...]:
    """How many tokens each layer sees; 0 is all."""
    kinds = [self.layer_pattern[i % len(self.layer_pattern)] for i in self.layers]
    return tuple(self.sliding_window if kind == "local" else 0 for kind in kinds)

  @property
  def layers(self) -> range:
    return range(self.num_layers)

  @property
  def num_first_layers(self) -> int:
    """Layers at the beginning that are built otherwise than the rest."""
    dense = self.moe.first_dense_layers if self.moe.num_experts else 0
    return max(dense, 0 if self.first_norm else 1)


ACTIVATIONS: dict[str, Callable] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
}


def weight(rngs: nnx.Rngs, shape: tuple, axes: tuple, scale: float = 0.02) -> nnx.Param:
  """A float32 array, normal with deviation `scale`; `axes` names each dimension.

  GPT-2's initialisation (Radford et al. 2019): 0.02, and less by sqrt(2 * layers) where
  a matrix writes into the residual stream.
  """
  return nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)


def bias(shape: tuple, axes: tuple) -> nnx.Param:
  return nnx.Param(jnp.zeros(shape), axes=axes)


def residual_scale(config: TransformerConfig) -> float:
  return 0.02 * (2 * config.num_layers) ** -0.5


class Turned(nnx.Param):
  """A weight whose summed dimensions are its last, where few rows meet it (decoding).

  XLA:CPU copies the right-hand matrix of a product into blocks; here the few rows are
  on the right, and 2 to 32 of them take half to two thirds of the time.
  """


def turn(weight: nnx.Param, num_summed: int = 1) -> Turned:
  """Returns the weight as `project` wants it for few rows, in a copy."""
  first = jnp.moveaxis(weight[...], range(num_summed), range(-num_summed, 0))
  axes = (*weight.axes[num_summed:], *weight.axes[:num_summed])
  return Turned(first, axes=axes)


def project(
  x: jax.Array, weight: nnx.Param, num_summed: int = 1, quantize: str = "none"
) -> jax.Array:
  """Product of the last `num_summed` dimensions of `x` with the first of a weight.

  As one product of two matrices, in the type of `x` or in 8 bits (quantize = fp8 |
  int8): with heads as dimensions of their own, XLA transposes the weights and their
  gradients in every step.
  """
  w = gather(weight[...].astype(x.dtype), weight.axes)
  turned, rows = isinstance(weight, Turned), x.shape[: x.ndim - num_summed]
  out = w.shape[: w.ndim - num_summed] if turned else w.shape[num_summed:]
  x_TI = x.reshape(-1, math.prod(x.shape[len(rows) :]))
  if turned:
    w_OI = w.reshape(-1, x_TI.shape[1])
    w_IO = w_OI.T
  else:
    w_IO = w.reshape(x_TI.shape[1], -1)
  if turned and quantize == "none":
    # Behind a barrier, or XLA would turn the product round.
    y_TO = jax.lax.optimization_barrier(jnp.einsum("OI,TI->OT", w_OI, x_TI)).T
  elif quantize == "none":
    y_TO = jnp.einsum("TI,IO->TO", x_TI, w_IO)
  else:
    y_TO = quantized_matmul(x_TI, w_IO, quantize)
  return y_TO.reshape(*rows, *out)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
  """Adds a bias of the last dimensions, in the type of the activations."""
  if bias is None:
    return x
  b = bias[...].astype(x.dtype)
  return x + b.reshape((1,) * (x.ndim - b.ndim) + b.shape)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of `x` and scales the rest (Srivastava et al. 2014)."""
  if key is None or not rate:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Norm(nnx.Module):
  """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), in float32.

  Over all dimensions of `shape`; `rms` asks for RMSNorm whatever the config's kind.
  """

  def __init__(
    self, shape: tuple, config: TransformerConfig, axes: tuple, rms: bool = False
  ):
    self.center = config.norm == "layernorm" and not rms
    self.zero_centered = config.zero_centered_norm
    initial = jnp.zeros if self.zero_centered else jnp.ones
    self.scale = nnx.Param(initial(shape), axes=axes)
    self.bias = bias(shape, axes) if self.center and config.use_bias else None
    self.epsilon = config.norm_epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.scale[...]
    dims = tuple(range(x.ndim - scale.ndim, x.ndim))
    # The rank is spelt out: no silent broadcasting anywhere in the package.
    rank = (1,) * (x.ndim - scale.ndim)
    y = x.astype(jnp.float32)
    if self.center:
      y = y - jnp.mean(y, axis=dims, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=dims, keepdims=True) + self.epsilon)
    y = y * (scale + self.zero_centered).reshape(rank + scale.shape)
    if self.bias is not None:
      y = y + self.bias[...].reshape(rank + scale.shape)
    return y.astype(x.dtype)


def make_norm(config: TransformerConfig) -> Norm:
  return Norm((config.embed_dim,), config, ("norm",))


def rotary_frequencies(rope: RopeConfig, head_dim: int, local: bool) -> tuple:
  """Returns (radians per position of the H/2 pairs, float32; factor of sin and cos).

  Scaling: linear (Chen et al. 2023), llama3 (Llama 3.1, by wavelength), yarn (Peng et
  al. 2023, eq. 22 and 23). Local layers with a theta of their own are not scaled: their
  window is as long as in training.
  """
  own = local and rope.local_theta
  pairs = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  plain = 1.0 / np.float32(rope.local_theta if own else rope.theta) ** pairs
  if own or rope.scaling == "none":
    return plain, 1.0
  scaled = plain / np.float32(rope.factor)
  if rope.scaling == "linear":
    return scaled, 1.0
  length = rope.original_max_len
  if rope.scaling == "llama3":
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    turns = length * plain / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (keep * plain + (1 - keep) * scaled).astype(np.float32), 1.0

  def pair_of(turns: float) -> float:  # the pair that turns so often in `length`
    return head_dim * math.log(length / (turns * 2 * math.pi)) / (
      2 * math.log(rope.theta)
    )  # fmt: skip

  first = max(math.floor(pair_of(rope.beta_fast)), 0)
  last = min(math.ceil(pair_of(rope.beta_slow)), head_dim - 1)
  pair = np.arange(head_dim // 2, dtype=np.float32)
  drop = np.clip((pair - first) / max(last - first, 1e-3), 0, 1)
  factor = rope.attention_factor or 0.1 * math.log(max(rope.factor, 1)) + 1
  return (drop * scaled + (1 - drop) * plain).astype(np.float32), factor


def rotary_angles(
  positions_BL: jax.Array, rope: RopeConfig, head_dim: int, local: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Returns (sin, cos) of each position's H/2 angles, as BLH (arXiv 2104.09864)."""
  frequencies, factor = rotary_frequencies(rope, head_dim, local)
  angles = positions_BL[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
  return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x_BLNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs (i, i + H/2) of each head by their position's angles."""
  sin, cos = (a[:, :, None, :].astype(x_BLNH.dtype) for a in angles)
  left, right = jnp.split(x_BLNH, 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Mlp(nnx.Module):
  """Two matrices, or three with a gate (Shazeer 2020: SwiGLU, GeGLU)."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, mlp_dim: int):
    D, F = config.embed_dim, mlp_dim
    self.activation, self.quantize = config.activation, config.quantize
    self.up = weight(rngs, (D, F), ("embed", "mlp"))
    self.gate = weight(rngs, (D, F), ("embed", "mlp")) if config.gated_mlp else None
    self.down = weight(rngs, (F, D), ("mlp", "embed"), residual_scale(config))
    self.up_bias = bias((F,), ("mlp",)) if config.use_bias else None
    self.gate_bias = (
      bias((F,), ("mlp",)) if config.use_bias and config.gated_mlp else None
    )
    self.down_bias = bias((D,), ("norm",)) if config.use_bias else None

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    activate = ACTIVATIONS[self.activation]
    hidden_TF = project(x_TD, self.up, quantize=self.quantize)
    hidden_TF = add_bias(hidden_TF, self.up_bias)
    hidden_TF = checkpoint_name(hidden_TF, "hidden")
    if self.gate is None:
      hidden_TF = activate(hidden_TF)
    else:
      gate_TF = project(x_TD, self.gate, quantize=self.quantize)
      gate_TF = add_bias(gate_TF, self.gate_bias)
      gate_TF = checkpoint_name(gate_TF, "hidden")
      hidden_TF = activate(gate_TF) * hidden_TF
    hidden_TF = constrain(hidden_TF, "tokens", "mlp")
    out_TD = project(hidden_TF, self.down, quantize=self.quantize)
    return add_bias(out_TD, self.down_bias)
