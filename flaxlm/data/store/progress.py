"""Shows how far a preparation is: a bar in a terminal, otherwise a line at times."""

import sys
import time
from collections.abc import Callable
from typing import Self

EVERY = 5.0  # seconds between lines


class BuildProgress:
  """Counts bytes and tokens, and estimates the time left from the sizes of files."""

  def __init__(self, sizes: dict[str, list[int]], log: Callable[[str], None]):
    self._sizes, self._log = sizes, log
    self._total = sum(map(sum, sizes.values()))
    self._done = self._file = self._in_file = self._skipped = 0
    self._name = ""
    self.bytes = self.tokens = 0
    self._start = self._last = time.perf_counter()
    self._bar = self._task = None

  def __enter__(self) -> Self:
    if sys.stderr.isatty():
      from rich import console, progress

      self._bar = progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(),
        progress.TaskProgressColumn(), progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(), console=console.Console(stderr=True),
      )  # fmt: skip
      self._task = self._bar.add_task("tokenising", total=self._total or None, rate="")
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._bar:
      self._bar.stop()

  @property
  def rate(self) -> float:
    """MB of text per second since the start."""
    return self.bytes / 1e6 / max(time.perf_counter() - self._start, 1e-9)

  def begin(self, name: str, file: int) -> None:
    """Begins (or continues) source `name` at its file number `file`."""
    names = list(self._sizes)
    before = sum(sum(self._sizes[n]) for n in names[: names.index(name)])
    self._name, self._file, self._in_file = name, file, 0
    self._skipped += before + sum(self._sizes[name][:file]) - self._done
    self._done = before + sum(self._sizes[name][:file])

  def update(self, file: int, num_bytes: int, num_tokens: int) -> None:
    """Adds what was just tokenised, when reading has reached file number `file`."""
    self.bytes += num_bytes
    self.tokens += num_tokens
    sizes = self._sizes[self._name]
    if file != self._file:
      self._done += sum(sizes[self._file : file])
      self._file, self._in_file = file, 0
    self._in_file += num_bytes
    inside = min(self._in_file, sizes[file]) if file < len(sizes) else 0
    rate = f"{self.rate:.1f} MB/s"
    if self._bar:
      self._bar.update(self._task, completed=self._done + inside, rate=rate)
    elif time.perf_counter() - self._last >= EVERY:
      self._last = time.perf_counter()
      fresh = self._done + inside - self._skipped
      left = self._total - self._done - inside
      passed = self._last - self._start
      eta = f", {left / fresh * passed:.0f} s left" if fresh > 0 and self._total else ""
      share = f" of {self._total / 1e6:.1f}" if self._total else ""
      self._log(
        f"tokenising {self._name}: {(self._done + inside) / 1e6:.1f}{share} MB, "
        f"{self.tokens / 1e6:.1f} M tokens, {rate}{eta}"
      )
