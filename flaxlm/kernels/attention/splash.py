"""Attention on TPUs: JAX's splash kernel, which never holds the matrix of scores.

Blocks that the mask hides are not computed. The mask of slots is known when the kernel
is made; segments are compared while it runs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention.attention import refuse_case
from flaxlm.kernels.attention.choice import LANES, Case
from flaxlm.kernels.attention.masks import check_shapes

SPLASH_BLOCK = 512  # tokens of a block; larger ones do not fit beside each other


@functools.lru_cache(maxsize=32)
def make_kernel(
  num_heads: int, L: int, causal: bool, window: int, softcap: float, interpret: bool
):
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  if window:
    reach = (window - 1, 0 if causal else window - 1)
    mask = masks.LocalMask((L, L), reach, offset=0)
  else:
    mask = masks.CausalMask((L, L)) if causal else masks.FullMask((L, L))
  block = next(size for size in (SPLASH_BLOCK, 384, 256, LANES) if L % size == 0)
  sizes = kernels.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
    block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  with jax.ensure_compile_time_eval():  # its tables are constants, not tracers
    return kernels.make_splash_mha(
      masks.MultiHeadMask([mask] * num_heads), block_sizes=sizes,
      attn_logits_soft_cap=softcap or None, head_shards=1, q_seq_shards=1,
      residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip


def splash_attention(
  q_BLNH: jax.Array,
  k_BMKH: jax.Array,
  v_BMKH: jax.Array,
  segment_ids_BL: jax.Array,
  *,
  sinks_N: jax.Array | None = None,
  causal: bool = True,
  window: jax.Array | int = 0,
  sliding_window: int = 0,
  scale: float = 0.0,
  softcap: float = 0.0,
  interpret: bool = False,
) -> jax.Array:
  """Returns what `attention` returns, of whole rows; call it on one device's part.

  A `window` that is an array is either 0 or `sliding_window`. `interpret` runs the
  kernel's program step by step where there is no TPU.

  Raises:
    ValueError: the shapes do not fit, or the kernel cannot compute them.
  """
  check_shapes(q_BLNH, k_BMKH, v_BMKH)
  L, N, H = q_BLNH.shape[1:]
  refuse_case("splash", Case("", q_BLNH.dtype.name, L, k_BMKH.shape[1], H, softcap))
  q_BNLH, k_BKMH, v_BKMH = (
    jnp.swapaxes(x, 1, 2) for x in (q_BLNH * (scale or H**-0.5), k_BMKH, v_BMKH)
  )

  def run(window: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = make_kernel(N, L, causal, window, softcap, interpret)
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, SegmentIds(s, s), sinks_N))(
      q_BNLH, k_BKMH, v_BKMH, segment_ids_BL
    )

  if isinstance(window, int):
    out_BNLH = run(window)
  else:  # the layers of a scan have different ones
    out_BNLH = jax.lax.cond(window > 0, lambda: run(sliding_window), lambda: run(0))
    out_BNLH = checkpoint_name(out_BNLH, "attention")
  return jnp.swapaxes(out_BNLH, 1, 2).astype(q_BLNH.dtype)
