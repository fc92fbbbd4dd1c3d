"""The roll call in threads; test_multihost.py has real processes."""

import socket
import threading

import pytest

from flaxlm.errors import ConfigError, Preempted
from flaxlm.parallel import joining
from flaxlm.parallel.processes import PeerError


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def call_roll(present, count, seconds, stop_requested=lambda: False, port=None):
  """Answers the roll call in one thread per process; returns {process: its error}."""
  address, errors = f"127.0.0.1:{port or free_port()}", {}

  def answer(index):
    errors[index] = None
    try:
      joining._answer_roll_call(address, count, index, seconds, stop_requested)
    except Exception as error:
      errors[index] = error

  threads = [threading.Thread(target=answer, args=(index,)) for index in present]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return errors


def test_all_arrive_in_any_order():
  assert call_roll([3, 2, 0, 1], 4, 20) == dict.fromkeys(range(4))


@pytest.mark.faults
def test_the_missing_are_named_by_everyone_who_is_there():
  errors = call_roll([0, 1, 4], 5, 1)
  assert errors.keys() == {0, 1, 4}
  for error in errors.values():
    assert isinstance(error, PeerError) and error.exit_code == 75
    lines = str(error).splitlines()
    assert lines[0] == "processes 2 and 3 of 5 did not arrive within 1 s"
    assert "(this host alone can reach it)" in lines[1]
    assert len(lines) <= 5 and "start_seconds" in lines[-1]


@pytest.mark.faults
def test_a_missing_coordinator_is_named_too():
  for deadline in (0.0, 1.0):  # it never listens
    now = joining.time.monotonic()
    place = "127.0.0.1", free_port()
    assert joining._report_in(place, 1, now + deadline, lambda: False) == [0]


def test_a_signal_ends_the_wait():
  errors = call_roll([0, 1], 3, 300, stop_requested=lambda: True)
  assert all(isinstance(error, Preempted) for error in errors.values())


def test_strangers_do_not_count(monkeypatch):
  create = socket.create_server

  def create_and_disturb(address, **options):
    server = create(address, **options)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"7", b""):
      with socket.create_connection(("127.0.0.1", address[1])) as stranger:
        stranger.sendall(words)
    return server

  port = free_port()
  monkeypatch.setattr(socket, "create_server", create_and_disturb)
  assert call_roll([0, 1], 2, 20, port=port) == {0: None, 1: None}


@pytest.mark.faults
def test_a_port_in_use_is_a_config_error():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=f"port {port}"):
      joining._call_roll(port, 2, 0.0, lambda: False)


@pytest.mark.parametrize(
  ("address", "count", "index", "words"),
  [
    ("127.0.0.1:1", "2", None, "no JAX_PROCESS_ID"),
    ("127.0.0.1:1", "2", "2", "2 of 2"),
    ("127.0.0.1:1", "two", "0", "0 of two"),
    ("127.0.0.1", "2", "0", "host:port"),
  ],
)
def test_an_environment_that_describes_no_job(
  monkeypatch, address, count, index, words
):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
  monkeypatch.setenv("JAX_NUM_PROCESSES", count)
  if index is not None:
    monkeypatch.setenv("JAX_PROCESS_ID", index)
  with pytest.raises(ConfigError, match=words):
    joining.join_processes(False)


@pytest.mark.faults
@pytest.mark.parametrize(
  ("name", "value", "hosts"),
  [
    ("SLURM_JOB_NUM_NODES", "4", 4),
    ("SLURM_NNODES", "2", 2),
    ("TPU_WORKER_HOSTNAMES", "a,b,c", 3),
  ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.1.1", "[::1]"])
def test_several_hosts_do_not_wait_for_themselves(
  monkeypatch, name, value, hosts, host
):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"{host}:{free_port()}")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  monkeypatch.setenv("JAX_PROCESS_ID", "1")
  monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=f"in a job of {hosts} hosts") as caught:
    joining.join_processes(False)
  assert len(str(caught.value).splitlines()) <= 5


def test_processes_of_one_host_may_meet_on_its_loopback(monkeypatch):
  joining._check_coordinator("127.0.0.1:1")
  monkeypatch.setenv("SLURM_NNODES", "2")  # of the job; this step uses one
  monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
  joining._check_coordinator("127.0.0.1:1")
  monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
  joining._check_coordinator("192.0.2.7:1")
  joining._check_coordinator("no-such-host.invalid:1")
