"""What joining, agreement and failure share: PeerError, names, JAX's job."""

from collections.abc import Iterable

from flaxlm.errors import UserError


class PeerError(UserError):
  """Another process of the job is missing or has failed; this one cannot go on alone.

  The exit code says that the same command may work when run again.
  """

  exit_code = 75


def name_processes(numbers: Iterable[int]) -> str:
  """Returns `process 3`, or `processes 1, 2 and 5`; at most eight numbers."""
  numbers = [str(n) for n in sorted(numbers)]
  if len(numbers) == 1:
    return f"process {numbers[0]}"
  if len(numbers) > 8:
    numbers = [*numbers[:8], f"{len(numbers) - 8} more"]
  return f"processes {', '.join(numbers[:-1])} and {numbers[-1]}"


def current_job():
  """Returns JAX's view of the job: process_id, num_processes, and a key-value client.

  Process 0 holds the key-value store. It has no public name
  (jax 0.10 to 0.12); Orbax uses this one too. jax.process_index() would first wait for
  the devices of all processes.
  """
  from jax._src import distributed

  return distributed.global_state
