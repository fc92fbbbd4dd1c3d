"""The supervisor: what it restarts, what it passes on, how it stops."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from flaxlm import supervise

ROOT = pathlib.Path(__file__).parents[1]
# A command that records each start in a file, then does what its n-th argument says.
CHILD = """
import os, pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
with log.open("a") as f: f.write(f"{time.monotonic()}\\n")
n = len(log.read_text().splitlines())
actions = sys.argv[2:]
action = actions[min(n, len(actions)) - 1]
if action.startswith("sleep"):
  def stop(number, frame):
    with open(sys.argv[1] + ".signal", "a") as f: f.write(f"{number}\\n")
    os._exit(int(action.split(":")[1]))
  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, stop)
  log.with_suffix(".ready").write_text("")
  time.sleep(60)
if action.startswith("run"):
  time.sleep(float(action.split(":")[1]))
  sys.exit(int(action.split(":")[2]))
if action == "kill": os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(action))
"""

# Supervises with a thread that takes SIGTERM for itself once the command is ready. The
# main thread's system call is not interrupted, as if the signal came just before it.
UNNOTICED = """
import pathlib, signal, sys, threading, time
from flaxlm import supervise
def take_the_signal():
  while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)
  time.sleep(0.2)
  signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=take_the_signal).start()
supervise.main(sys.argv[2:])
"""


STARTED = []


@pytest.fixture(autouse=True)
def leave_no_process():
  yield
  for process in STARTED:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
  STARTED.clear()


def start(tmp_path, *actions, options=("--backoff=0.01",), supervisor=None):
  supervisor = supervisor or ["-m", "flaxlm.supervise", *options]
  child = [sys.executable, "-c", CHILD, str(tmp_path / "log"), *map(str, actions)]
  process = subprocess.Popen(
    [sys.executable, *supervisor, "--", *child], cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
  )  # fmt: skip
  STARTED.append(process)
  return process


def run(tmp_path, *actions, **kwargs):
  """Returns (exit code, number of starts, output)."""
  process = start(tmp_path, *actions, **kwargs)
  printed, _ = process.communicate(timeout=60)
  return process.returncode, len(starts(tmp_path)), printed


def starts(tmp_path):
  return [float(line) for line in (tmp_path / "log").read_text().splitlines()]


def wait_for(path):
  deadline = time.monotonic() + 30
  while not path.exists():
    assert time.monotonic() < deadline, f"{path} does not come"
    time.sleep(0.01)


def test_success_is_passed_on(tmp_path):
  assert run(tmp_path, 0) == (0, 1, "")


@pytest.mark.parametrize("actions", [(75, 0), (70, 0), ("kill", 0), (85, 74, 75, 0)])
def test_preempted_and_crashed_commands_run_again(tmp_path, actions):
  code, count, printed = run(tmp_path, *actions)
  assert (code, count) == (0, len(actions)), printed
  assert "restart 1 of 10" in printed


@pytest.mark.parametrize("code", [2, 65, 66, 73, 86])
def test_what_a_restart_cannot_mend_is_passed_on_at_once(tmp_path, code):
  assert run(tmp_path, code, 0) == (code, 1, "")


def test_a_final_code_of_the_user_is_passed_on_too(tmp_path):
  options = ("--backoff=0.01", "--final=75", "--final=3")
  assert run(tmp_path, 70, 75, 0, options=options)[:2] == (75, 2)


def test_it_gives_up_in_the_end_with_the_code_of_the_command(tmp_path):
  options = ("--backoff=0.01", "--max_restarts=2")
  code, count, printed = run(tmp_path, "kill", options=options)
  assert (code, count) == (128 + 9, 3) and "giving up after 2 restarts" in printed


def test_a_healthy_run_resets_the_count(tmp_path):
  options = ("--backoff=0.01", "--max_restarts=1", "--healthy=0.4")
  code, count, _ = run(tmp_path, 70, "run:0.5:70", "run:0.5:75", 70, 0, options=options)
  assert (code, count) == (70, 4)


def test_preempted_restarts_at_once_and_crashed_waits(tmp_path):
  code, _, printed = run(tmp_path, 75, 0, options=("--backoff=20",))
  first, second = starts(tmp_path)
  assert code == 0 and "in 0.0 s" in printed and second - first < 9
  (tmp_path / "log").unlink()
  code, _, printed = run(tmp_path, 70, 0, options=("--backoff=1",))
  first, second = starts(tmp_path)
  assert code == 0 and second - first >= 0.5


def test_delays_double_with_jitter_up_to_a_limit():
  def delays(code, attempt):
    return [supervise.delay(code, attempt, 5.0, 300.0) for _ in range(200)]

  for attempt, longest in [(1, 5), (2, 10), (4, 40), (7, 300), (5000, 300)]:
    found = delays(70, attempt)
    assert longest / 2 <= min(found) < max(found) <= longest
    assert max(found) - min(found) > longest / 4
  assert set(delays(75, 1)) == {0.0}
  assert min(delays(75, 2)) >= 2.5 and max(delays(75, 2)) <= 5.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("code, expected", [(75, 75), (1, 75), (2, 2), (0, 0)])
def test_a_signal_reaches_the_command_and_ends_the_supervisor(
  tmp_path, number, code, expected
):
  process = start(tmp_path, f"sleep:{code}")
  wait_for(tmp_path / "log.ready")
  process.send_signal(number)
  printed, _ = process.communicate(timeout=30)
  assert process.returncode == expected and printed == ""
  assert (tmp_path / "log.signal").read_text() == f"{number.value}\n"
  assert len(starts(tmp_path)) == 1


def test_a_signal_that_interrupts_nothing_is_not_lost(tmp_path):
  ready = tmp_path / "log.ready"
  process = start(tmp_path, "sleep:75", supervisor=["-c", UNNOTICED, str(ready)])
  printed, _ = process.communicate(timeout=30)
  assert (process.returncode, printed) == (75, "")
  assert (tmp_path / "log.signal").read_text() == f"{signal.SIGTERM.value}\n"


def test_a_signal_ends_the_waiting_between_two_runs(tmp_path):
  process = start(tmp_path, 70, 0, options=("--backoff=600", "--max_backoff=600"))
  assert "restart 1 of 10" in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  began = time.monotonic()
  process.communicate(timeout=30)
  assert process.returncode == 75 and time.monotonic() - began < 5


@pytest.mark.parametrize("arguments", [[], ["--"], ["--", "no-such-program"]])
def test_a_missing_command_is_a_config_error(arguments):
  command = [sys.executable, "-m", "flaxlm.supervise", *arguments]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert "the command cannot be used" in done.stderr
  assert "Traceback" not in done.stderr


def test_options_of_the_command_are_its_own(tmp_path):
  command = [sys.executable, "-m", "flaxlm.supervise", "--", "echo", "--final=1", "--"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "--final=1 --\n")


def test_it_needs_no_jax():
  code = "import sys; from flaxlm import supervise; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
