"""Several processes that train together equal one process, and they end together.

All are real processes on this machine, joined over gloo. The cheap jobs below only
communicate; the runs of `python -m flaxlm.train` are what a user starts.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.num_steps = 16
  config.tokenizer.vocab_size = 64
  config.data.seq_len = 32
  config.data.batch_size = 8
  config.data.loader = "synthetic"
  config.model.num_layers = 2
  config.model.embed_dim = 32
  config.model.num_heads = 4
  config.model.num_kv_heads = 4
  config.model.head_dim = 8
  config.model.mlp_dim = 64
  config.optim.peak_learning_rate = 1e-2
  config.optim.warmup_steps = 4
  config.mesh.fsdp = 2
  config.mesh.tensor = 2
  config.checkpoint.every = 4
  config.guards.compare_every = 2
  config.log.every = 1
  config.log.tensorboard = False
  return config
"""
# A job that communicates every tenth of a second; its process FAULTY misbehaves.
TALK = """
import os, signal, time
import numpy as np
from flaxlm import cli
from flaxlm.errors import DataError
from flaxlm.parallel.agreement import agree, local_facts
from flaxlm.parallel.joining import join_processes
from flaxlm.parallel.one_fate import OneFate
from flaxlm.parallel.replicas import Replicas
from flaxlm.training.guards import Watchdog

fault = os.environ.get("FAULT") or "none"
if os.environ["JAX_PROCESS_ID"] != os.environ.get("FAULTY"):
  fault = "none"

def main():
  join_processes(False, 60)
  import jax
  from jax.experimental import multihost_utils
  mesh = jax.make_mesh((jax.device_count(),), ("data",))
  whole = jax.NamedSharding(mesh, jax.P())
  with OneFate(), Watchdog(5) as watchdog:
    seed = 1 if fault == "config" else 0
    agree("the start", local_facts() | {"config.seed": seed})
    if fault == "absent":
      time.sleep(60)
    agree("the data", {}, seconds=2)
    replicas = Replicas(1 if os.environ.get("FAULT") == "flip" else 0, mesh)
    for step in range(10_000):
      multihost_utils.process_allgather(np.ones(1))
      weights = np.ones(3, np.float32) * (2 if step > 5 and fault == "flip" else 1)
      held = jax.make_array_from_callback((3,), whole, lambda i: weights[i])
      replicas.after(step, {"weights": held})
      watchdog.beat()
      if step == 5 and fault != "none":
        os.write(2, f"NOW {time.time()}\\n".encode())
        if fault == "raise": raise KeyError("broken on purpose")
        if fault == "data": raise DataError("a bad shard\\n  given:  x")
        if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang": time.sleep(60)
      time.sleep(0.1)

cli.run_command(main)
"""
# Four steps on each mesh that has all devices on one axis; prints the exact losses.
MESHES = """
import importlib.util, itertools, json, sys
import jax
from flaxlm.parallel.joining import join_processes
from flaxlm.parallel.mesh import axis_sizes, make_mesh
from flaxlm.runs.program import build_program, open_feed, use_config_mesh

join_processes(False, 60)
spec = importlib.util.spec_from_file_location("config", sys.argv[1])
spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
found = {}
for axis in sys.argv[2:]:
  config = module.get_config()
  config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1, axis: jax.device_count()})
  mesh = make_mesh(**axis_sizes(config.mesh))
  feed, program = open_feed(config, mesh), build_program(config, mesh)
  with use_config_mesh(config, mesh):
    state, losses = program.init(jax.random.key(0)), []
    for batch in itertools.islice(feed.read_train(0, config.num_steps), 4):
      state, metrics = program.train_step(state, batch, None)
      losses.append(float(metrics["loss"]).hex())
  found[axis] = losses
print("FOUND", json.dumps(found))
"""


