"""From logical dimensions to devices: one rule table for weights and activations.

Each weight names its dimensions where it is defined ("embed", "mlp"); the table in the
config says which mesh axes split each name. XLA inserts the communication (GSPMD).
"""

import contextlib
import contextvars
import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxlm.errors import ConfigError

_rules = contextvars.ContextVar("rules", default=None)


@contextlib.contextmanager
def use_mesh(mesh: jax.sharding.Mesh, rules: dict[str, tuple[str, ...]]):
  """Makes `mesh` and the rule table current, for tracing and for `constrain`."""
  token = _rules.set(dict(rules))
  try:
    with jax.set_mesh(mesh):
      yield mesh
  finally:
    _rules.reset(token)


def spec(dims: tuple[str | None, ...], rules: dict[str, tuple[str, ...]]) -> P:
  """The mesh axes of an array whose dimensions are named `dims`."""
  for dim in dims:
    if dim is not None and dim not in rules:
      raise ConfigError(
        f"config.mesh.rules.{dim}", "no rule", "mesh axes for it, or ()"
      )
  axes = [tuple(rules[dim]) if dim is not None else () for dim in dims]
  # A mesh axis splits one dimension of an array: the first that asks for it.
  used, chosen = set(), []
  for names in axes:
    names = tuple(name for name in names if name not in used)
    used |= set(names)
    chosen.append(names if len(names) > 1 else names[0] if names else None)
  return P(*chosen)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """Asks XLA to lay `x` out by the current rules; a no-op without a mesh."""
  rules = _rules.get()
  if rules is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(dims, rules))


def sharding_of(
  name: str, shape: tuple[int, ...], dims: tuple, mesh: jax.sharding.Mesh, rules: dict
) -> NamedSharding:
  """The sharding of one weight; a dimension that does not divide is an error.

  A stack of layers has one leading dimension more than `dims` names: it stays whole.
  """
  assert len(shape) - len(dims) in (0, 1), f"{name}: {shape} is not described by {dims}"
  dims = (None,) * (len(shape) - len(dims)) + tuple(dims)
  partition = spec(dims, rules)
  for size, dim, axes in zip(shape, dims, partition, strict=True):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    ways = 1
    for axis in axes:
      ways *= mesh.shape[axis]
    if size % ways:
      raise ConfigError(
        f"config.mesh ({' x '.join(axes)} = {ways} devices)",
        f"{name} of shape {shape}, whose dimension '{dim}' = {size}",
        f"a multiple of {ways}, or another config.mesh.rules.{dim}",
      )
  return NamedSharding(mesh, partition)


def bytes_per_device(tree) -> int:
  """What each device holds of arrays, or of abstract ones that have a sharding."""
  leaves = jax.tree.leaves(tree)
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
  )
