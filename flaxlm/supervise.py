"""Restart a command after crashes and preemptions until it is done.

  python -m flaxlm.supervise -- python -m flaxlm.train --config=... --workdir=runs/a
  python -m flaxlm.supervise --max_restarts=3 -- bash launch/local.sh -n 4 --config=...

A command that was preempted (75) is restarted at once; one that crashed, after a delay
that doubles each time. Exit codes that a restart cannot help (2, 65, 66, 73, 86) are
passed on at once. SIGTERM and SIGINT go to the command, which saves; the exit code is
then 75.
"""

import random
import signal
import subprocess
import sys
import time

from flaxlm import cli, errors

_FINAL = (
  errors.ConfigError.exit_code,
  errors.DataError.exit_code,
  errors.MissingInputError.exit_code,
  errors.OutputError.exit_code,
  errors.NumericsError.exit_code,
)
_PREEMPTED = errors.Preempted.exit_code


class _Child:
  """The running command, and whether we were told to stop."""

  SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

  def __init__(self, command: list[str]):
    self.command = command
    self.process: subprocess.Popen | None = None
    self.stopped_by = 0  # the signal that told us to stop
    for number in self.SIGNALS:
      signal.signal(number, self._stop)

  def _stop(self, number, frame) -> None:
    self.stopped_by = number
    if self.process:
      self.process.send_signal(number)

  def run(self) -> int:
    """Runs the command to its end; returns its exit code (128 + n for signal n)."""
    try:
      self.process = subprocess.Popen(self.command)
    except OSError as error:
      given = f"{self.command[0]}: {error.strerror}"
      raise errors.ConfigError("the command", given, "a program") from None
    if self.stopped_by:  # the signal came before there was a process to send it to
      self.process.send_signal(self.stopped_by)
    code = self._wait()
    self.process = None
    return code if code >= 0 else 128 - code

  def _wait(self) -> int:
    # Python runs a signal's handler between bytecodes. One that arrives just before the
    # process blocks would be handled only when the command ends: never block for long.
    while True:
      try:
        return self.process.wait(timeout=1)
      except subprocess.TimeoutExpired:
        pass

  def sleep(self, seconds: float) -> None:
    """Waits, or returns early when told to stop."""
    deadline = time.monotonic() + seconds
    while not self.stopped_by and (left := deadline - time.monotonic()) > 0:
      time.sleep(min(left, 0.2))


def delay(code: int, attempt: int, backoff: float, max_backoff: float) -> float:
  """Returns the seconds to wait before the `attempt`-th restart in a row (from 1).

  Half of the delay is random, so that a job's many hosts do not all return at once
  (Brooker, "Exponential backoff and jitter", 2015).
  """
  if code == _PREEMPTED:
    attempt -= 1  # nothing is wrong the first time: only the machine went away
  if attempt == 0:
    return 0.0
  longest = min(max_backoff, backoff * 2.0 ** min(attempt - 1, 30))
  return longest * random.uniform(0.5, 1.0)


def supervise(
  command: list[str], *, max_restarts: int, backoff: float, max_backoff: float,
  healthy: float, final: tuple[int, ...],
) -> int:  # fmt: skip
  """Runs `command` until it succeeds or a restart cannot help; returns the exit code.

  Args:
    max_restarts: restarts in a row, without a healthy run, before giving up.
    backoff: seconds before the first restart after a crash; it doubles each time.
    max_backoff: the longest delay, seconds.
    healthy: seconds after which a run counts as healthy and the count starts anew.
    final: exit codes that are passed on without a restart.
  """
  child = _Child(command)
  attempt = 0
  while True:
    started = time.monotonic()
    code = child.run()
    seconds = time.monotonic() - started
    if code == 0 or code in final:
      return code
    if child.stopped_by:
      return _PREEMPTED
    attempt = 1 if seconds >= healthy else attempt + 1
    what = f"flaxlm.supervise: exit code {code} after {seconds:.0f} s"
    if attempt > max_restarts:
      _report_restart(f"{what}; giving up after {max_restarts} restarts")
      return code
    wait = delay(code, attempt, backoff, max_backoff)
    _report_restart(f"{what}; restart {attempt} of {max_restarts} in {wait:.1f} s")
    child.sleep(wait)
    if child.stopped_by:
      return _PREEMPTED


def _report_restart(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  at = argv.index("--") if "--" in argv else len(argv)
  parser = cli.make_parser(__doc__, "supervise")
  parser.epilog = "What follows `--` is the command."
  number = {"type": float, "metavar": "SECONDS"}
  parser.add_argument(
    "--max_restarts",
    type=int,
    default=10,
    help="restarts in a row, without a healthy run between them (10)",
  )
  parser.add_argument(
    "--backoff",
    default=5.0,
    help="delay before the first restart after a crash (5)",
    **number,
  )
  parser.add_argument(
    "--max_backoff", default=300.0, help="longest delay (300)", **number
  )
  parser.add_argument(
    "--healthy",
    default=1800.0,
    help="a run this long resets the count (1800)",
    **number,
  )
  parser.add_argument(
    "--final", type=int, action="append", default=[], metavar="CODE",
    help="another exit code to pass on without a restart; may be repeated",
  )  # fmt: skip
  args = parser.parse_args(argv[:at])
  if not argv[at + 1 :]:
    raise errors.ConfigError("the command", "none", "a command after --", "-- python …")
  options = vars(args) | {"final": (*_FINAL, *args.final)}
  sys.exit(supervise(argv[at + 1 :], **options))


if __name__ == "__main__":
  cli.run_command(main)
