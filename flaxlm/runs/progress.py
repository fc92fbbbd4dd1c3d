"""What a run reports while it trains: metrics, a profile, compiled programs.

The numbers of a step are read only after the next one has been dispatched, so that
the device never waits for the host.
"""

import collections
import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Self

import jax
import psutil
from ml_collections import ConfigDict

from flaxlm.errors import printable
from flaxlm.models.cost import flops_per_token
from flaxlm.parallel.hardware import peak_flops
from flaxlm.runs import metrics as reports
from flaxlm.training.guards import BadSteps


def say(line: str) -> None:
  """Prints a line; process 0 only."""
  if jax.process_index() == 0:
    print(printable(line, 2000), flush=True)


@contextlib.contextmanager
def count_programs() -> Iterator[collections.Counter]:
  """Counts JAX's events by name while the block runs, those of its cache among them."""
  events = collections.Counter()

  def count(event: str, **_) -> None:
    events[event.rpartition("/")[2]] += 1

  jax.monitoring.register_event_listener(count)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_listener(count)


def _describe_start(compiled: collections.Counter) -> str:
  """Returns how long a user waited for the first step, and what the cache saved."""
  seconds = time.time() - psutil.Process().create_time()
  asked, found = compiled["compile_requests_use_cache"], compiled["cache_hits"]
  cache = f"{found} of {asked} programs came from the cache" if asked else "no cache"
  return f"first step {seconds:.1f} s after the command; {cache}"


class TrainingProgress:
  """Reads the numbers of each step, one step late; logs every log.every steps."""

  def __init__(
    self,
    config,
    workdir: pathlib.Path,
    first_step: int,
    compiled: collections.Counter,
    expected_seconds: float | None,
    rows_read: int = 0,
  ):
    """Opens the log of a run of which `first_step` steps are done.

    Args:
      compiled: of `count_programs`.
      expected_seconds: per step; None if unknown.
      rows_read: rows of the data that were read in these steps.
    """
    self.every, self.num_steps = config.log.every, config.num_steps
    self.bad_steps = BadSteps(config.guards.max_bad_steps)
    bfloat16 = config.model.dtype == "bfloat16"
    self.writer = reports.MetricsWriter(
      workdir,
      config.log.tensorboard,
      first_step,
      config.num_steps,
      config.data.batch_size * config.data.seq_len,
      flops_per_token(config.model, config.data.seq_len),
      peak_flops(jax.devices()[0]) if bfloat16 else None,
      expected_seconds,
    )
    self._first_step, self._pending, self._waited = first_step, None, 0.0
    self._rows_read, self._batch_size = rows_read, config.data.batch_size
    self._compiled = compiled
    # Without asynchronous dispatch, a step is done when it returns.
    asynchronous = jax.config.read("jax_cpu_enable_async_dispatch")
    self._late = asynchronous or jax.default_backend() != "cpu"

  def __enter__(self) -> Self:
    self.writer.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self.writer.__exit__(*error)

  def waiting_for(self, batches: Iterator) -> Iterator:
    """Yields the batches, and measures how long the loop waits for them."""
    while True:
      start = time.perf_counter()
      batch = next(batches, None)
      self._waited += time.perf_counter() - start
      if batch is None:
        return
      yield batch

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the numbers of a step, and reads those of the step before."""
    self.flush()
    self._pending = step, metrics
    if not self._late:
      self.flush()

  def flush(self) -> None:
    """Waits for the last step and reads its numbers.

    Raises:
      NumericsError: too many steps in a row were not finite.
    """
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = jax.device_get(metrics)
    self.writer.advance(step)
    is_bad = values.pop("bad")
    if is_bad:  # which rows, so that they can be looked at
      before = self._rows_read + (step - 1 - self._first_step) * self._batch_size
      shown = {name: values[name] for name in ("loss", "grad_norm")}
      rows = {"first_row": before, "rows": self._batch_size}
      self.writer.log(step, shown | rows, "bad")
    self.bad_steps.update(step, is_bad, values["loss"])
    first = step == self._first_step + 1
    if first or step % self.every == 0 or step == self.num_steps:
      if not values["skipped"]:  # most runs skip nothing: no column for it
        del values["skipped"]
      self.writer.log(step, values, "train", self._waited)
      self._waited = 0.0
    if first:  # most of its time was compilation
      say(_describe_start(self._compiled))
      self.writer.restart_clock(step)

  @contextlib.contextmanager
  def paused(self, step: int) -> Iterator[None]:
    """Leaves the time that the block takes out of the measured speed."""
    self.flush()
    yield
    self.writer.restart_clock(step)


class Profiler:
  """Traces log.profile_num_steps steps from log.profile_step on, for TensorBoard."""

  def __init__(self, log: ConfigDict, directory: pathlib.Path):
    self.first, self.stop = log.profile_step, log.profile_step + log.profile_num_steps
    self.directory = directory
    self.running = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    if self.running:
      jax.profiler.stop_trace()

  def at(self, step: int) -> None:
    """Starts or stops the trace, before `step` runs."""
    if self.first and step == self.first:
      jax.profiler.start_trace(str(self.directory))
      self.running = True
    elif self.running and step == self.stop:
      jax.profiler.stop_trace()
      self.running = False
      print(f"profile of steps {self.first} to {self.stop - 1}: {self.directory}")
