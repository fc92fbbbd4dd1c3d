"""Attention on TPUs: JAX's splash kernel, which never holds the matrix of scores.

Blocks that the mask hides are not computed. The causal or sliding mask is fixed when
the kernel is made; segment ids are compared while it runs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.kernels.attention.choice import LANES

_BLOCK = 512  # tokens per block; larger ones do not fit side by side


@functools.lru_cache(maxsize=32)
def _make_kernel(
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
  block = next(size for size in (_BLOCK, 384, 256, LANES) if L % size == 0)
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
  sinks_N: jax.Array | None,
  q_segment_ids_BL: jax.Array | None,
  k_segment_ids_BM: jax.Array | None,
  *,
  causal: bool,
  window: jax.Array | int,
  sliding_window: int,
  scale: float,
  softcap: float,
  interpret: bool,
) -> jax.Array:
  """Returns what `attention` returns, for whole rows.

  A `window` that is an array is either 0 or `sliding_window`.
  """
  L, N = q_BLNH.shape[1:3]
  q_BNLH, k_BKMH, v_BKMH = (
    jnp.swapaxes(x, 1, 2) for x in (q_BLNH * scale, k_BMKH, v_BMKH)
  )
  if q_segment_ids_BL is None:
    q_segment_ids_BL = k_segment_ids_BM = jnp.ones(q_BLNH.shape[:2], jnp.int32)

  def run(window: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _make_kernel(N, L, causal, window, softcap, interpret)

    def one_row(q_NLH, k_KMH, v_KMH, q_ids_L, k_ids_M):
      return kernel(q_NLH, k_KMH, v_KMH, SegmentIds(q_ids_L, k_ids_M), sinks_N)

    return jax.vmap(one_row)(q_BNLH, k_BKMH, v_BKMH, q_segment_ids_BL, k_segment_ids_BM)

  if isinstance(window, int):
    out_BNLH = run(window)
  else:  # layers in a scan may have different windows
    out_BNLH = jax.lax.cond(window > 0, lambda: run(sliding_window), lambda: run(0))
    out_BNLH = checkpoint_name(out_BNLH, "attention")
  return jnp.swapaxes(out_BNLH, 1, 2).astype(q_BLNH.dtype)
