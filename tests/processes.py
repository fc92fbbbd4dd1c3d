"""Finds the processes that tests leave behind: they would disturb the tests after them.

They are known by a variable of their environment, which children of children have too,
also after their parent is gone.
"""

import contextlib
import os
import time

import psutil

_VARIABLE = "FLAXLM_STARTED_BY_TESTS"
_HELPERS = (  # they end with the process that started them
  "multiprocessing.resource_tracker",
  "multiprocessing.forkserver",
  "tokenizer/template_worker.py",
)


def mark_children() -> None:
  """Marks all processes that this one starts from now on."""
  os.environ[_VARIABLE] = str(os.getpid())


def end_children(patience: float = 2) -> list[str]:
  """Kills the marked processes that still run; returns their command lines.

  Args:
    patience: seconds that they have to end by themselves.
  """
  deadline = time.monotonic() + patience
  while (left := _running()) and time.monotonic() < deadline:
    time.sleep(0.05)
  found = []
  for process in left:
    with contextlib.suppress(psutil.NoSuchProcess):
      found.append(" ".join(process.cmdline())[:200])
      process.kill()
  return found


def _running() -> list[psutil.Process]:
  found = []
  for process in psutil.process_iter():
    with contextlib.suppress(psutil.Error):
      if process.environ().get(_VARIABLE) != str(os.getpid()):
        continue
      command = " ".join(process.cmdline())
      if process.status() != psutil.STATUS_ZOMBIE and not any(
        name in command for name in _HELPERS
      ):
        found.append(process)
  return found
