"""Ends all processes of a job together when one of them fails.

JAX alone would leave the others waiting in a collective, for minutes or for ever.
"""

import os
import sys
import threading
import time
import traceback
from typing import Self

import jax

from flaxlm.errors import Preempted, UserError, terminal_text
from flaxlm.parallel.processes import PeerError, current_job, name_processes


class OneFate:
  """Ends the whole job when one process fails; does nothing in a process alone.

  The first process to fail leaves a note in JAX's key-value store and prints its error.
  The others print one line that names it, and end with its exit code. A process that
  was killed leaves no note: the others see their connections break (CPU), or JAX misses
  its heartbeat and aborts them within ten seconds (TPU, GPU).

  Processes end by `os._exit`, because a normal exit (closing checkpoints, JAX's own
  shutdown) would wait for the others, which may be gone.
  """

  # JAX aborts the survivors five seconds after a death at the earliest. Before that,
  # the others have 1.5 s to fail by themselves, and 2 s to read the note.
  POLL_SECONDS, GRACE_SECONDS, LINGER_SECONDS = 1.0, 0.5, 2.0
  NOTE = "flaxlm/failed"  # its value: the exit code, then what happened
  # Parts of the errors that collectives and JAX's service raise when a peer is gone.
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
    """Ends the process if `error` is a failure.

    Preempted is none: all processes agree on it, and each leaves in its own time. Give
    this to `ExitStack.push` after contexts whose exit waits for other processes.
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
      f"{code} process {current_job().process_id} failed: {name}{line[:200]}"
    )
    if not is_first and not of_user:
      self._end_with(self._read())
    if of_user:
      self._end(code, terminal_text(error))
    self._end(code, "".join(traceback.format_exception(error)).rstrip())

  def _watch(self) -> None:
    while not self._done.wait(self.POLL_SECONDS):
      note = self._read()
      # All processes may raise the same error: give this one time to raise its own.
      if note and not self._done.wait(self.GRACE_SECONDS):
        self._end_with(note)

  def _read(self) -> str:
    """Returns the note of the process that failed first, or ""."""
    try:
      return current_job().client.key_value_try_get(self.NOTE)
    except jax.errors.JaxRuntimeError:  # not found, or process 0 is gone
      return ""

  def _leave(self, note: str) -> bool:
    """Leaves a note for the others; returns False if another process did so before."""
    try:
      current_job().client.key_value_set(self.NOTE, note)
    except jax.errors.JaxRuntimeError:
      return not self._read()
    return True

  def _find_lost(self, error: Exception) -> str:
    """Returns a note that names the process that broke a connection.

    If it failed, it has left its own note. If it was killed, every survivor comes here
    and signs in: those that do not are lost.
    """
    job, here = current_job(), "flaxlm/here/"
    try:
      job.client.key_value_set(f"{here}{job.process_id}", "")
      for _ in range(15):
        if note := self._read():
          return note
        time.sleep(0.1)
      entries = job.client.key_value_dir_get(here)
      alive = {int(key.rpartition("/")[2]) for key, _ in entries}
      lost = set(range(job.num_processes)) - alive
    except jax.errors.JaxRuntimeError:
      lost = {0}
    what = f"connection lost: {str(error).splitlines()[0][:200]}"
    if lost:
      what = f"{name_processes(lost)} of {job.num_processes} ended without a word"
    note = f"{PeerError.exit_code} {what}"
    return note if self._leave(note) else self._read() or note

  def _end_with(self, note: str) -> None:
    code, _, what = note.partition(" ")
    number = current_job().process_id
    self._end(int(code), f"flaxlm: {what}; process {number} ends with it")

  def _end(self, code: int, text: str) -> None:
    self._ending.acquire()  # never released: a second thread waits here for the end
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    if current_job().process_id == 0:
      # JAX aborts those that still read the store when this process takes it away.
      time.sleep(self.LINGER_SECONDS)
    os._exit(code)
