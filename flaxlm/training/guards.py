"""Guards against what can end a run badly: signals, hangs, numbers that are not finite.

JAX is not imported at the top: importing it takes seconds, and `StopSignal` must be
installed before, so that no signal is lost.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from typing import Self

from flaxlm.errors import HANG_EXIT_CODE, NumericsError, Preempted


class StopSignal:
  """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the loop reads.

  The first signal asks for a stop after the current step. The next one, at least a
  second later, ends the process at once; `timeout` and some schedulers signal a process
  and then its whole group, so two signals within a second count as one.

  Python runs signal handlers only between bytecodes of the main thread, and an XLA
  compilation can delay them by minutes. A thread that reads the wakeup descriptor
  answers at once.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
  GRACE_SECONDS = 1.0

  def __init__(self):
    self.requested = False
    self._first = 0.0
    self._stopping = self._forwarded = False
    self._seen = {"handler": 0, "thread": 0}
    self._lock = threading.RLock()
    reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
    self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    threading.Thread(
      target=self._read, args=(reader,), name="stop-signal", daemon=True
    ).start()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    """Puts back the handlers that were there before."""
    signal.set_wakeup_fd(self._previous_fd)
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    os.close(self._writer)

  def _handle(self, number, frame) -> None:
    self._count("handler", number)

  def _read(self, reader: int) -> None:
    while numbers := os.read(reader, 64):
      for number in numbers:
        if number in self.SIGNALS:
          self._count("thread", number)
    os.close(reader)

  def _count(self, path: str, number: int) -> None:
    """Acts once on a signal that is seen by both the handler and the thread.

    Orbax's event loops take over the wakeup descriptor while they run, so either may
    miss one; the higher of the two counts is the number of signals.
    """
    with self._lock:
      before = max(self._seen.values())
      self._seen[path] += 1
      if self._seen[path] <= before:
        return
      now = time.monotonic()
      if not self.requested:
        self.requested, self._first = True, now
        self._say(number, "stopping after this step; again to exit now")
      elif now - self._first > self.GRACE_SECONDS:
        self._say(number, "exiting now; the last complete checkpoint stays valid")
        os._exit(Preempted.exit_code)

  @staticmethod
  def _say(number: int, what: str) -> None:
    # os.write: print() is not reentrant, and this may interrupt another print.
    os.write(2, f"\nflaxlm: {signal.Signals(number).name}: {what}\n".encode())

  def should_stop(self, step: int | None = None) -> bool:
    """Returns True when the run must save and end now.

    Args:
      step: the step just finished. Every process of a job must ask once per step,
        because they agree on one step to stop after. None asks between steps, as in an
        evaluation: False in a job of many processes until they have agreed.
    """
    import jax

    if jax.process_count() == 1:
      return self.requested
    if step is None or self._stopping:
      return self._stopping
    from jax.experimental import multihost_utils

    # jax.distributed.initialize replaced our SIGTERM handler with one that tells the
    # other processes. It handles no other signal, so ours are sent on as SIGTERM, once.
    if self.requested and not self._forwarded:
      self._forwarded = True
      os.kill(os.getpid(), signal.SIGTERM)
    self._stopping = multihost_utils.reached_preemption_sync_point(step)
    if self._stopping and not self.requested:
      self._say(signal.SIGTERM, f"all processes stop after step {step}")
    return self._stopping


class Watchdog:
  """Prints all stacks of a process that makes no progress, then ends it.

  A hung collective waits for ever, and so do the other machines; a scheduler can act on
  an exit code.
  """

  def __init__(self, seconds: float):
    """Allows `seconds` between two calls of `beat`; 0 = no watchdog."""
    self.seconds = seconds
    self._last = time.monotonic()
    self._done = threading.Event()

  def __enter__(self) -> Self:
    self.beat()
    if self.seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()

  def beat(self) -> None:
    """Says that the run makes progress."""
    self._last = time.monotonic()

  def _watch(self) -> None:
    tick = min(self.seconds / 10, 10)
    while True:
      before = time.monotonic()
      if self._done.wait(tick):
        return
      now = time.monotonic()
      if now - before > 5 * tick:
        self.beat()  # this thread did not run either: the process was stopped, not hung
      if now - self._last > self.seconds:
        os.write(
          2,
          (
            f"flaxlm: no progress for {now - self._last:.0f} s (guards.hang_seconds="
            f"{self.seconds:g}); stacks of all threads follow\n"
          ).encode(),
        )
        faulthandler.dump_traceback(all_threads=True)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
          # One process hangs and all wait for it. If this one ended now, it might end
          # the hung one before its watchdog has printed where it hangs.
          time.sleep(2 * tick)
        os._exit(HANG_EXIT_CODE)


class BadSteps:
  """Counts steps whose loss or gradient was not finite, and decides when to give up.

  The step itself leaves the state as it was, inside `jax.jit`.
  """

  def __init__(self, max_bad_steps: int):
    self.max_bad_steps = max_bad_steps
    self.total = 0
    self._in_a_row: list[tuple[int, float]] = []

  def update(self, step: int, is_bad: bool, loss: float) -> None:
    """Raises NumericsError at the `max_bad_steps`-th bad step in a row."""
    if not is_bad:
      self._in_a_row.clear()
      return
    self.total += 1
    self._in_a_row.append((int(step), float(loss)))
    if len(self._in_a_row) < self.max_bad_steps:
      return
    shown = ", ".join(f"{s} (loss {value:g})" for s, value in self._in_a_row[:5])
    more = ", ..." if len(self._in_a_row) > 5 else ""
    raise NumericsError(
      f"{len(self._in_a_row)} steps in a row had a loss or gradient that is not finite",
      f"steps {shown}{more} to {self._in_a_row[-1][0]}; metrics.jsonl has their rows",
      f"a finite one in config.guards.max_bad_steps={self.max_bad_steps}",
      "a lower --config.optim.peak_learning_rate, or a longer warm-up",
    )
