"""One process among several: joining them, and handing each its part of a batch."""

import ctypes
import os
import sys

import jax
import numpy as np

from flaxlm.errors import ConfigError


def keep_freed_memory() -> str:
  """Tells glibc to reuse what XLA:CPU frees; returns a line that says so, or why not.

  XLA:CPU frees its large temporaries after every step, glibc gives them back to the
  kernel, and the kernel zeroes each page again: up to 1.7 times the time of a step.
  Call this before anything large is allocated. An explicit MALLOC_ environment variable
  is left alone.
  """
  if os.environ.get("MALLOC_MMAP_MAX_") or not sys.platform.startswith("linux"):
    return "allocator: as the environment sets it"
  m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from glibc's malloc.h
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return "allocator: not glibc, left as it is"
  done = mallopt(m_mmap_max, 0) & mallopt(m_trim_threshold, 2**31 - 1)
  done &= mallopt(m_top_pad, 64 << 20)
  return "allocator: glibc keeps freed memory" if done else "allocator: mallopt refused"


def join(multihost: bool) -> None:
  """Connects the processes of a job; alone, does nothing.

  The environment names them (launch/local.sh): JAX_COORDINATOR_ADDRESS=host:port,
  JAX_NUM_PROCESSES, JAX_PROCESS_ID. With `multihost`, JAX asks Slurm, the TPU or GKE.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = [os.environ.get(name) for name in names]
  if not any(given) and not multihost:
    return
  if any(given) and not all(given):
    missing = " ".join(n for n, value in zip(names, given, strict=True) if not value)
    raise ConfigError("the environment", f"no {missing}", "all of " + " ".join(names))
  arguments = {}
  if all(given):
    address, num_processes, process_id = given
    arguments = {
      "coordinator_address": address,
      "num_processes": int(num_processes),
      "process_id": int(process_id),
    }
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # A dead peer is noticed after a minute instead of JAX's hundred seconds.
  jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=60)


def local_rows(
  sharding: jax.sharding.NamedSharding, batch_size: int
) -> tuple[int, int]:
  """The range [first, last) of a batch's rows that this host's devices hold."""
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  slices = [index[0].indices(batch_size) for index in indices]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def to_global(
  rows: dict[str, np.ndarray], first_row: int, batch_size: int, sharding
) -> dict[str, jax.Array]:
  """Assembles arrays of the whole batch from each host's rows, from `first_row` on."""

  def place(local: np.ndarray) -> jax.Array:
    shape = (batch_size, *local.shape[1:])

    def part(index):
      start, stop, _ = index[0].indices(batch_size)
      return local[start - first_row : stop - first_row]

    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(local) for name, local in rows.items()}
