"""Saves that are tried again: a disk that is full for a minute does not end a run.

A save that failed is not repeated as it was, because the step has gone on and its
arrays are overwritten. The state of a later step is saved instead. In a job of many
processes each would have to learn of the failure; there it ends the job with exit code
74, and `flaxlm.supervise` starts it again after a delay.
"""

import math
import sys
import time
from collections.abc import Callable

import jax

from flaxlm import files
from flaxlm.errors import StorageError
from flaxlm.training.checkpoint import Checkpointer


class Saves:
  """Saves the states of a run when they are due, and again after a failure.

  Older checkpoints stay until a newer one is complete.
  """

  def __init__(self, checkpoints: Checkpointer, describe: Callable[[int], dict]):
    """Args: `describe` returns the `meta` of a checkpoint, by its step."""
    self._checkpoints, self._describe = checkpoints, describe
    self._failures, self._again = 0, math.inf  # in a row; when to try again

  def poll(self) -> None:
    """Notices how a save in the background ended.

    Raises:
      StorageError: saves failed too often in a row.
    """
    try:
      if self._checkpoints.poll():
        self._failures = 0
    except StorageError as error:
      self._count(error)

  def is_due(self, step: int) -> bool:
    """Says whether the state after `step` is to be saved."""
    return self._checkpoints.is_due(step) or time.monotonic() >= self._again

  def begin(self, step: int, state) -> None:
    """Saves a state in the background. Raises StorageError as `poll` does."""
    self._again = math.inf
    try:
      self._checkpoints.save(step, state, self._describe(step))
    except StorageError as error:
      self._count(error)

  def finish(self, step: int, state) -> None:
    """Saves a state, and returns when it is on disk. Raises StorageError as `poll`."""
    while True:
      try:
        self._checkpoints.save(step, state, self._describe(step))
        return self._checkpoints.wait()
      except StorageError as error:
        self._count(error)
      time.sleep(max(self._again - time.monotonic(), 0))

  def _count(self, error: StorageError) -> None:
    """Decides when to try again; raises `error` if it has been tried often enough."""
    self._failures += 1
    if self._failures > len(files.RETRY_SECONDS) or jax.process_count() > 1:
      raise error
    delay = files.RETRY_SECONDS[self._failures - 1]
    self._again = time.monotonic() + delay
    what = "; ".join(line.strip() for line in str(error).splitlines()[:2])
    print(f"flaxlm: warning: {what}; trying again in {delay:g} s", file=sys.stderr)
