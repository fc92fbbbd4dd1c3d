"""The table of a config's weights. Shapes alone are computed: 175B fits on a laptop.

The mesh is the config's, not this machine's: `mesh.data=-1` counts as 1 here.
"""

import math

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from flaxlm.console import short_number
from flaxlm.models.cost import flops_per_token
from flaxlm.models.transformer import describe_weights
from flaxlm.parallel import AXES
from flaxlm.parallel.mesh import axis_sizes
from flaxlm.parallel.sharding import bytes_per_device
from flaxlm.runs.weights import abstract_model
from flaxlm.training.optim import make_optimizer
from flaxlm.training.state import with_shardings


def weight_table(config) -> str:
  """Returns the lines that `train --describe` prints."""
  sizes = axis_sizes(config.mesh)
  sizes["data"] = max(sizes["data"], 1)
  mesh = AbstractMesh(tuple(sizes.values()), AXES)
  rules = config.mesh.rules.to_dict()
  model = with_shardings(abstract_model(config), mesh, rules)
  rows = [("weight", "shape", "type", "dimensions", "split over", "MB/device")]
  leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
  for (path, shape, axes), leaf in zip(describe_weights(model), leaves, strict=True):
    array = leaf.get_value()
    layers = ("layer",) * (len(shape) - len(axes))
    parts = " ".join("-" if p is None else str(p) for p in array.sharding.spec)
    rows.append(
      (
        path,
        " x ".join(map(str, shape)),
        str(array.dtype),
        " ".join(str(axis or "-") for axis in (*layers, *axes)),
        parts.replace("'", "") if mesh.size > 1 else "-",
        f"{bytes_per_device(array) / 1e6:,.3f}",
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]
  return "\n".join([*lines, "", *_totals(config, model, mesh, rules)])


def _totals(config, model, mesh: AbstractMesh, rules: dict) -> list[str]:
  tx, _ = make_optimizer(config.num_steps, **config.optim)
  moments = with_shardings(jax.eval_shape(tx.init, model), mesh, rules)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
  flops = flops_per_token(config.model, config.data.seq_len)
  return [
    f"parameters       {count:,}",
    f"FLOPs per token  {short_number(flops)} to train (forward and backward, at "
    f"config.data.seq_len={config.data.seq_len})",
    f"per device       {bytes_per_device(model) / 1e9:,.3f} GB of weights, "
    f"{bytes_per_device(moments) / 1e9:,.3f} GB of "
    f"{config.optim.name}'s state, on a mesh of "
    + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
  ]
