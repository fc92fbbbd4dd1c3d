"""The small parts: weights with named dimensions, products, norms, dropout, the MLP."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flaxlm.errors import ConfigError
from flaxlm.kernels.matmul_8bit import quantized_matmul
from flaxlm.models.config import TransformerConfig
from flaxlm.parallel.sharding import constrain, gather

_ACTIVATIONS: dict[str, Callable] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
}


def find_activation(name: str) -> Callable:
  """Returns the activation function of this name."""
  if name not in _ACTIVATIONS:
    raise ConfigError("config.model.activation", name, " ".join(_ACTIVATIONS))
  return _ACTIVATIONS[name]


def weight(rngs: nnx.Rngs, shape: tuple, axes: tuple, scale: float = 0.02) -> nnx.Param:
  """Returns a float32 weight from a normal distribution; `axes` names its dimensions.

  The scales are GPT-2's (Radford et al. 2019): 0.02, divided by sqrt(2 * layers) for
  matrices that write into the residual stream.
  """
  return nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)


def bias(shape: tuple, axes: tuple) -> nnx.Param:
  return nnx.Param(jnp.zeros(shape), axes=axes)


def residual_scale(config: TransformerConfig) -> float:
  return 0.02 * (2 * config.num_layers) ** -0.5


class Transposed(nnx.Param):
  """A weight with its summed dimensions last, for products with few rows (decoding).

  XLA:CPU copies the right-hand matrix of a product into blocks. Here that matrix is the
  few rows: 2 to 32 of them take half to two thirds of the time.
  """


def transpose_weight(weight: nnx.Param, num_summed: int = 1) -> Transposed:
  """Returns a copy of the weight in the layout that is fast for few rows."""
  first = jnp.moveaxis(weight[...], range(num_summed), range(-num_summed, 0))
  axes = (*weight.axes[num_summed:], *weight.axes[:num_summed])
  return Transposed(first, axes=axes)


def project(
  x: jax.Array, weight: nnx.Param, num_summed: int = 1, quantize: str = "none"
) -> jax.Array:
  """Returns the product over the last `num_summed` dimensions of `x`.

  It is one product of two matrices, in the dtype of `x` or in 8 bits (quantize = fp8 |
  int8). With heads as a dimension of their own, XLA would transpose the weights and
  their gradients in every step.
  """
  w = gather(weight[...].astype(x.dtype), weight.axes)
  transposed, rows = isinstance(weight, Transposed), x.shape[: x.ndim - num_summed]
  out = w.shape[: w.ndim - num_summed] if transposed else w.shape[num_summed:]
  x_TI = x.reshape(-1, math.prod(x.shape[len(rows) :]))
  if transposed:
    w_OI = w.reshape(-1, x_TI.shape[1])
    w_IO = w_OI.T
  else:
    w_IO = w.reshape(x_TI.shape[1], -1)
  if transposed and quantize == "none":
    # Without the barrier, XLA would transpose the product back.
    y_TO = jax.lax.optimization_barrier(jnp.einsum("OI,TI->OT", w_OI, x_TI)).T
  elif quantize == "none":
    y_TO = jnp.einsum("TI,IO->TO", x_TI, w_IO)
  else:
    y_TO = quantized_matmul(x_TI, w_IO, quantize)
  return y_TO.reshape(*rows, *out)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
  """Adds a bias over the last dimensions, in the dtype of the activations."""
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

  It runs over all dimensions of `shape`; `rms` makes it RMSNorm whatever the config.
  """

  def __init__(
    self, shape: tuple, config: TransformerConfig, axes: tuple, rms: bool = False
  ):
    if config.norm not in ("layernorm", "rmsnorm"):
      raise ConfigError("config.model.norm", config.norm, "rmsnorm or layernorm")
    self.center = config.norm == "layernorm" and not rms
    self.zero_centered = config.zero_centered_norm
    initial = jnp.zeros if self.zero_centered else jnp.ones
    self.scale = nnx.Param(initial(shape), axes=axes)
    self.bias = bias(shape, axes) if self.center and config.use_bias else None
    self.epsilon = config.norm_epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.scale[...]
    dims = tuple(range(x.ndim - scale.ndim, x.ndim))
    # The rank is explicit: nothing in the package broadcasts silently.
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
    activate = find_activation(self.activation)
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
