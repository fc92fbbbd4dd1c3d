"""Checks that all processes of a job run the same thing, before they start.

Processes that differ would hang in their first collective, or train on different data.
"""

import hashlib
import json
import pathlib
import socket
import time

import jax

from flaxlm.errors import ConfigError
from flaxlm.parallel.processes import PeerError, current_job, name_processes


def agree(when: str, facts: dict[str, object], seconds: float = 300) -> None:
  """Checks that all processes hold the same facts; does nothing in a process alone.

  Every process calls this at the same place. It sends a few messages to process 0 and
  uses no collective, so it works even where the processes have different devices.

  Args:
    when: the name of this check, used once in a job.
    facts: name -> value; compared as JSON.
    seconds: how long to wait for all processes.
  Raises:
    ConfigError: raised in every process; names what differs, and where.
    PeerError: a process did not reach this call in time.
  """
  if not jax.distributed.is_initialized():
    return
  job, key = current_job(), f"flaxlm/agree/{when}"
  store = job.client
  mine = {"host": socket.gethostname(), "facts": facts}
  store.key_value_set(f"{key}/facts/{job.process_id}", json.dumps(mine))
  if job.process_id == 0:
    gathered = _gather(f"{key}/facts/", job.num_processes, when, seconds)
    store.key_value_set(f"{key}/verdict", json.dumps(_difference(gathered)))
    store.key_value_delete(f"{key}/facts/")
  try:
    # Process 0 may begin to wait later than this one, and `seconds` count from then.
    wait = int(2000 * seconds)
    verdict = json.loads(store.blocking_key_value_get(f"{key}/verdict", wait))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    raise PeerError(f"process 0 did not reach {when} within {seconds:g} s") from None
  if verdict:
    raise ConfigError(*verdict)


def _gather(prefix: str, count: int, when: str, seconds: float) -> list[dict]:
  """Returns what each process wrote under `prefix`, in the order of their numbers."""
  deadline = time.monotonic() + seconds
  while True:
    entries = current_job().client.key_value_dir_get(prefix)
    found = {int(key.rpartition("/")[2]): value for key, value in entries}
    if len(found) == count:
      return [json.loads(found[i]) for i in range(count)]
    if time.monotonic() > deadline:
      absent = name_processes(set(range(count)) - set(found))
      raise PeerError(f"{absent} of {count} did not reach {when} within {seconds:g} s")
    time.sleep(0.02)


def _difference(gathered: list[dict]) -> list[str]:
  """Returns the arguments of a ConfigError for the first difference; [] if none."""
  names = {name: None for process in gathered for name in process["facts"]}  # in order
  differing = {}
  for name in names:
    values = [json.dumps(process["facts"].get(name)) for process in gathered]
    usual = max(values, key=values.count)  # in a tie, that of process 0
    odd = [i for i, value in enumerate(values) if value != usual]
    if odd:
      differing[name] = values[odd[0]], usual, odd
  if not differing:
    return []
  (name, (value, usual, odd)), *others = differing.items()
  where = f"{name_processes(odd)} (on {gathered[odd[0]]['host']})"
  same = len(gathered) - len(odd)
  also = f"; also different: {', '.join([n for n, _ in others[:3]])}"
  also += f" and {len(others) - 3} more" * (len(others) > 3)
  return [
    name,
    f"{value} in {where}",
    f"the same in all processes: {usual}, as in {same} of {len(gathered)}",
    "the same command, files and versions on every host" + also * bool(others),
  ]


def local_facts() -> dict[str, object]:
  """Returns what must be the same in all processes, besides config and data."""
  root = pathlib.Path(__file__).parents[1]
  code = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    code.update(path.relative_to(root).as_posix().encode() + b"\0")
    code.update(path.read_bytes() + b"\0")
  return {
    "the code of flaxlm": code.hexdigest()[:12],
    "the version of jax": jax.__version__,
    "the kind of device": jax.local_devices()[0].device_kind,
    "the number of devices of a process": jax.local_device_count(),
  }
