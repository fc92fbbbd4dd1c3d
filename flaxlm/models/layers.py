"""The small parts: weights with named dimensions, norms, rotary positions, the MLP."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.parallel.sharding import constrain


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
  positions: str
  rope_theta: float
  norm: str
  norm_epsilon: float
  mlp: str
  use_bias: bool
  qk_norm: bool
  tie_embeddings: bool
  sliding_window: int
  attention: str
  dtype: str
  remat: str
  unroll: int


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


def project(x: jax.Array, weight: nnx.Param, equation: str) -> jax.Array:
  """einsum of activations with a weight, in the type of the activations."""
  return jnp.einsum(equation, x, weight[...].astype(x.dtype))


class Norm(nnx.Module):
  """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), in float32."""

  def __init__(
    self, size: int, config: TransformerConfig, center: bool, use_bias: bool
  ):
    self.scale = nnx.Param(jnp.ones((size,)), axes=("norm",))
    self.bias = bias((size,), ("norm",)) if use_bias else None
    self.center = center
    self.epsilon = config.norm_epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    if self.center:
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    # The rank is spelt out: no silent broadcasting anywhere in the package.
    broadcast = (1,) * (x.ndim - 1) + (-1,)
    y = y * self.scale[...].reshape(broadcast)
    if self.bias is not None:
      y = y + self.bias[...].reshape(broadcast)
    return y.astype(x.dtype)


def make_norm(config: TransformerConfig) -> Norm:
  layernorm = config.norm == "layernorm"
  return Norm(config.embed_dim, config, layernorm, layernorm and config.use_bias)


def rotary_angles(positions_BL: jax.Array, head_dim: int, theta: float):
  """Returns (sin, cos) of each position's H/2 angles, as BLH (arXiv 2104.09864)."""
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angles = positions_BL[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
  return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BLNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs (i, i + H/2) of each head by their position's angles."""
  sin, cos = (a[:, :, None, :].astype(x_BLNH.dtype) for a in angles)
  left, right = jnp.split(x_BLNH, 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Mlp(nnx.Module):
  """SwiGLU (Shazeer 2020) or GELU in its tanh form (Hendrycks and Gimpel 2016)."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    D, F = config.embed_dim, config.mlp_dim
    self.up = weight(rngs, (D, F), ("embed", "mlp"))
    self.gate = (
      weight(rngs, (D, F), ("embed", "mlp")) if config.mlp == "swiglu" else None
    )
    self.down = weight(rngs, (F, D), ("mlp", "embed"), residual_scale(config))
    self.up_bias = bias((F,), ("mlp",)) if config.use_bias else None
    self.down_bias = bias((D,), ("norm",)) if config.use_bias else None

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    hidden_TF = project(x_TD, self.up, "TD,DF->TF")
    if self.up_bias is not None:
      hidden_TF += self.up_bias[...].astype(x_TD.dtype)[None, :]
    if self.gate is None:
      hidden_TF = jax.nn.gelu(hidden_TF, approximate=True)
    else:
      hidden_TF = jax.nn.silu(project(x_TD, self.gate, "TD,DF->TF")) * hidden_TF
    out_TD = project(constrain(hidden_TF, "batch", "mlp"), self.down, "TF,FD->TD")
    if self.down_bias is not None:
      out_TD += self.down_bias[...].astype(x_TD.dtype)[None, :]
    return out_TD
