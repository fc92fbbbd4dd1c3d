"""The tests find the processes that a test leaves behind."""

import subprocess

from tests.processes import end_children


def test_processes_that_are_left_behind_are_found():
  # The shell ends at once, so that its child is nobody's.
  subprocess.run(["sh", "-c", "sleep 71 > /dev/null 2>&1 &"], check=True)
  assert end_children(patience=0) == ["sleep 71"]
  assert not end_children()
