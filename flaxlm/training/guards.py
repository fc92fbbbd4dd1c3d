"""What keeps a run honest when the world does not: signals, locks, hangs, bad numbers.

Only the standard library is imported at the top, so that `StopSignal` can be installed
before the seconds that importing JAX takes: a signal is then never lost, in any phase.
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
  """Turns SIGTERM, SIGINT and SIGUSR1 into a question that the loop asks.

  The first signal asks for a stop after the current step; the next one, at least a
  second later, ends the process at once. The second of grace is there because `timeout`
  and some schedulers signal a process and then its whole group.

  Python runs signal handlers only between bytecodes of the main thread, which may be
  minutes away inside an XLA compilation. A thread that reads the wakeup descriptor
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
    """Acts once on a signal that arrives by both paths.

    The event loops inside Orbax borrow the wakeup descriptor while they run, so either
    path may miss one; the higher of the two counts is the number of signals.
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
    """True when the run must save and leave now.

    Args:
      step: the step just finished. Every process of a job asks once for every step, as
        the processes agree on one step to stop after. None asks between steps
        (evaluation, sampling), where a process of a larger job may not decide alone:
        False there.
    """
    import jax

    if jax.process_count() == 1:
      return self.requested
    if step is None or self._stopping:
      return self._stopping
    from jax.experimental import multihost_utils

    # jax.distributed.initialize replaced our SIGTERM handler by the one that tells the
    # other processes. It knows no other signal, so ours are passed on as SIGTERM, once.
    if self.requested and not self._forwarded:
      self._forwarded = True
      os.kill(os.getpid(), signal.SIGTERM)
    self._stopping = multihost_utils.reached_preemption_sync_point(step)
    if self._stopping and not self.requested:
      self._say(signal.SIGTERM, f"all processes stop after step {step}")
    return self._stopping


class Watchdog:
  """Ends a process that makes no progress, after printing all its stacks.

  A hung collective waits for ever and holds the other machines with it; an exit code is
  something a scheduler can act on.
  """

  def __init__(self, seconds: float):
    """seconds: the longest time between two calls of `beat`; 0 = no watchdog."""
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
    self._last = time.monotonic()

  def _watch(self) -> None:
    tick = min(self.seconds / 10, 10)
    while True:
      before = time.monotonic()
      if self._done.wait(tick):
        return
      now = time.monotonic()
      if now - before > 5 * tick:
        self.beat()  # this thread stood still too: the process was stopped, not hung
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
          # One process hangs, and all wait for it. If this one left now, it might tear
          # the other down before its watchdog has shown where it hangs.
          time.sleep(2 * tick)
        os._exit(HANG_EXIT_CODE)


class BadSteps:
  """Counts the steps whose loss or gradient was not finite and so changed nothing.

  The step itself leaves the state untouched (inside `jax.jit`); this decides when to
  give up.
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
    # batch(step) is a pure function, so a step's number is also the name of its batch.
    shown = ", ".join(f"{s} (loss {value:g})" for s, value in self._in_a_row[:5])
    more = ", ..." if len(self._in_a_row) > 5 else ""
    raise NumericsError(
      f"{len(self._in_a_row)} steps in a row had a loss or gradient not finite\n"
      f"  given:  steps (= batches) {shown}{more} to {self._in_a_row[-1][0]}\n"
      f"  needed: a finite one in config.guards.max_bad_steps={self.max_bad_steps}\n"
      "  try:    a lower --config.optim.peak_learning_rate, or a longer warm-up"
    )
