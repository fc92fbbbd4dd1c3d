"""The log of a run: `metrics.jsonl`, TensorBoard and the console; its speed.

`metrics.jsonl` is the record: one exact line per interval and no step twice, even after
a kill (records.py). TensorBoard and the console are views of it, and neither can stop a
run.
"""

import contextlib
import errno
import functools
import math
import os
import pathlib
import sys
import time
from typing import Self

import jax
import numpy as np

from flaxlm.console import duration, live_bar, short_number
from flaxlm.errors import StorageError
from flaxlm.files import try_again, writing
from flaxlm.runs.directory import RunFiles
from flaxlm.runs.records import drop_lines_after, format_record


def _memory() -> dict[str, float]:
  """Returns the GiB in use: peak of the fullest local device, else of this process."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  if all("peak_bytes_in_use" in s for s in stats):
    return {"device_memory_gib": max(s["peak_bytes_in_use"] for s in stats) / 2**30}
  import psutil

  return {"host_memory_gib": psutil.Process().memory_info().rss / 2**30}


class MetricsWriter:
  """Writes intervals to the console, `metrics.jsonl` and TensorBoard; process 0 only.

  Speeds are measured between two calls of `log(kind="train")`. After anything that is
  not training (compilation, evaluation, a restore), call `restart_clock`.
  """

  def __init__(
    self,
    workdir,
    tensorboard: bool,
    first_step: int,
    num_steps: int,
    tokens_per_step: int,
    flops_per_token: float = 0.0,
    peak_flops: float | None = None,
    predicted_seconds: float | None = None,
    stream=None,
  ):
    """Opens the files, and drops what was logged after `first_step`.

    Args:
      first_step: finished steps: 0, or the step that was restored.
      flops_per_token: see models/cost.py; MFU needs it and `peak_flops`.
      peak_flops: of a device, in bfloat16; None if the model computes in float32.
      predicted_seconds: per step; its ratio to the measured time is logged.
      stream: of the console lines; None is sys.stdout.
    """
    self._predicted = predicted_seconds
    self.num_steps, self.tokens_per_step = num_steps, tokens_per_step
    self._flops, self._peak = flops_per_token, peak_flops
    self._clock: tuple[int, float] | None = None
    self._steps, self._seconds = 0, 0.0  # all intervals so far, for the ETA
    self._stream = stream or sys.stdout
    self._file = self._events = self._bar = None
    self._primary = jax.process_index() == 0
    if not self._primary:
      return
    files = RunFiles(workdir)
    with writing(files.metrics):
      drop_lines_after(files.metrics, first_step)
      # Unbuffered: a full disk is noticed in the write, not when the file is closed.
      self._file = files.metrics.open("ab", buffering=0)
    if tensorboard:
      self._try_events(lambda: self._open_events(files.tensorboard, first_step))
    if self._stream.isatty():
      self._bar = live_bar(self._stream, first_step, num_steps)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    if self._bar:
      self._bar.stop()
    if self._file:
      self._file.close()
    if self._events:
      self._try_events(self._events.close)

  def restart_clock(self, step: int) -> None:
    """Measures speeds from now on, with `step` steps done."""
    self._clock = (step, time.perf_counter())

  def log(
    self, step: int, values: dict, kind: str = "train", data_wait: float = 0.0
  ) -> None:
    """Records an interval.

    Args:
      step: finished steps.
      values: numbers, or arrays of one number, by name. "train" shows loss, grad_norm
        and learning_rate first.
      kind: "train", "eval", or "bad" for a step whose numbers are not finite.
      data_wait: seconds that the loop waited for data since the last "train" line.

    Raises:
      StorageError: `metrics.jsonl` cannot be written.
    """
    if not self._primary:
      return
    values = {name: _plain(value) for name, value in values.items()}
    if kind == "train":
      values |= self._speed(step, data_wait) | _memory()
    record = {"step": int(step), "kind": kind, "time": round(time.time(), 3)} | values
    line = format_record({k: _valid(v) for k, v in record.items()})
    try:
      try_again(functools.partial(self._append, line), self._file.name)
    except OSError as error:
      raise _cannot_write(self._file.name, error) from error
    # Lists, such as the load of each expert, are for the file alone.
    numbers = {k: v for k, v in values.items() if not isinstance(v, list)}
    if self._events:
      self._try_events(lambda: self._write_events(step, numbers, kind))
    self._print(self._line(step, numbers, kind))

  def _append(self, line: bytes) -> None:
    """Writes a line, or none of it."""
    end = os.fstat(self._file.fileno()).st_size
    try:
      if self._file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      with contextlib.suppress(OSError):
        os.ftruncate(self._file.fileno(), end)
      raise

  def advance(self, step: int) -> None:
    """Moves the bar, if there is one."""
    if self._bar:
      self._bar.update(self._bar.task_ids[0], completed=step)

  def _speed(self, step: int, data_wait: float) -> dict[str, float]:
    """Returns the throughput since the clock was last read, and restarts the clock."""
    now, clock = time.perf_counter(), self._clock
    self._clock = (step, now)
    if clock is None or clock[0] >= step:
      return {}
    steps, seconds = step - clock[0], max(now - clock[1], 1e-9)
    self._steps, self._seconds = self._steps + steps, self._seconds + seconds
    rate = steps * self.tokens_per_step / seconds
    speed = {
      "tokens_per_second": rate,
      "tokens_per_second_per_device": rate / jax.device_count(),
      "data_wait": min(data_wait / seconds, 1.0),
      "eta_seconds": (self.num_steps - step) * self._seconds / self._steps,
    }
    if self._peak and self._flops:
      speed["mfu"] = rate / jax.device_count() * self._flops / self._peak
    if self._predicted:
      speed["predicted_seconds"] = self._predicted
      speed["predicted_over_measured"] = self._predicted * steps / seconds
    return speed

  def _line(self, step: int, values: dict, kind: str) -> str:
    rest = {name: value for name, value in values.items() if "/" not in name}
    parts = [f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}"]
    if kind != "train":
      parts.append(kind)
    for name, label, form in _COLUMNS:
      if name in rest:
        parts.append(f"{label} {form(rest.pop(name))}".strip())
    per_device = rest.pop("tokens_per_second_per_device", None)
    if per_device is not None and jax.device_count() > 1:
      at = next(i for i, part in enumerate(parts) if part.endswith("tok/s"))
      parts[at] += f" ({short_number(per_device)}/device)"
    parts += [f"{name} {_show(value)}" for name, value in rest.items()]
    lines, tasks = ["  ".join(parts)], {}
    for name, value in values.items():
      task, slash, metric = name.rpartition("/")
      if slash:  # one line per task
        tasks.setdefault(task, [f"  {task}"]).append(f"{metric} {_show(value)}")
    return "\n".join(lines + ["  ".join(parts) for parts in tasks.values()])

  def _print(self, line: str) -> None:
    if self._bar:
      self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
      print(line, file=self._stream, flush=True)

  def _try_events(self, action) -> None:
    """Runs `action` on TensorBoard's file; if it fails, warns and drops TensorBoard."""
    try:
      action()
    except Exception as error:
      print(f"flaxlm: warning: TensorBoard is off: {error}", file=sys.stderr)
      events, self._events = self._events, None
      with contextlib.suppress(Exception):
        events.close()

  def _open_events(self, directory: pathlib.Path, first_step: int) -> None:
    """Opens an event file that hides what earlier ones hold after `first_step`.

    This uses the file layer of tensorboardX, not its SummaryWriter. The queue of the
    latter holds ten values; if its thread dies, the eleventh waits for ever.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    directory.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}"  # the name has only the host and the second
    self._events = EventsWriter(str(directory / "events"), suffix)
    start = SessionLog(status=SessionLog.START)
    self._events.write_event(Event(step=first_step + 1, session_log=start))
    self._events.flush()

  def _write_events(self, step: int, values: dict, kind: str) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    scalars = [
      Summary.Value(tag=f"{kind}/{name}", simple_value=value)
      for name, value in values.items()
      if isinstance(value, int | float)
    ]
    event = Event(step=int(step), wall_time=time.time(), summary=Summary(value=scalars))
    self._events.write_event(event)
    self._events.flush()


def _show(value) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


# The columns of a console line, in order: (name, label, how to show the value).
_COLUMNS = (
  ("loss", "loss", lambda v: f"{v:.4f}"),
  ("grad_norm", "grad", lambda v: f"{v:.3g}"),
  ("learning_rate", "lr", lambda v: f"{v:.2e}"),
  ("tokens_per_second", "", lambda v: f"{short_number(v)} tok/s"),
  ("mfu", "MFU", lambda v: f"{v:.1%}"),
  ("device_memory_gib", "mem", lambda v: f"{v:.2f} GiB"),
  ("host_memory_gib", "rss", lambda v: f"{v:.2f} GiB"),
  ("data_wait", "data wait", lambda v: f"{v:.1%}"),
  ("eta_seconds", "ETA", duration),
)


def _plain(value):
  """Returns a Python int, float, str or list; float32s keep their exact value."""
  if isinstance(value, str):
    return value
  array = np.asarray(value)
  if array.ndim:
    return [round(x, 6) for x in array.astype(float).tolist()]
  return int(array) if np.issubdtype(array.dtype, np.integer) else float(array)


def _valid(value):
  """Returns NaN and infinities as strings, since JSON has no number for them."""
  return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cannot_write(path, error: OSError) -> StorageError:
  return StorageError(
    f"{path} cannot be written",
    error.strerror or error,
    "a directory with space",
    "the same command again, when that is so",
  )
