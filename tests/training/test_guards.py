"""Guards, each tested on a real process: signals, hangs and non-finite numbers."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from flaxlm.errors import NumericsError
from flaxlm.training.guards import BadSteps, StopSignal, Watchdog


def start(code: str, *arguments, **options) -> subprocess.Popen:
  """Starts `code` in a new Python and waits until it prints a first line."""
  child = subprocess.Popen(
    [sys.executable, "-u", "-c", code, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )
  child.first_line = child.stdout.readline()
  return child


def finish(child, timeout=20) -> tuple[int, str, str]:
  out, err = child.communicate(timeout=timeout)
  return child.returncode, out, err


LOOP = """
import sys, time
from flaxlm.training.guards import StopSignal
assert "jax" not in sys.modules
with StopSignal() as stop:
  print("ready")
  for step in range(400):
    time.sleep(0.02)
    if stop.requested:
      break
  time.sleep(float(sys.argv[1]))
print("stopped" if stop.requested else "ran to the end")
"""


@pytest.mark.faults
@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_first_signal_stops_after_the_step(number):
  child = start(LOOP, 0)
  child.send_signal(number)
  code, out, err = finish(child)
  assert (code, out) == (0, "stopped\n")
  said = f"flaxlm: {number.name}: stopping after this step; again to exit now"
  assert err.split("\n") == ["", said, ""]


@pytest.mark.faults
def test_second_signal_exits_at_once_but_not_within_the_grace_second():
  child = start(LOOP, 30)
  for _ in range(5):  # `timeout` signals a process, then its group
    child.send_signal(signal.SIGTERM)
    time.sleep(0.1)
  assert child.poll() is None
  time.sleep(1)
  before = time.monotonic()
  child.send_signal(signal.SIGINT)
  code, out, err = finish(child)
  assert code == 75 and "stopped" not in out and time.monotonic() - before < 2
  assert err.count("stopping") == 1 and err.count("exiting now") == 1


BLOCKED = """
import ctypes, signal
from flaxlm.training.guards import StopSignal
stop = StopSignal()
for number in StopSignal.SIGNALS:
  signal.siginterrupt(number, False)  # read() continues after a signal, as XLA does
libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(1)
print("ready")
libc.read(0, buffer, 1)
print("came back")
"""


@pytest.mark.faults
def test_second_signal_does_not_wait_for_a_long_call_into_c():
  child = start(BLOCKED, stdin=subprocess.PIPE)
  time.sleep(0.2)  # by now it is inside read()
  child.send_signal(signal.SIGTERM)
  time.sleep(1.2)
  assert child.poll() is None
  child.send_signal(signal.SIGTERM)
  child.wait(20)  # before its input is closed, which would end the read
  code, out, err = finish(child)
  assert (code, out) == (75, "")
  assert "stopping after this step" in err and "exiting now" in err


def test_a_signal_that_is_handled_late_is_not_taken_for_a_second_one():
  child = start(BLOCKED, stdin=subprocess.PIPE)
  time.sleep(0.2)  # by now it is inside read()
  child.send_signal(signal.SIGTERM)
  time.sleep(1.2)
  assert child.communicate("x", timeout=20)[0] == "came back\n"
  assert child.returncode == 0


def test_signals_that_only_the_handler_sees_still_count():
  """Event loops inside Orbax use the wakeup descriptor while they run."""
  before = signal.getsignal(signal.SIGINT)
  with StopSignal() as stop:
    signal.set_wakeup_fd(-1)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested and stop.should_stop(1) and stop.should_stop()
  assert signal.getsignal(signal.SIGINT) is before


DISTRIBUTED = """
import os, sys, time
from flaxlm.training.guards import StopSignal
stop = StopSignal()
import jax
port, index = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
for step in range(1, 500):
  assert not stop.should_stop()
  time.sleep(0.02)
  if step == 60:  # long enough to agree on a stop that nobody asked for
    print("still running")
  if stop.should_stop(step):
    print("stopped at", step)
    break
assert stop.should_stop()
"""


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_stop_after_the_same_step(number):
  """One process gets the signal; a process of a job never decides alone."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  children = [
    subprocess.Popen(
      [sys.executable, "-u", "-c", DISTRIBUTED, str(port), str(index)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for index in range(2)
  ]
  while "still running" not in (line := children[1].stdout.readline()):
    assert "stop" not in line and children[1].poll() is None
  children[1].send_signal(number)
  texts = [c.communicate(timeout=30) for c in children]
  stopped = [[x for x in out.splitlines() if "stop" in x] for out, _ in texts]
  assert [c.returncode for c in children] == [0, 0]
  assert stopped[0] == stopped[1] and len(stopped[0]) == 1
  # Those that saw no signal themselves say why they stop, once. JAX takes SIGTERM.
  said = [err.count("SIGTERM: all processes stop after step") for _, err in texts]
  assert said == [1, number == signal.SIGTERM]


HANG = """
import sys, time
from flaxlm.training.guards import Watchdog
with Watchdog(float(sys.argv[1])) as dog:
  print("ready")
  for _ in range(5):
    dog.beat()
    for _ in range(20):
      time.sleep(0.01)
  def stuck_in_a_collective():
    time.sleep(float(sys.argv[2]))
  stuck_in_a_collective()
print("done")
"""


@pytest.mark.faults
def test_watchdog_prints_stacks_and_exits_85():
  code, out, err = finish(start(HANG, 0.5, 60))
  assert (code, out) == (85, "")
  assert "no progress for" in err and "stuck_in_a_collective" in err
  children = start(HANG, 0, 1.2), start(HANG, 60, 0)  # switched off; never silent
  for child in children:
    assert finish(child) == (0, "done\n", "")


def test_watchdog_forgives_a_process_that_was_stopped():
  child = start(HANG, 1.0, 0)
  child.send_signal(signal.SIGSTOP)
  time.sleep(2.5)
  child.send_signal(signal.SIGCONT)
  assert finish(child) == (0, "done\n", "")


def test_watchdog_ends_with_its_block():
  with Watchdog(0.2):
    pass
  time.sleep(0.5)  # would end this test process


@pytest.mark.faults
def test_bad_steps_in_a_row():
  bad = BadSteps(3)
  for step, is_bad in enumerate([True, True, False, True, False, True, True], start=1):
    bad.update(step, is_bad, float("nan") if is_bad else 2.5)
  assert bad.total == 5
  with pytest.raises(NumericsError) as caught:
    bad.update(8, True, float("inf"))
  assert "steps 6 (loss nan), 7 (loss nan), 8 (loss inf) to 8;" in str(caught.value)
  assert len(str(caught.value).splitlines()) <= 5 and caught.value.exit_code == 86
  many = BadSteps(100)
  with pytest.raises(NumericsError, match=r"5 \(loss nan\), ... to 100; metrics"):
    for step in range(1, 101):
      many.update(step, True, float("nan"))
