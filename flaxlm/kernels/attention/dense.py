"""Attention that holds all scores of a query at once, with its own backward pass.

Heads come first, so that each product is one matrix product per head. The L x M scores
are kept once, as weights; autodiff would keep and read them three times. The sum that
softmax's gradient needs is taken over H numbers instead of M (Dao et al. 2022, arXiv
2205.14135, section B.2). With a causal mask, each block of queries leaves out the keys
after its last query.

On a CPU, training takes half the time of `jax.nn.dot_product_attention` at lengths from
64 to 512 (tests/benchmarks/RESULTS.md).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_MAX_BLOCKS, _MIN_TOKENS = 4, 64  # blocks of queries, and tokens per block


def dense_attention(
  q_BLNH: jax.Array,
  k_BMKH: jax.Array,
  v_BMKH: jax.Array,
  mask_BLM: jax.Array,
  scale: float,
  only_before: bool,
) -> jax.Array:
  """Returns softmax(scale * q k^T) v as BLNH, with scores in float32.

  Args:
    mask_BLM: where a query sees a key; B may be 1.
    only_before: L is M, and no query l sees a key after l.
  """
  B, L, N, H = q_BLNH.shape
  K = k_BMKH.shape[2]
  # Scaled here: H numbers per query instead of M.
  q_BLKGH = (q_BLNH * jnp.asarray(scale, q_BLNH.dtype)).reshape(B, L, K, N // K, H)
  q_BKGLH = jnp.transpose(q_BLKGH, (0, 2, 3, 1, 4))
  k_BKMH, v_BKMH = jnp.swapaxes(k_BMKH, 1, 2), jnp.swapaxes(v_BMKH, 1, 2)
  blocks = min(_MAX_BLOCKS, L // _MIN_TOKENS) if only_before else 1
  outs, first = [], 0
  for i in range(1, max(blocks, 1) + 1):
    end = L * i // max(blocks, 1)
    seen = end if only_before else k_BKMH.shape[2]
    outs.append(
      _weighted_values(
        q_BKGLH[:, :, :, first:end], k_BKMH[:, :, :seen], v_BKMH[:, :, :seen],
        mask_BLM[:, first:end, :seen],
      )
    )  # fmt: skip
    first = end
  out_BKGLH = jnp.concatenate(outs, axis=3)
  return jnp.transpose(out_BKGLH, (0, 3, 1, 2, 4)).reshape(B, L, N, H)


@jax.custom_vjp
def _weighted_values(q_BKGLH, k_BKMH, v_BKMH, mask_BLM) -> jax.Array:
  return _weighted_values_fwd(q_BKGLH, k_BKMH, v_BKMH, mask_BLM)[0]


def _weighted_values_fwd(q_BKGLH, k_BKMH, v_BKMH, mask_BLM):
  scores = jnp.einsum(
    "BKGLH,BKMH->BKGLM", q_BKGLH, k_BKMH, preferred_element_type=jnp.float32
  )
  p_BKGLM = jax.nn.softmax(jnp.where(mask_BLM[:, None, None], scores, -1e30))
  p_BKGLM = p_BKGLM.astype(v_BKMH.dtype)
  out_BKGLH = jnp.einsum("BKGLM,BKMH->BKGLH", p_BKGLM, v_BKMH)
  out_BKGLH = checkpoint_name(out_BKGLH, "attention")
  return out_BKGLH, (q_BKGLH, k_BKMH, v_BKMH, p_BKGLM, out_BKGLH)


def _weighted_values_bwd(saved, dout_BKGLH):
  q_BKGLH, k_BKMH, v_BKMH, p_BKGLM, out_BKGLH = saved
  dp_BKGLM = jnp.einsum(
    "BKGLH,BKMH->BKGLM", dout_BKGLH, v_BKMH, preferred_element_type=jnp.float32
  )
  product = dout_BKGLH.astype(jnp.float32) * out_BKGLH.astype(jnp.float32)
  mean_BKGL1 = jnp.sum(product, axis=-1, keepdims=True)
  ds_BKGLM = (p_BKGLM * (dp_BKGLM - mean_BKGL1)).astype(q_BKGLH.dtype)
  dq_BKGLH = jnp.einsum("BKGLM,BKMH->BKGLH", ds_BKGLM, k_BKMH)
  dk_BKMH = jnp.einsum("BKGLM,BKGLH->BKMH", ds_BKGLM, q_BKGLH)
  dv_BKMH = jnp.einsum("BKGLM,BKGLH->BKMH", p_BKGLM, dout_BKGLH)
  return dq_BKGLH, dk_BKMH, dv_BKMH, None


_weighted_values.defvjp(_weighted_values_fwd, _weighted_values_bwd)
