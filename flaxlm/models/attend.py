"""Calls the attention kernel that a layer needs, on one device or a mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxlm.kernels.attention.attention import attention, refuse_case
from flaxlm.kernels.attention.choice import Case, choose_backend, load_measured
from flaxlm.kernels.attention.chunked import pays
from flaxlm.kernels.attention.ring import ring_attention
from flaxlm.kernels.attention.splash import splash_attention
from flaxlm.models.config import TransformerConfig
from flaxlm.models.rope import rotary_angles
from flaxlm.parallel.sharding import constrain, current_layout, shard_map


class View(NamedTuple):
  """What decides which tokens see each other, and how far apart they are."""

  segment_ids_BL: jax.Array
  prefix_BL: jax.Array | None  # 1: all of its segment see this token (prefix LM)
  angles: tuple | None  # rotary, of global layers
  local_angles: tuple | None  # rotary, of local layers, where these differ

  @classmethod
  def of(cls, config: TransformerConfig, positions_BL, segment_ids_BL, prefix_BL):
    angles = local_angles = None
    if config.positions == "rope":
      angles = rotary_angles(positions_BL, config.rope, config.head_dim)
      if config.rope.local_theta and config.sliding_window:
        local_angles = rotary_angles(positions_BL, config.rope, config.head_dim, True)
    return cls(segment_ids_BL, prefix_BL, angles, local_angles)

  def angles_of(self, window):
    """The rotary angles of a layer that sees `window` tokens, a number or an array."""
    if self.local_angles is None:
      return self.angles
    return jax.tree.map(
      lambda own, other: jnp.where(window > 0, own, other),
      self.local_angles,
      self.angles,
    )


def mask_and_scale(config: TransformerConfig) -> dict:
  return {
    "causal": config.causal,
    "scale": config.attention_scale,
    "softcap": config.attention_softcap,
  }


def attend(config: TransformerConfig, q_BLNH, k_BMKH, v_BMKH, sinks_N, view, window):
  """Attention within the rows of a batch, by the backend and the mesh of the config.

  Where the length is split and the backend is not a ring, each device gets whole rows
  of some heads: XLA exchanges them all-to-all, before and after (Ulysses, Jacobs et al.
  2023, arXiv 2309.14509).
  """
  now = current_layout()
  split = now is not None and now.ways("length") > 1
  backend = form_of(config, view, q_BLNH.shape[1], split)
  rows, heads = ("batch", None), "all_heads" if split else "heads"
  if backend == "ring":
    rows, heads = ("batch", "length"), "heads"
  dims = (*rows, heads, None)
  ids_BL = view.segment_ids_BL
  if split and backend != "ring":
    q_BLNH, k_BMKH, v_BMKH = (constrain(x, *dims) for x in (q_BLNH, k_BMKH, v_BMKH))
    ids_BL = constrain(ids_BL, *rows)

  def local(q, k, v, ids, prefix, sinks, traced):
    options = mask_and_scale(config) | {"sinks_N": sinks}
    options["window"] = window if traced is None else traced
    if backend == "splash":
      width = config.sliding_window
      return splash_attention(q, k, v, ids, sliding_window=width, **options)
    if backend == "ring":
      (axis,) = now.axes("length")
      return ring_attention(
        q, k, v, axis_name=axis, q_segment_ids_Bl=ids, k_segment_ids_Bm=ids,
        k_prefix_Bm=prefix, **options,
      )  # fmt: skip
    return attention(
      q, k, v, q_segment_ids_BL=ids, k_segment_ids_BM=ids, k_prefix_BM=prefix,
      backend=backend, **options,
    )  # fmt: skip

  # The layers of a scan have windows that are not known when it is traced.
  traced = None if isinstance(window, int) else window
  arrays = (q_BLNH, k_BMKH, v_BMKH, ids_BL, view.prefix_BL, sinks_N, traced)
  if now is None or backend not in ("splash", "ring", "chunked"):
    out_BLNH = local(*arrays)
    return constrain(out_BLNH, *dims) if split else out_BLNH
  # Kernels and loops are black boxes to the compiler: each device runs its own part.
  return shard_map(local, [dims, dims, dims, rows, rows, (heads,), ()], dims)(*arrays)


def form_of(config: TransformerConfig, view: View, L: int, split: bool) -> str:
  """The backend of whole rows, by config, device and shape.

  Raises:
    ValueError: the config names one that cannot compute this.
  """
  now, backend = current_layout(), config.attention
  if backend == "ring" and split:
    return backend
  # Of the mesh, which may be that of a machine that is not here.
  device = jax.devices()[0] if now is None else now.mesh.devices.flat[0]
  case = Case(
    device.platform, config.dtype, L, L, config.head_dim, config.attention_softcap,
    view.prefix_BL is not None, config.attention_sinks,
  )  # fmt: skip
  if backend in ("auto", "ring"):
    backend = choose_backend(case, load_measured(device.device_kind, jax.__version__))
  # Whether the device suits was checked by program.build; plan traces for others.
  refuse_case(backend, case._replace(platform=""))
  if backend == "xla":
    return "chunked" if pays(device.platform, L, L) else "dense"
  return backend


def value_of(weight: nnx.Param | None) -> jax.Array | None:
  return None if weight is None else weight[...]
