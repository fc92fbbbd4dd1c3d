"""One process among several: joining, agreeing, ending together; parts of a batch."""

import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Self

import jax
import numpy as np

from flaxlm.errors import ConfigError, Preempted, UserError


def keep_freed_memory() -> str:
  """Tells glibc to reuse what XLA:CPU frees; returns a line that says so, or why not.

  XLA:CPU frees its large temporaries after every step, glibc gives them back to the
  kernel, and the kernel zeroes each page again: up to 1.7 times the time of a step.
  Steps run in the thread that asks for them, one after the other: glibc keeps large
  blocks for the main thread alone, and two steps at once would take twice the memory.
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
  done = mallopt(m_mmap_max, 0) & mallopt(m_trim_threshold, -1)  # never
  done &= mallopt(m_top_pad, 64 << 20)
  if not done:
    return "allocator: mallopt refused"
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return "allocator: glibc keeps freed memory"


class PeerError(UserError):
  """Another process of the job is missing or has failed; this one cannot go on alone.

  The exit code asks for another try, or is that of the process that failed.
  """

  exit_code = 75


def join(
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


class OneFate:
  """Ends the whole job when one of its processes fails; alone, does nothing.

  The first process to fail leaves a note in JAX's key-value store and prints its error;
  the others print one line that names it, and end with its exit code. A process that
  was killed leaves no note: the others see their connections break (CPU), or JAX misses
  its heartbeat and aborts them within ten seconds (TPU, GPU).

  A process ends here by `os._exit`: what it would do on its way out (closing
  checkpoints, JAX's own shutdown) waits for the others, which may be gone.
  """

  # JAX aborts the survivors five seconds after a death at the earliest: all is said by
  # then. 1.5 s for the others to come to the same end, 2 s for them to read of it.
  POLL_SECONDS, GRACE_SECONDS, LINGER_SECONDS = 1.0, 0.5, 2.0
  NOTE = "flaxlm/failed"  # its value: the exit code, then what happened
  # Found in the errors of collectives and of JAX's service when a peer is gone.
  BROKEN = (
    "gloo", "nccl", "coordination", "barrier", "connection closed", "unavailable:"
  )  # fmt: skip

  def __init__(self):
    self._done = threading.Event()
    self._ending = threading.Lock()

  def __enter__(self) -> Self:
    if jax.distributed.is_initialized():
      threading.Thread(target=self._watch, name="one-fate", daemon=True).start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    self.end_if_failed(kind, error, trace)
    self._done.set()

  def end_if_failed(self, kind, error, trace) -> None:
    """Ends the process after an error. A stop by signal is agreed on, and none.

    For `ExitStack.push`, above contexts whose end waits for other processes.
    """
    if not jax.distributed.is_initialized() or not isinstance(error, Exception):
      return
    if isinstance(error, Preempted):
      return
    self._done.set()
    of_user = isinstance(error, UserError)
    if not of_user and any(words in str(error).lower() for words in self.BROKEN):
      self._end_with(self._find_lost(error))
    code = error.exit_code if of_user else UserError.exit_code
    name = "" if of_user else f"{kind.__name__}: "
    line = (str(error).splitlines() or [""])[0]
    is_first = self._leave(
      f"{code} process {_job().process_id} failed: {name}{line[:200]}"
    )
    if not is_first and not of_user:
      self._end_with(self._read())
    if of_user:
      lines = str(error).splitlines()[:5]
      self._end(code, "\n".join([f"flaxlm: {lines[0]}", *lines[1:]]))
    self._end(code, "".join(traceback.format_exception(error)).rstrip())

  def _watch(self) -> None:
    while not self._done.wait(self.POLL_SECONDS):
      note = self._read()
      # The moment of grace is for an error that all processes raise alike.
      if note and not self._done.wait(self.GRACE_SECONDS):
        self._end_with(note)

  def _read(self) -> str:
    """Returns the note of the process that failed first; "" if there is none."""
    try:
      return _job().client.key_value_try_get(self.NOTE)
    except jax.errors.JaxRuntimeError:  # not found; or process 0 is gone
      return ""

  def _leave(self, note: str) -> bool:
    """Tells the others; False if another process did so before."""
    try:
      _job().client.key_value_set(self.NOTE, note)
    except jax.errors.JaxRuntimeError:
      return not self._read()
    return True

  def _find_lost(self, error: Exception) -> str:
    """Returns the note for a broken connection: of the process that broke it.

    One that failed has left its note; of the others, all that live come here too.
    """
    count, here = _job().num_processes, "flaxlm/here/"
    try:
      _job().client.key_value_set(f"{here}{_job().process_id}", "")
      for _ in range(15):
        if note := self._read():
          return note
        time.sleep(0.1)
      entries = _job().client.key_value_dir_get(here)
      lost = set(range(count)) - {int(key.rpartition("/")[2]) for key, _ in entries}
    except jax.errors.JaxRuntimeError:
      lost = {0}
    note = f"{PeerError.exit_code} connection lost: {str(error).splitlines()[0][:200]}"
    if lost:
      note = f"{PeerError.exit_code} {_processes(lost)} of {count} ended without a word"
    return note if self._leave(note) else self._read() or note

  def _end_with(self, note: str) -> None:
    code, _, what = note.partition(" ")
    self._end(int(code), f"flaxlm: {what}; process {_job().process_id} ends with it")

  def _end(self, code: int, text: str) -> None:
    self._ending.acquire()  # for ever: a second thread waits here for the end
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    if _job().process_id == 0:  # without its store JAX aborts those that still read
      time.sleep(self.LINGER_SECONDS)
    os._exit(code)


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
      return local[start - first_row : stop - first_row, *index[1:]]

    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(local) for name, local in rows.items()}
