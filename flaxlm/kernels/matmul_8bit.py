"""Matrix products in 8 bits, with gradients, for the layers of a model.

Scales come from the current numbers, in the step itself; there is no history to keep.
Activations have one scale per row. A token's result therefore depends on no other
token: packed documents stay apart, and decoding does not depend on the batch.

fp8: e4m3 forward, gradients in e5m2, which has more range and fewer digits
(Micikevicius et al. 2022, arXiv 2209.05433). int8: the forward pass alone, with one
scale per column of the weight as well; the gradient is that of the exact product
(straight-through).
"""

import jax
import jax.numpy as jnp

from flaxlm.errors import ConfigError


def quantized_matmul(x_TI: jax.Array, w_IO: jax.Array, kind: str) -> jax.Array:
  """Returns x times w in the dtype of x, multiplied in 8 bits and summed in 32.

  Args:
    kind: fp8 | int8.
  """
  if kind == "fp8":
    return _fp8_matmul(x_TI, w_IO)
  elif kind == "int8":
    return _int8_matmul(x_TI, w_IO)
  else:
    raise ConfigError("config.model.quantize", kind, "fp8 or int8")


def quantize(x: jax.Array, dtype, axis: int | None) -> tuple[jax.Array, jax.Array]:
  """Returns (x / scale in `dtype`, scale in float32, of size 1 along `axis`).

  The largest magnitude along `axis`, or of the whole array if it is None, becomes the
  largest number of the dtype.
  """
  whole = jnp.issubdtype(dtype, jnp.integer)
  largest = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / largest
  scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)  # in case all are zero
  x = x / scale
  return (jnp.round(x) if whole else x).astype(dtype), scale


def _dot(equation: str, a, b, dtype=jnp.float32) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=dtype)


@jax.custom_vjp
def _fp8_matmul(x_TI, w_IO):
  return _fp8_forward(x_TI, w_IO)[0]


def _fp8_forward(x_TI, w_IO):
  x8_TI, x_scale_T1 = quantize(x_TI, jnp.float8_e4m3fn, 1)
  w8_IO, w_scale = quantize(w_IO, jnp.float8_e4m3fn, None)
  y_TO = _dot("TI,IO->TO", x8_TI, w8_IO) * (x_scale_T1 * w_scale)
  like = jnp.zeros((), x_TI.dtype)
  return y_TO.astype(x_TI.dtype), (x8_TI, x_scale_T1, w8_IO, w_scale, like)


def _fp8_backward(kept, g_TO):
  x8_TI, x_scale_T1, w8_IO, w_scale, like = kept
  g8_TO, g_scale_T1 = quantize(g_TO, jnp.float8_e5m2, 1)
  dx_TI = _dot("TO,IO->TI", g8_TO, w8_IO) * (g_scale_T1 * w_scale)
  # The sum runs over rows, so their scales cannot be applied after it.
  h8_TO, h_scale = quantize(g_TO * x_scale_T1, jnp.float8_e5m2, None)
  dw_IO = _dot("TI,TO->IO", x8_TI, h8_TO) * h_scale
  return dx_TI.astype(like.dtype), dw_IO.astype(like.dtype)


_fp8_matmul.defvjp(_fp8_forward, _fp8_backward)


@jax.custom_vjp
def _int8_matmul(x_TI, w_IO):
  x8_TI, x_scale_T1 = quantize(x_TI, jnp.int8, 1)
  w8_IO, w_scale_1O = quantize(w_IO, jnp.int8, 0)
  y_TO = _dot("TI,IO->TO", x8_TI, w8_IO, jnp.int32).astype(jnp.float32)
  return (y_TO * (x_scale_T1 * w_scale_1O)).astype(x_TI.dtype)


def _int8_backward(kept, g_TO):
  x_TI, w_IO = kept
  return jnp.einsum("TO,IO->TI", g_TO, w_IO), jnp.einsum("TI,TO->IO", x_TI, g_TO)


_int8_matmul.defvjp(lambda x, w: (_int8_matmul(x, w), (x, w)), _int8_backward)
