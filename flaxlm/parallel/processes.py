"""One process among several: joining, agreeing, ending together; parts of a batch."""

import contextlib
import hashlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable

import jax

from flaxlm.errors import ConfigError, Preempted, UserError


class PeerError(UserError):
  """Another process of the job is missing or has failed; this one cannot go on alone.

  The exit code asks for another try, or is that of the process that failed.
  """

  exit_code = 75


def join_processes(
  multihost: bool,
  seconds: float = 300,
  stop_requested: Callable[[], bool] = lambda: False,
) -> None:
  """Connects the processes of a job; alone, does nothing.

  The environment names them (launch/local.sh): JAX_COORDINATOR_ADDRESS=host:port,
  JAX_NUM_PROCESSES, JAX_PROCESS_ID. With `multihost`, JAX asks Slurm, the TPU or GKE.

  Args:
    seconds: how long to wait for all processes.
    stop_requested: asked twice a second while waiting; True gives up.
  Raises:
    ConfigError: the environment does not describe a job.
    PeerError: some processes did not arrive in time; it names them.
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
    address, count, index = given
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
      raise ConfigError(names[2], f"{index} of {count}", f"0 to {names[1]} - 1")
    if not address.rpartition(":")[2].isdigit():
      raise ConfigError(names[0], address, "host:port")
    arguments = {
      "coordinator_address": address,
      "num_processes": int(count),
      "process_id": int(index),
    }
    _answer_roll_call(address, int(count), int(index), seconds, stop_requested)
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # Ten seconds without a heartbeat are a death: JAX then ends the others. The beats
  # come from a C++ thread, so that a busy interpreter does not look dead.
  jax.distributed.initialize(
    **arguments, initialization_timeout=int(seconds), heartbeat_timeout_seconds=10
  )


def _answer_roll_call(address, count, index, seconds, stop_requested) -> None:
  """Waits until all processes are there, at the port that JAX will use afterwards.

  JAX waits too, but gives up by abort() and without names.
  """
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + seconds
  if index == 0:
    absent = _call_roll(int(port), count, deadline, stop_requested)
  else:
    # The grace is for process 0 to come later than this one and still name the others.
    place = host.strip("[]"), int(port)
    absent = _present(place, index, deadline + 10, stop_requested)
  if stop_requested():
    raise Preempted("stopped before the first step, while the processes were gathering")
  if absent:
    raise PeerError(
      f"{_processes(absent)} of {count} did not arrive within {seconds:g} s\n"
      f"  given:  {count - len(absent)} at {address}\n"
      f"  needed: {count} (JAX_NUM_PROCESSES) that can reach that address\n"
      "  try:    the logs of the missing; a longer --config.mesh.start_seconds"
    )


def _call_roll(port: int, count: int, deadline: float, stop_requested) -> list[int]:
  """Process 0: returns the numbers of those that did not come, and tells the others."""
  absent, callers = set(range(1, count)), []
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    server = socket.create_server(
      ("", port), family=family, backlog=count, dualstack_ipv6=both
    )
  except OSError as error:
    raise ConfigError(
      "JAX_COORDINATOR_ADDRESS", f"port {port}: {error.strerror}", "a free port"
    ) from None
  with server, contextlib.ExitStack() as stack:
    server.settimeout(0.5)
    while absent and time.monotonic() < deadline and not stop_requested():
      with contextlib.suppress(TimeoutError):
        caller = stack.enter_context(server.accept()[0])
        caller.settimeout(2)
        with contextlib.suppress(OSError, ValueError):  # a stranger says no number
          absent.discard(int(caller.recv(16)))
          callers.append(caller)
    verdict = (" ".join(map(str, sorted(absent))) + "\n").encode()
    for caller in callers:
      with contextlib.suppress(OSError):  # it left again: JAX will notice
        caller.sendall(verdict)
  return sorted(absent)


def _present(place, index: int, deadline: float, stop_requested) -> list[int]:
  """The others: tells process 0 that this one is there; returns whom it misses."""
  while time.monotonic() < deadline and not stop_requested():
    with contextlib.suppress(OSError), socket.create_connection(place, 2) as line:
      line.sendall(str(index).encode())
      line.settimeout(0.5)
      while time.monotonic() < deadline and not stop_requested():
        try:
          verdict = line.recv(1 << 16)
        except TimeoutError:
          continue
        if verdict.endswith(b"\n"):
          return [int(word) for word in verdict.split()]
        break  # process 0 went away; it may come back
    time.sleep(0.2)
  return [0]


def _processes(numbers) -> str:
  numbers = [str(n) for n in sorted(numbers)]
  if len(numbers) == 1:
    return f"process {numbers[0]}"
  if len(numbers) > 8:
    numbers = [*numbers[:8], f"{len(numbers) - 8} more"]
  return f"processes {', '.join(numbers[:-1])} and {numbers[-1]}"


def _job():
  """JAX's view of the job: process_id, num_processes, and client, a key-value store.

  The store lives in process 0. There is no public name for it (jax 0.10 to 0.12); Orbax
  uses this one as well. jax.process_index() would first wait for everyone's devices.
  """
  from jax._src import distributed

  return distributed.global_state


def agree(when: str, facts: dict[str, object], seconds: float = 300) -> None:
  """Checks that all processes hold the same facts; alone, does nothing.

  Every process calls this at the same place. It costs a few messages to process 0, and
  no collective: it works where the processes do not even have the same devices.

  Args:
    when: the name of this check, used once in a job.
    facts: name -> value; compared as JSON.
    seconds: how long to wait for all processes.
  Raises:
    ConfigError: on every process alike; names what differs, and where.
    PeerError: a process did not come here in time.
  """
  if not jax.distributed.is_initialized():
    return
  job, key = _job(), f"flaxlm/agree/{when}"
  store = job.client
  mine = {"host": socket.gethostname(), "facts": facts}
  store.key_value_set(f"{key}/facts/{job.process_id}", json.dumps(mine))
  if job.process_id == 0:
    gathered = _gather(f"{key}/facts/", job.num_processes, when, seconds)
    store.key_value_set(f"{key}/verdict", json.dumps(_difference(gathered)))
    store.key_value_delete(f"{key}/facts/")
  try:
    # Process 0 may have begun to wait later, and then takes `seconds` from there.
    wait = int(2000 * seconds)
    verdict = json.loads(store.blocking_key_value_get(f"{key}/verdict", wait))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    raise PeerError(f"process 0 did not reach {when} within {seconds:g} s") from None
  if verdict:
    raise ConfigError(*verdict)


def _gather(prefix: str, count: int, when: str, seconds: float) -> list[dict]:
  """Returns what each process wrote under `prefix`, by number."""
  deadline = time.monotonic() + seconds
  while True:
    entries = _job().client.key_value_dir_get(prefix)
    found = {int(key.rpartition("/")[2]): value for key, value in entries}
    if len(found) == count:
      return [json.loads(found[i]) for i in range(count)]
    if time.monotonic() > deadline:
      absent = _processes(set(range(count)) - set(found))
      raise PeerError(f"{absent} of {count} did not reach {when} within {seconds:g} s")
    time.sleep(0.02)


def _difference(gathered: list[dict]) -> list[str]:
  """The arguments of the ConfigError that tells what differs first; [] if nothing."""
  names = {name: None for process in gathered for name in process["facts"]}  # in order
  differing = {}
  for name in names:
    values = [json.dumps(process["facts"].get(name)) for process in gathered]
    usual = max(values, key=values.count)  # of equally many, that of process 0
    odd = [i for i, value in enumerate(values) if value != usual]
    if odd:
      differing[name] = values[odd[0]], usual, odd
  if not differing:
    return []
  (name, (value, usual, odd)), *others = differing.items()
  where = f"{_processes(odd)} (on {gathered[odd[0]]['host']})"
  same = len(gathered) - len(odd)
  also = f"; also different: {', '.join([n for n, _ in others[:3]])}"
  also += f" and {len(others) - 3} more" * (len(others) > 3)
  return [
    name,
    f"{value} in {where}",
    f"the same in all processes: {usual}, as in {same} of {len(gathered)}",
    "the same command, files and versions on every host" + also * bool(others),
  ]


def facts() -> dict[str, object]:
  """What must be the same on every host of a job, besides its config and data."""
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