class Job:
  """Starts `count` processes of one command, each with its share of `devices`."""

  def __init__(self, home, count, devices, *arguments, **env):
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = server.getsockname()[1]
    env = quick.environment(devices // count, PYTHONPATH=str(ROOT), **env)
    if count > 1:
      env |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
      }
    self.logs = [home / f"log{port}.{i}" for i in range(count)]
    self.processes = []
    for i, path in enumerate(self.logs):
      index = {"JAX_PROCESS_ID": str(i)} if count > 1 else {}
      with path.open("w") as log:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=log, stderr=log,
            env=env | index,
          )
        )  # fmt: skip

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def wait(self, seconds=120):
    """Returns the exit code and output of each process, without gloo's messages."""
    deadline = time.monotonic() + seconds
    codes = [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
    self.ended = time.time()
    return codes, [re.sub(r"\[Gloo\].*\n", "", p.read_text()) for p in self.logs]

  def wait_until(self, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < deadline, [p.read_text() for p in self.logs]
      ended = [i for i, p in enumerate(self.processes) if p.poll() is not None]
      assert not ended, self.logs[ended[0]].read_text()
      time.sleep(0.01)

  def seconds_since_the_fault(self, output):
    return self.ended - float(re.search(r"NOW (\S+)", output)[1])


def train(home, workdir, count, devices, *arguments, **env):
  config, workdir = f"--config={home}/config.py", f"--workdir={workdir}"
  command = "-m", "flaxlm.train", config, workdir
  return Job(home, count, devices, *command, *arguments, **env)


def losses(workdir):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  rows = {}
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      row = json.loads(line)
    except ValueError:
      continue  # being written
    if row["kind"] == "train":
      assert row["step"] not in rows, "a step is logged twice"
      rows[row["step"]] = row["loss"]
  return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  path = tmp_path_factory.mktemp("multihost")
  (path / "config.py").write_text(CONFIG)
  return path


@pytest.fixture(scope="module")
def straight(home):
  """The losses of one uninterrupted process with four devices."""
  with train(home, home / "straight", 1, 4) as job:
    codes, output = job.wait()
  assert codes == [0], output
  return losses(home / "straight")


def talk(home, count, fault, faulty, seconds=60):
  job = Job(home, count, count, "-c", TALK, FAULT=fault, FAULTY=str(faulty))
  with job:
    codes, output = job.wait(seconds)
  return job, codes, output


def run_meshes(home, count, devices, *axes):
  with Job(home, count, devices, "-c", MESHES, home / "config.py", *axes) as job:
    codes, output = job.wait()
  assert codes == [0] * count, output
  found = [json.loads(re.search(r"FOUND (.*)", text)[1]) for text in output]
  assert all(one == found[0] for one in found)  # every process sees the same numbers
  return found[0]


def test_two_processes_are_bitwise_one_process_with_two_devices(home):
  """On each axis, the same devices in the same order sum in the same order."""
  one = run_meshes(home, 1, 2, "fsdp", "tensor")
  assert run_meshes(home, 2, 2, "fsdp", "tensor") == one
  assert len(set(map(tuple, one.values()))) > 1  # the axes are really different
  fsdp, tensor = ([float.fromhex(x) for x in losses] for losses in one.values())
  assert fsdp == pytest.approx(tensor, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_four_devices_in_several_processes_are_as_in_one(home, count):
  axes = "data", "fsdp", "tensor"
  one, found = run_meshes(home, 1, 4, *axes), run_meshes(home, count, 4, *axes)
  for axis, hexes in one.items():
    expected = [float.fromhex(x) for x in hexes]
    assert [float.fromhex(x) for x in found[axis]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.faults
def test_four_processes_then_two_then_one_are_one_run(home, straight, tmp_path):
  """SIGTERM to one of four, kill -9 to one of two: the curve does not change."""
  run = tmp_path / "run"
  with train(home, run, 4, 4) as job:
    job.wait_until(lambda: len(losses(run)) >= 2)
    job.processes[2].send_signal(signal.SIGTERM)
    codes, output = job.wait(60)
  assert codes == [75] * 4, output
  stops = {re.search(r"flaxlm: stopped after step (\d+)", text)[1] for text in output}
  stopped = int(stops.pop())
  assert not stops and stopped < 16, output  # all at the same step
  assert (run / "checkpoints" / str(stopped) / "MANIFEST.json").exists()

  with train(home, run, 2, 4) as job:
    done = len(losses(run))
    job.wait_until(lambda: len(losses(run)) >= done + 2)
    job.processes[1].kill()
    killed = time.time()
    codes, output = job.wait(60)
  # JAX aborts first if process 0 is waiting for a save that both share.
  line = "process 1 of 2 ended without a word; process 0 ends with it"
  said = {75: line, -signal.SIGABRT: "CoordinationService"}
  assert said[codes[0]] in output[0] and codes[1] == -9, output
  assert job.ended - killed < 15
  assert f"(from step {stopped})" in output[0] and "Traceback" not in output[0]

  with train(home, run, 1, 4) as job:
    codes, output = job.wait()
  assert codes == [0] and "(from step" in output[0]
  found = losses(run)
  assert list(straight) == list(found) == list(range(1, 17))
  assert list(found.values()) == pytest.approx(list(straight.values()), rel=1e-5)


@pytest.mark.faults
def test_a_host_with_another_config_is_named_by_all(home):
  _, codes, output = talk(home, 3, "config", 1)
  assert codes == [2, 2, 2]
  for text in output:
    assert text.splitlines()[0] == "flaxlm: config.seed cannot be used", text
    assert "1 in process 1 (on" in text and "0, as in 2 of 3" in text
    assert len(text.splitlines()) <= 5


@pytest.mark.faults
def test_a_host_that_lags_behind_is_named(home):
  _, codes, output = talk(home, 2, "absent", 1)
  what = "process 1 of 2 did not reach the data within 2 s"
  assert codes == [75, 75] and output[0] == f"flaxlm: {what}\n"
  assert output[1] == f"flaxlm: process 0 failed: {what}; process 1 ends with it\n"


@pytest.mark.faults
@pytest.mark.parametrize(
  ("fault", "code"), [("raise", 70), pytest.param("data", 65, marks=pytest.mark.slow)]
)
def test_a_process_that_fails_ends_the_job_with_one_message(home, fault, code):
  """Process 0 fails, the harder case, because JAX's service is in it."""
  job, codes, output = talk(home, 3, fault, 0)
  assert codes == [code] * 3, output
  assert job.seconds_since_the_fault(output[0]) < 15
  tracebacks = sum(text.count("Traceback") for text in output)
  assert tracebacks == (1 if fault == "raise" else 0), output
  what = {"raise": "KeyError: 'broken on purpose'", "data": "a bad shard"}[fault]
  assert output[0].count(what) == 1
  for i in (1, 2):
    line = f"flaxlm: process 0 failed: {what}; process {i} ends with it\n"
    assert output[i] == line


@pytest.mark.faults
def test_a_process_that_is_killed_ends_the_job(home):
  job, codes, output = talk(home, 3, "kill", 1)
  assert codes == [75, -9, 75], output
  assert job.seconds_since_the_fault(output[1]) < 15
  for i in (0, 2):
    line = f"flaxlm: process 1 of 3 ended without a word; process {i} ends with it\n"
    assert output[i] == line


@pytest.mark.faults
@pytest.mark.slow
def test_a_process_whose_weights_differ_is_named_by_all(home):
  _, codes, output = talk(home, 3, "flip", 1)
  assert codes == [75, 75, 75], output
  for text in output:
    assert "weights of process 1 (on" in text or "ends with it" in text, text
  assert any("after step 6, weights of process 1" in text for text in output)


@pytest.mark.faults
def test_the_process_that_holds_the_service_is_killed(home):
  job, codes, output = talk(home, 2, "kill", 0)
  assert codes[0] == -9 and codes[1] in (75, -signal.SIGABRT), output
  assert job.seconds_since_the_fault(output[0]) < 15


@pytest.mark.faults
@pytest.mark.parametrize("faulty", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_hangs_shows_where(home, faulty):
  job, codes, output = talk(home, 2, "hang", faulty)
  assert codes[faulty] == 85 and codes[1 - faulty] in (85, 75), output
  assert job.seconds_since_the_fault(output[faulty]) < 5 + 15
  stacks = output[faulty].split("stacks of all threads follow")[1]
  assert '"<string>", line' in stacks and "process_allgather" not in stacks


def find_rank(workdir, index):
  """Returns the process of a run by its number in the job, or None."""
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      words = (path / "cmdline").read_bytes().split(b"\0")
      env = (path / "environ").read_bytes().split(b"\0")
    except OSError:
      continue
    ours = f"--workdir={workdir}".encode() in words and b"flaxlm.train" in words
    if ours and f"JAX_PROCESS_ID={index}".encode() in env and b"bash" not in words:
      return int(path.name)
  return None


@pytest.mark.slow
def test_the_supervisor_goes_on_with_the_hosts_that_are_left(home, straight, tmp_path):
  """Of four processes one is killed with -9; the same command restarts two."""
  run, lost = tmp_path / "run", tmp_path / "lost"
  script = f"""
    if [ -e {lost} ]; then n=2 each=2; else touch {lost}; n=4 each=1; fi
    export XLA_FLAGS="{quick.EMITTERS} --xla_force_host_platform_device_count=$each"
    exec bash launch/local.sh -n $n --config={home}/config.py --workdir={run}
  """
  supervise = [sys.executable, "-m", "flaxlm.supervise", "--backoff=0.1", "--"]
  env = {
    "PYTHONPATH": str(ROOT),
    "VIRTUAL_ENV": sys.prefix,
    "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
  }
  log = tmp_path / "log"
  with log.open("w") as out:
    process = subprocess.Popen(
      [*supervise, "bash", "-c", script], cwd=ROOT, stdout=out, stderr=out,
      env=os.environ | env,
    )  # fmt: skip
  try:
    deadline = time.monotonic() + 200
    while len(losses(run)) < 6:  # two steps past a checkpoint
      assert process.poll() is None and time.monotonic() < deadline, log.read_text()
      time.sleep(0.01)
    os.kill(find_rank(run, 3), signal.SIGKILL)
    assert process.wait(200) == 0, log.read_text()
  finally:
    process.terminate()
  output = log.read_text()
  assert "restart 1 of" in output and output.count("compiling the training step") == 2
  found = losses(run)
  assert list(found) == list(straight)
  assert list(found.values()) == pytest.approx(list(straight.values()), rel=1e-5)
