"""Connects the processes of a job, and names those that do not come.

JAX waits for them too, but gives up by abort() and names nobody. So the processes first
answer a roll call at the port that JAX will use.
"""

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Callable

import jax

from flaxlm.errors import ConfigError, Preempted
from flaxlm.parallel.processes import PeerError, name_processes

# Variables of schedulers that tell of several hosts. A step of Slurm may use fewer than
# its job has.
_HOST_COUNTS = (
  "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "TPU_WORKER_HOSTNAMES",
)  # fmt: skip


def join_processes(
  multihost: bool,
  seconds: float = 300,
  stop_requested: Callable[[], bool] = lambda: False,
) -> None:
  """Connects the processes of a job; does nothing if this process is alone.

  The environment describes the job (launch/local.sh): JAX_NUM_PROCESSES,
  JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS=host:port. With `multihost`, JAX asks
  Slurm, the TPU or GKE.

  Args:
    seconds: how long to wait for all processes.
    stop_requested: called twice a second while waiting; True ends the wait.
  Raises:
    ConfigError: the environment does not describe a job.
    PeerError: some processes did not arrive in time; the message names them.
    Preempted: `stop_requested` ended the wait.
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
    _check_coordinator(address)
    arguments = {
      "coordinator_address": address,
      "num_processes": int(count),
      "process_id": int(index),
    }
    _answer_roll_call(address, int(count), int(index), seconds, stop_requested)
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # After ten seconds without a heartbeat, a process counts as dead and JAX ends the
  # others. A C++ thread sends the heartbeats, so a busy interpreter does not look dead.
  jax.distributed.initialize(
    **arguments, initialization_timeout=int(seconds), heartbeat_timeout_seconds=10
  )


def _check_coordinator(address: str) -> None:
  """Raises ConfigError if an address leads back to each of several hosts.

  Every process would then wait for one of its own host. A name may do so on some hosts
  alone: /etc/hosts often maps a host's own name to 127.0.1.1.
  """
  given = [name for name in _HOST_COUNTS if name in os.environ]
  hosts = _count_hosts(given[0]) if given else 1
  if hosts > 1 and _is_loopback(address.rpartition(":")[0]):
    raise ConfigError(
      "JAX_COORDINATOR_ADDRESS",
      f"{address}, which is each host itself, in a job of {hosts} hosts",
      "the address of the first host in the network that joins them",
      "its name or IP address, as `hostname -I` prints it there",
    )


def _is_loopback(host: str) -> bool:
  """Returns whether a name or address leads back to this host alone."""
  try:
    found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
  except OSError:  # the roll call waits for names that are not known yet
    return False
  return all(ipaddress.ip_address(ip.split("%")[0]).is_loopback for ip in found)


def _count_hosts(name: str) -> int:
  """Returns how many hosts a variable of a scheduler counts or lists; else 1."""
  value = os.environ.get(name, "")
  if value.isdigit():
    return int(value)
  return len(value.split(",")) if name == "TPU_WORKER_HOSTNAMES" else 1


def _answer_roll_call(address, count, index, seconds, stop_requested) -> None:
  """Waits until all processes have called; raises PeerError if some do not."""
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + seconds
  if index == 0:
    absent = _call_roll(int(port), count, deadline, stop_requested)
  else:
    # Process 0 may start later than this one, and must still have time to name others.
    place = host.strip("[]"), int(port)
    absent = _report_in(place, index, deadline + 10, stop_requested)
  if stop_requested():
    raise Preempted("stopped before the first step, while the processes were gathering")
  if absent:
    here = " (this host alone can reach it)" if _is_loopback(host) else ""
    raise PeerError(
      f"{name_processes(absent)} of {count} did not arrive within {seconds:g} s",
      f"{count - len(absent)} at {address}{here}",
      f"{count} (JAX_NUM_PROCESSES) that can reach that address",
      "the logs of those missing; a longer --config.mesh.start_seconds",
    )


def _call_roll(port: int, count: int, deadline: float, stop_requested) -> list[int]:
  """Process 0: returns the numbers of the absent processes, and tells the others."""
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
        with contextlib.suppress(OSError, ValueError):  # a stranger sends no number
          absent.discard(int(caller.recv(16)))
          callers.append(caller)
    verdict = (" ".join(map(str, sorted(absent))) + "\n").encode()
    for caller in callers:
      with contextlib.suppress(OSError):  # it has left again: JAX will notice
        caller.sendall(verdict)
  return sorted(absent)


def _report_in(place, index: int, deadline: float, stop_requested) -> list[int]:
  """The others: tells process 0 their number; returns the numbers of the absent."""
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
