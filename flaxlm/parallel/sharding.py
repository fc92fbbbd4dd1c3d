"""From named dimensions to devices: one rule table for weights and activations.

Each weight names its dimensions where it is defined ("embed", "mlp"). The table in the
config says which mesh axes split each name. XLA inserts the communication (GSPMD).
"""

import contextlib
import contextvars
import dataclasses
import functools
import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxlm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Layout:
  """The mesh and the rules under which a program is traced."""

  mesh: jax.sharding.Mesh
  rules: dict[str, tuple[str, ...]]
  microbatches: int  # of the pipeline over `stage`
  stage_repeats: int  # rounds of each microbatch through the stages

  def axes(self, *dims: str) -> tuple[str, ...]:
    """Returns the mesh axes of more than one device that split these dimensions."""
    names = [axis for dim in dims for axis in self.rules[dim]]
    return tuple(axis for axis in names if self.mesh.shape[axis] > 1)

  def ways(self, *dims: str) -> int:
    """Returns into how many pieces these dimensions are split together."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes(*dims))


_layout = contextvars.ContextVar("layout", default=None)
# Dimensions that combine others: all tokens of a batch (`stream`: between the blocks),
# and heads where each device has whole rows.
_COMBINED = {
  "tokens": ("batch", "length"),
  "stream": ("batch", "length", "stream"),
  "all_heads": ("heads", "length"),
}


@contextlib.contextmanager
def use_mesh(
  mesh: jax.sharding.Mesh,
  rules: dict[str, tuple[str, ...]],
  microbatches: int = 0,
  stage_repeats: int = 1,
):
  """Makes `mesh` and the rule table current, for tracing and for `constrain`.

  Args:
    microbatches: of the pipeline, if mesh.stage > 1; 0 means as many as stages.
    stage_repeats: groups of layers per stage.
  """
  microbatches = microbatches or mesh.shape["stage"]
  token = _layout.set(Layout(mesh, dict(rules), microbatches, stage_repeats))
  try:
    # Some code computes while it is traced (keys, tables of kernels). That needs real
    # devices, which a topology to compile for does not have.
    if mesh.devices.flat[0] in jax.devices():
      here = jax.set_mesh(mesh)
    else:
      here = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with here:
      yield mesh
  finally:
    _layout.reset(token)


def current_layout() -> Layout | None:
  """Returns the current mesh and rules; None outside of `use_mesh`."""
  return _layout.get()


def partition_spec(
  dims: tuple[str | None, ...], rules: dict[str, tuple[str, ...]]
) -> P:
  """Returns the mesh axes that split an array with these dimensions."""
  # A mesh axis can split one dimension of an array: the first whose rule names it.
  used, chosen = set(), []
  for dim in dims:
    names = []
    for name in _COMBINED.get(dim, (dim,)) if dim is not None else ():
      if name not in rules:
        raise ConfigError(
          f"config.mesh.rules.{name}", "no rule", "mesh axes for it, or ()"
        )
      names += [axis for axis in rules[name] if axis not in used]
      used |= set(names)
    chosen.append(tuple(names) if len(names) > 1 else names[0] if names else None)
  return P(*chosen)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """Asks XLA to lay `x` out by the current rules; does nothing without a mesh."""
  now = current_layout()
  if now is None or now.mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(dims, now.rules))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x: jax.Array, source: tuple, target: tuple) -> jax.Array:
  """Moves `x` from one layout to another, and its gradient back.

  A plain constraint would give the gradient the layout of the target: a sum over
  devices would first be gathered whole, and then split.
  """
  return constrain(x, *target)


reshard.defvjp(
  lambda x, source, target: (constrain(x, *target), None),
  lambda source, target, _, gradient: (constrain(gradient, *source),),
)


def gather(weight: jax.Array, dims: tuple) -> jax.Array:
  """Returns a weight as a layer uses it: whole along "embed", which fsdp splits."""
  return reshard(weight, dims, tuple(d if d != "embed" else None for d in dims))


def join_rows(x_BL: jax.Array) -> jax.Array:
  """Reshapes (B, L, ...) to (T, ...), without moving anything between devices.

  Where the length is split, each device flattens its own tokens. T is then not in the
  order of the rows, which no computation between attentions depends on.
  """
  return _rearrange(x_BL, lambda x: x.reshape(-1, *x.shape[2:]), ("batch", "length"))


def split_rows(x_T: jax.Array, batch_size: int) -> jax.Array:
  """Reshapes (T, ...) to (B, L, ...): the reverse of `join_rows`."""
  now = current_layout()
  rows = batch_size // (now.ways("batch") if now and now.ways("length") > 1 else 1)
  return _rearrange(x_T, lambda x: x.reshape(rows, -1, *x.shape[1:]), ("tokens",))


def _rearrange(x: jax.Array, reshape, dims: tuple[str, ...]) -> jax.Array:
  now = current_layout()
  if now is None or now.ways("length") == 1:
    return reshape(x)
  rest = (None,) * (x.ndim - len(dims))
  other = ("tokens",) if dims != ("tokens",) else ("batch", "length")
  return shard_map(reshape, [(*dims, *rest)], (*other, *rest))(x)


def shard_map(function, in_dims: list, out_dims):
  """Returns `function` applied to each device's own shard, as `jax.shard_map` does.

  Args:
    in_dims: for each argument, the names of its dimensions in the rules.
    out_dims: the names for the result; a list of such tuples if it is a tuple.
  """
  now = current_layout()
  several = isinstance(out_dims, list)
  outs = [
    partition_spec(dims, now.rules) for dims in (out_dims if several else [out_dims])
  ]
  return jax.shard_map(
    function,
    in_specs=tuple(partition_spec(dims, now.rules) for dims in in_dims),
    out_specs=tuple(outs) if several else outs[0],
    check_vma=False,
  )


def sharding_of(
  name: str, shape: tuple[int, ...], dims: tuple, mesh: jax.sharding.Mesh, rules: dict
) -> NamedSharding:
  """Returns the sharding of one weight.

  Raises:
    ConfigError: the devices do not divide one of its dimensions evenly.
  """
  assert len(shape) == len(dims), f"{name}: {shape} is not described by {dims}"
  partition = partition_spec(dims, rules)
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


def check_split(weights: dict[str, jax.ShapeDtypeStruct], mesh) -> None:
  """Refuses rules that leave over 2% of the parameters whole along an axis.

  Norms and biases may be whole; large weights that an axis should split may not.

  Args:
    weights: {path: array with a sharding} of the model.
  Raises:
    ConfigError: names the axis and the largest weight that is whole along it.
  """
  total = sum(math.prod(x.shape) for x in weights.values())
  for axis in ("stage", "fsdp", "expert", "context", "tensor"):
    if mesh.shape[axis] == 1:
      continue
    whole = {
      name: math.prod(x.shape)
      for name, x in weights.items()
      if all(axis != used and axis not in (used or ()) for used in x.sharding.spec)
      # The first, dense layers run ahead of the pipeline, on every stage.
      and not (axis == "stage" and name.startswith("first_blocks"))
    }
    if sum(whole.values()) > 0.02 * total:
      largest = max(whole, key=whole.get)
      raise ConfigError(
        "config.mesh.rules",
        f"{sum(whole.values()) / total:.1%} of the parameters are whole on each of "
        f"{mesh.shape[axis]} devices along {axis}, most of them {largest}",
        f"rules that split all but 2% over {axis}, or config.mesh.{axis}=1",
        f"{axis} in the rule for a dimension of {largest}",
      )


def bytes_per_device(tree) -> int:
  """Returns the bytes on each device of a tree of arrays, real or abstract."""
  leaves = jax.tree.leaves(tree)
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
  )
