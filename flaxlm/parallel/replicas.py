"""Compares what devices and processes should hold alike, while they train.

A process that skipped a step, reads other rows, or has a chip that computes wrongly
raises no error: the others go on with it. So every few steps each device sums up the
bits of what it holds, and those that should hold the same are compared. Nothing waits
for it: the sums are read a step later, and those of the other processes when they have
all arrived.
"""

import functools
import json
import math
import socket
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from flaxlm.parallel.processes import PeerError, current_job, name_processes


class Replicas:
  """Compares pytrees of sharded arrays every few steps; all processes do so together.

  Arrays are compared between devices that hold the same part of them. Where every
  device holds a part of its own, there is nothing to compare.
  """

  def __init__(self, every: int, mesh: jax.sharding.Mesh):
    """Compares after every `every` steps; 0 = never."""
    # The devices of one CPU process are simulated: they share all of its faults.
    alone = mesh.devices.flat[0].platform == "cpu" and not _in_a_job()
    self.every = 0 if alone or mesh.size == 1 else every
    self._mesh, self._coordinates = mesh, _coordinates(mesh)
    self._sum: Callable | None = None
    self._groups: list[tuple[str, tuple[str, ...]]] = []
    self._pending: tuple | None = None  # (step, sums that the devices compute)
    self._sent: tuple | None = None  # (number of the comparison, step)
    self._count, self._equal_at = 0, 0

  def after(self, step: int, trees: dict[str, object]) -> None:
    """Takes what the devices hold after `step`, and compares what was taken before.

    Args:
      trees: what it is, in words -> a pytree. The same at each call.
    Raises:
      PeerError: some hold something else than the others.
    """
    if self._pending and step != self._pending[0]:
      self._read()
    if self._sent:
      self._compare()
    if self.every and step % self.every == 0:
      if self._sum is None:
        self._sum, self._groups = _make_sum(self._mesh, trees)
      self._pending = step, self._sum(jax.tree.leaves(trees))

  def _read(self) -> None:
    """Reads the sums of this process's devices, and sends them to the others."""
    (step, sums), self._pending = self._pending, None
    facts, holders = {"the step": step}, {}
    for shard in sums.addressable_shards:
      for (name, axes), value in zip(self._groups, np.ravel(shard.data), strict=True):
        place = [self._coordinates[shard.device][axis] for axis in axes]
        key = f"{name}, part {place} of {list(axes)}" if axes else name
        known = facts.setdefault(key, int(value))
        if known != int(value):
          what = f"{key} of {holders[key]} and {shard.device}"
          raise _unequal(what, step, self._equal_at)
        holders.setdefault(key, shard.device)
    if not _in_a_job():
      self._equal_at = step
      return
    self._count += 1
    mine = {"host": socket.gethostname(), "facts": facts}
    job = current_job()
    job.client.key_value_set(self._key(self._count, job.process_id), json.dumps(mine))
    if self._count > 2:  # all have read it: they have sent the next one
      job.client.key_value_delete(self._key(self._count - 2, job.process_id))
    self._sent = self._count, step

  def _compare(self) -> None:
    """Compares what all processes have sent; does nothing if some have not yet."""
    job, (count, step) = current_job(), self._sent
    entries = job.client.key_value_dir_get(self._key(count, ""))
    if len(entries) < job.num_processes:
      return
    self._sent = None
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in entries}
    if difference := find_difference(found):
      raise _unequal(difference, step, self._equal_at)
    self._equal_at = step

  @staticmethod
  def _key(count: int, process: int | str) -> str:
    return f"flaxlm/replicas/{count}/{process}"


def find_difference(found: dict[int, dict]) -> str:
  """Returns the first fact that processes do not share, and whose it is; "" if none.

  Args:
    found: process -> its host and facts. A fact may be that of some processes alone.
  """
  for name in {name: None for one in found.values() for name in one["facts"]}:
    values = {i: x["facts"][name] for i, x in found.items() if name in x["facts"]}
    usual = max(values.values(), key=[*values.values()].count)
    odd = sorted(i for i, value in values.items() if value != usual)
    if odd and 2 * len(odd) >= len(values):  # no majority
      odd = sorted(values)
    if odd:
      hosts = ", ".join(sorted({found[i]["host"] for i in odd})[:4])
      return f"{name} of {name_processes(odd)} (on {hosts})"
  return ""


def _unequal(what: str, step: int, equal_at: int) -> PeerError:
  return PeerError(
    f"after step {step}, {what} is not the same as elsewhere",
    f"they were equal after step {equal_at}" if equal_at else "the first comparison",
    "the same bits wherever the same part is held",
    "the same command, from a checkpoint before that step; if it happens again, other "
    "hardware",
  )


def _in_a_job() -> bool:
  return jax.distributed.is_initialized() and current_job().num_processes > 1


def _coordinates(mesh: jax.sharding.Mesh) -> dict:
  """Returns device -> {axis: its place along it}."""
  return {
    mesh.devices[place]: dict(zip(mesh.axis_names, place, strict=True))
    for place in np.ndindex(mesh.devices.shape)
  }


def _make_sum(mesh: jax.sharding.Mesh, trees: dict) -> tuple[Callable, list]:
  """Returns (a program from leaves to sums DG, the group of each column G).

  A row is what one device holds. A group is (name of the tree, axes over which its
  arrays are split), so that all arrays of a group have the same replicas.
  """
  names = [name for name, tree in trees.items() for _ in jax.tree.leaves(tree)]
  specs = [x.sharding.spec for x in jax.tree.leaves(trees)]
  keys = [(n, _split_axes(spec)) for n, spec in zip(names, specs, strict=True)]
  groups = list(dict.fromkeys(keys))

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=P(mesh.axis_names),
    check_vma=False,
  )  # fmt: skip
  def sum_up(leaves):
    totals = dict.fromkeys(groups, jnp.uint32(0))
    for i, (key, leaf) in enumerate(zip(keys, leaves, strict=True)):
      totals[key] += _sum_bits(leaf) * jnp.uint32(2 * i + 1)
    return jnp.stack([totals[group] for group in groups])[None]

  return jax.jit(sum_up), groups


def _split_axes(spec: P) -> tuple[str, ...]:
  """Returns the mesh axes in a spec."""
  parts = [(part,) if isinstance(part, str) else part or () for part in spec]
  return tuple(sorted(axis for part in parts for axis in part))


def _sum_bits(x: jax.Array) -> jax.Array:
  """Returns a uint32 that changes with any one word of `x`.

  Each word has an odd factor, so a change of one is never lost modulo 2^32.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, kind).ravel().astype(jnp.uint32)
  factors = 2 * jax.lax.iota(jnp.uint32, math.prod(x.shape)) + 1
  return jnp.sum(words * factors, dtype=jnp.uint32)
