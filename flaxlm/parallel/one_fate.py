"""Ends all processes of a job together when one of them fails."""

import os
import sys
import threading
import time
import traceback
from typing import Self

import jax

from flaxlm.errors import Preempted, UserError
from flaxlm.parallel.processes import PeerError, _job, _processes


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
