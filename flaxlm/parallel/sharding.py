"""From logical dimensions to devices: one rule table for weights and activations.

Each weight names its dimensions where it is defined ("embed", "mlp"); the table in the
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
  stage_repeats: int  # how often a microbatch goes round it

  def axes(self, *dims: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that split these dimensions."""
    names = [axis for dim in dims for axis in self.rules[dim]]
    return tuple(axis for axis in names if self.mesh.shape[axis] > 1)

  def ways(self, *dims: str) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes(*dims))


_layout = contextvars.ContextVar("layout", default=None)
# All tokens in one dimension; `stream` is that between the blocks.
DERIVED = {
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
    microbatches: of the pipeline, if mesh.stage > 1; 0 = as many as stages.
    stage_repeats: groups of layers that each stage has.
  """
  microbatches = microbatches or mesh.shape["stage"]
  token = _layout.set(Layout(mesh, dict(rules), microbatches, stage_repeats))
  try:
    # What computes while it is traced (keys, tables of kernels) needs devices that are
    # here, and a topology's are not.
    if mesh.devices.flat[0] in jax.devices():
      here = jax.set_mesh(mesh)
    else:
      here = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with here:
      yield mesh
  finally:
    _layout.reset(token)


def layout() -> Layout | None:
  """The current mesh and rules, or None: one device, nothing to say."""
  return _layout.get()


def spec(dims: tuple[str | None, ...], rules: dict[str, tuple[str, ...]]) -> P:
  """The mesh axes of an array whose dimensions are named `dims`."""
  # A mesh axis splits one dimension of an array: the first that asks for it.
  used, chosen = set(), []
  for dim in dims:
    names = []
    for name in DERIVED.get(dim, (dim,)) if dim is not None else ():
      if name not in rules:
        raise ConfigError(
          f"config.mesh.rules.{name}", "no rule", "mesh axes for it, or ()"
        )
      names += [axis for axis in rules[name] if axis not in used]
      used |= set(names)
    chosen.append(tuple(names) if len(names) > 1 else names[0] if names else None)
  return P(*chosen)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """Asks XLA to lay `x` out by the current rules; a no-op without a mesh."""
  now = layout()
  if now is None or now.mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(dims, now.rules))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x: jax.Array, source: tuple, target: tuple) -> jax.Array:
  """`x` moved from one layout to another, and its gradient moved back.

  A plain constraint would ask the gradient for the layout of the target: a sum over
  devices would be gathered whole first, and split after.
  """
  return constrain(x, *target)


reshard.defvjp(
  lambda x, source, target: (constrain(x, *target), None),
  lambda source, target, _, gradient: (constrain(gradient, *source),),
)


def gather(weight: jax.Array, dims: tuple) -> jax.Array:
  """A weight as a layer uses it: whole along "embed", which fsdp splits."""
  return reshard(weight, dims, tuple(d if d != "embed" else None for d in dims))


def join_rows(x_BL: jax.Array) -> jax.Array:
  """(B, L, ...) to (T, ...), without moving anything between devices.

  Where the length is split, each device puts its own tokens after each other: the order
  of T is then not that of the rows, which nothing between attentions looks at.
  """
  return _rearrange(x_BL, lambda x: x.reshape(-1, *x.shape[2:]), ("batch", "length"))


def part_rows(x_T: jax.Array, batch_size: int) -> jax.Array:
  """The way back: (T, ...) to (B, L, ...)."""
  now = layout()
  rows = batch_size // (now.ways("batch") if now and now.ways("length") > 1 else 1)
  return _rearrange(x_T, lambda x: x.reshape(rows, -1, *x.shape[1:]), ("tokens",))


def _rearrange(x: jax.Array, reshape, dims: tuple[str, ...]) -> jax.Array:
  now = layout()
  if now is None or now.ways("length") == 1:
    return reshape(x)
  rest = (None,) * (x.ndim - len(dims))
  other = ("tokens",) if dims != ("tokens",) else ("batch", "length")
  return shard_map(reshape, [(*dims, *rest)], (*other, *rest))(x)


def shard_map(function, in_dims: list, out_dims):
  """`function` of each device's own part; dimensions are named as in the rules.

  Args:
    in_dims: for each argument, the names of its dimensions.
    out_dims: the same of the result; a list of them if it is a tuple.
  """
  now = layout()
  several = isinstance(out_dims, list)
  outs = [spec(dims, now.rules) for dims in (out_dims if several else [out_dims])]
  return jax.shard_map(
    function,
    in_specs=tuple(spec(dims, now.rules) for dims in in_dims),
    out_specs=tuple(outs) if several else outs[0],
    check_vma=False,
  )


def sharding_of(
  name: str, shape: tuple[int, ...], dims: tuple, mesh: jax.sharding.Mesh, rules: dict
) -> NamedSharding:
  """The sharding of one weight; a dimension that does not divide is an error."""
  assert len(shape) == len(dims), f"{name}: {shape} is not described by {dims}"
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


def check_split(weights: dict[str, jax.ShapeDtypeStruct], mesh) -> None:
  """Refuses a mesh on which weights are whole that an axis should split.

  Over 2% of the parameters, that is: norms and biases may be whole.

  Args:
    weights: arrays of the model, with shardings, by path.

  Raises:
    ConfigError: names the axis and the largest of these weights.
  """
  total = sum(math.prod(x.shape) for x in weights.values())
  for axis in ("stage", "fsdp", "expert", "context", "tensor"):
    if mesh.shape[axis] == 1:
      continue
    whole = {
      name: math.prod(x.shape)
      for name, x in weights.items()
      if all(axis != used and axis not in (used or ()) for used in x.sharding.spec)
      # Layers of another build run ahead of the pipeline, on every stage.
      and not (axis == "stage" and name.startswith("first_blocks"))
    }
    if sum(whole.values()) > 0.02 * total:
      largest = max(whole, key=whole.get)
      raise ConfigError(
        "config.mesh.rules",
        f"{sum(whole.values()) / total:.1%} of the parameters are whole on each of "
        f"{mesh.shape[axis]} devices along {axis}, most of them {largest}",
        f"rules that split all but 2% over {axis}, or config.mesh.{axis}=1",
        f"{axis} in the rule of a dimension of {largest}",
      )


def bytes_per_device(tree) -> int:
  """What each device holds of arrays, or of abstract ones that have a sharding."""
  leaves = jax.tree.leaves(tree)
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
  )
