"""One thread runs the engine; coroutines hand it requests and wait for their tokens.

The two meet in a queue (requests in) and in one call per step (what changed, out), so
neither tokenising nor a slow reader holds the engine up.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator

from flaxlm.inference.engine import Engine, Request

STALLED_SECONDS = 120  # a step takes less; compiling is over


class Overloaded(Exception):
  """The queue is full; `seconds` is when to come again."""

  def __init__(self, seconds: int):
    super().__init__("the queue is full")
    self.seconds = seconds


class Service:
  """Serves the requests of an event loop.

  Args:
    max_waiting: requests that may wait for a slot.
  """

  def __init__(self, engine: Engine, max_waiting: int):
    self.engine, self.max_waiting = engine, max_waiting
    self.open = 0  # requests that were taken and have not ended
    self.failure: BaseException | None = None
    self.last_step = time.monotonic()
    self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    self._changed: dict[Request, asyncio.Event] = {}
    self._news: list[Request] = []
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    """Starts the thread; call this from the event loop."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  async def stop(self) -> None:
    """Ends the thread after the requests that it has."""
    self._inbox.put(None)
    await asyncio.to_thread(self._thread.join)

  @property
  def is_well(self) -> bool:
    """Whether requests are answered: the thread lives and takes steps."""
    idle = self.open == 0
    recent = time.monotonic() - self.last_step < STALLED_SECONDS
    return self._thread.is_alive() and self.failure is None and (idle or recent)

  def take(self, requests: list[Request]) -> None:
    """Queues requests that belong together, or none of them; `watch` follows.

    Raises:
      Overloaded: too many wait already.
    """
    if self.failure is not None or not self._thread.is_alive():
      raise RuntimeError("the engine has ended") from self.failure
    waiting = self.open - self.engine.num_slots
    if self.open and waiting + len(requests) > self.max_waiting:
      raise Overloaded(self._seconds_to_wait())
    changed = asyncio.Event()
    for request in requests:
      self.open += 1
      self._changed[request] = changed
      request.on_change = self._news.append
      self._inbox.put(request)

  async def watch(self, requests: list[Request], every: float) -> AsyncIterator[bool]:
    """Yields True whenever one of the requests has changed, until all have ended.

    Whoever leaves early cancels them.

    Args:
      every: seconds after which False is yielded if nothing has changed.
    """
    changed = self._changed[requests[0]]
    try:
      while True:
        try:
          await asyncio.wait_for(changed.wait(), every)
        except TimeoutError:
          yield False
          continue
        changed.clear()
        is_over = all(request.finish for request in requests)
        yield True
        if is_over:
          return
    finally:
      self.forget(requests)

  def forget(self, requests: list[Request]) -> None:
    """Cancels requests unless they have ended; they count no longer."""
    for request in requests:
      request.cancel()
      if self._changed.pop(request, None) is not None:
        self.open -= 1

  def _seconds_to_wait(self) -> int:
    """Guesses when a slot is free: the time that a request has taken on average."""
    return max(1, min(60, round(self.open / self.engine.num_slots)))

  def _run(self) -> None:
    is_open = True
    try:
      while is_open or self.engine.num_busy or self.engine.num_waiting:
        is_open = self._receive(is_open)
        if self.engine.step():
          self.last_step = time.monotonic()
        self._deliver()
    except BaseException as error:
      self.failure = error
      self._loop.call_soon_threadsafe(self._fail)
      raise

  def _receive(self, is_open: bool) -> bool:
    """Submits what has arrived; waits if there is nothing else to do."""
    idle = not (self.engine.num_busy or self.engine.num_waiting)
    while is_open:
      try:
        request = self._inbox.get(block=idle)
      except queue.Empty:
        break
      idle = False
      self.last_step = time.monotonic()
      if request is None:
        return False
      self.engine.submit(request)
    return is_open

  def _deliver(self) -> None:
    news, self._news[:] = list(self._news), []
    if news:
      self._loop.call_soon_threadsafe(self._wake, news)

  def _wake(self, requests: list[Request]) -> None:
    for request in requests:
      if changed := self._changed.get(request):
        changed.set()

  def _fail(self) -> None:
    for request, changed in self._changed.items():
      request.finish = request.finish or "error"
      changed.set()
