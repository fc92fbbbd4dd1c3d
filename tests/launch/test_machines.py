"""Launchers that start processes, with real processes where possible."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import quick
from tests.launch.stubs import LAUNCH, ODD, ROOT, commands

TINY = (
  "--config=configs/quickstart.py", "--config.data.loader=synthetic",
  "--config.data.seq_len=16", "--config.data.batch_size=4", "--config.log.every=1",
  "--config.model.num_layers=1", "--config.model.unroll=1", "--config.eval.every=0",
  "--config.tokenizer.vocab_size=64", "--config.model.embed_dim=16",
  "--config.log.tensorboard=false", "--config.optim.warmup_steps=0",
  "--config.optim.name=adamw",
)  # fmt: skip


def wait_for(condition, process=None, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert process is None or process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, "it takes too long"
    time.sleep(0.02)


def steps(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_text().count('"train"') if path.exists() else 0


def fake_train(tmp_path, code):
  """Makes a fake `python -m flaxlm.train` that prints what it got."""
  (tmp_path / "python").mkdir()
  text = f"""#!{sys.executable}
import os, signal, sys, time
if sys.argv[2] != "flaxlm.train":
  os.execv({sys.executable!r}, ["python", *sys.argv[1:]])
print(os.environ.get("HF_TOKEN"), *sys.argv[3:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
{code}
"""
  path = tmp_path / "python/python"
  path.write_text(text)
  path.chmod(0o755)
  return f"{tmp_path}/python:{sys.prefix}/bin:{os.environ['PATH']}"


def clone(tmp_path):
  """Copies what host.sh needs, so that it does not touch this clone."""
  home = tmp_path / "clone"
  shutil.copytree(LAUNCH, home / "launch")
  for name in ("flaxlm", "configs", "setup.py"):
    (home / name).symlink_to(ROOT / name)
  (home / "launch/environment.sh").write_text("")
  (home / "runs").mkdir()
  return home


@pytest.mark.parametrize("code", [0, 2])
def test_a_host_leaves_the_exit_code_behind(stubs, tmp_path, code):
  home = clone(tmp_path)
  (home / "runs/.secrets").write_text("HF_TOKEN=a $(touch canary) b\n")
  env = stubs.environment(PATH=fake_train(tmp_path, f"sys.exit({code})"))
  command = ["bash", str(home / "launch/host.sh"), "v5p", "1", "--workdir=a b"]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
  assert done.returncode == code, done.stderr
  assert "a $(touch canary) b --workdir=a b\n" in done.stdout
  assert (home / "runs/host.status").read_text() == f"{code}\n"


def test_a_host_passes_signals_on(stubs, tmp_path):
  home = clone(tmp_path)
  env = stubs.environment(PATH=fake_train(tmp_path, "time.sleep(60)"))
  command = ["bash", str(home / "launch/host.sh"), "cpu", "1", "--workdir=a"]
  process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
  assert "--workdir=a" in process.stdout.readline()
  time.sleep(0.2)  # it prints before it installs its handler
  assert (home / "runs/host.status").read_text() == "running\n"
  os.kill(int((home / "runs/host.pid").read_text()), signal.SIGTERM)
  assert process.wait(timeout=30) == 75
  process.stdout.close()
  assert (home / "runs/host.status").read_text() == "75\n"


def test_local_gives_each_gpu_a_process(stubs):
  stubs.write("nvidia-smi", "#!/bin/sh\nfor i in 0 1 2; do echo GPU $i: H100; done\n")
  printed = commands(stubs.run("local.sh", "--print", "-n", "gpus", "--config=x"))
  settings = [dict(w.split("=") for w in c[1:] if w[:4] == "JAX_") for c in printed[1:]]
  assert [s["JAX_LOCAL_DEVICE_IDS"] for s in settings] == ["0", "1", "2"]
  assert [s["JAX_PROCESS_ID"] for s in settings] == ["0", "1", "2"]
  assert {s["JAX_NUM_PROCESSES"] for s in settings} == {"3"}
  assert printed[1][-4:] == ["python", "-m", "flaxlm.train", "--config=x"]
  stubs.write("nvidia-smi", "#!/bin/sh\nexit 9\n")
  assert "no GPU" in stubs.run("local.sh", "-n", "gpus", "--config=x", code=2)
  assert "-n" in stubs.run("local.sh", "-n", "0; id", "--config=x", code=2)
  plain = commands(stubs.run("local.sh", "--print", "--config=x"))
  assert plain[1:] == [["python", "-m", "flaxlm.train", "--config=x"]]


@pytest.mark.parametrize("arguments", [["-n", "2"], []])
def test_local_exits_as_its_processes_do(stubs, arguments):
  printed = stubs.run(
    "local.sh", *arguments, "--config=nowhere.py", "--workdir=x", code=66
  )
  assert "nowhere.py" in printed


SRUN = """#!{python}
# Starts two local processes as srun would, returns the worst of their exit codes.
import json, os, pathlib, subprocess, sys
home = pathlib.Path(__file__).parent
with (home / "calls.jsonl").open("a") as f:
  f.write(json.dumps(["srun", *sys.argv[1:]]) + "\\n")
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"): command.pop(0)
def start(rank):
  env = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}}
  env |= {{"SLURM_STEP_NODELIST": "localhost,other", "SLURM_STEP_NUM_NODES": "1"}}
  return subprocess.Popen(command, env=os.environ | env)
tasks = [start(rank) for rank in range(2)]
(home / "pids.tmp").write_text(" ".join(str(task.pid) for task in tasks))
(home / "pids.tmp").rename(home / "pids")
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


def job_id():
  """Returns a job ID from which JAX derives a free coordinator port."""
  for number in range(os.getpid(), os.getpid() + 4096):
    with socket.socket() as probe:
      try:
        probe.bind(("", number % 4096 + 65535 - 4095))
        return str(number)
      except OSError:
        continue


def job(stubs, tmp_path, *arguments, **env):
  """Starts the batch script as Slurm does: a copy in another directory."""
  script = tmp_path / "slurm_script"
  shutil.copy(LAUNCH / "slurm.sh", script)
  slurm = {"SLURM_JOB_ID": job_id(), "SLURM_SUBMIT_DIR": str(ROOT)} | env
  process = subprocess.Popen(
    ["bash", str(script), *arguments], cwd=tmp_path, text=True,
    env=stubs.environment(**slurm), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  return process, slurm["SLURM_JOB_ID"]


def test_slurm_submits_itself(stubs, tmp_path):
  arguments = ["--nodes=2", "--ntasks-per-node=8", "--", "--config=x", ODD]
  printed = commands(stubs.run("slurm.sh", "--print", *arguments, cwd=tmp_path))
  stubs.run("slurm.sh", *arguments, cwd=tmp_path)
  submit = ["sbatch", *arguments[:2], "launch/slurm.sh", *arguments[2:]]
  assert stubs.calls() == [submit] and printed[0] == submit
  assert printed[1][-3:] == ["--config=x", ODD, "--config.mesh.multihost=true"]
  assert printed[2] == ["scontrol", "requeue", "JOB_ID"]
  text = (LAUNCH / "slurm.sh").read_text()
  options = re.findall(r"^#SBATCH (.+)$", text.split("\nset -euo")[0], re.M)
  assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(options)
  assert "needed" in stubs.run("slurm.sh", "--nodes=2", code=2)


def test_slurm_gives_a_lone_process_all_gpus_of_its_node(stubs, tmp_path):
  text = '#!/bin/sh\necho "ids=$JAX_LOCAL_DEVICE_IDS."\n'
  stubs.write("srun", text)
  for tasks, expected in [("1", "ids=0,1,2,3."), ("4", "ids=.")]:
    env = {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": "4"}
    process, _ = job(stubs, tmp_path, "--", "--config=x", **env)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and expected in printed, printed


@pytest.mark.parametrize("code, starts", [(2, 1), (75, 1), (70, 4), (0, 1)])
def test_slurm_queues_again_what_was_preempted_and_nothing_else(
  stubs, tmp_path, code, starts
):
  stubs.answer(srun=("", code))
  env = stubs.environment()["PATH"]
  quick = "#!/bin/sh\n" + (  # without the supervisor's delays
    f'[ "$2" != flaxlm.supervise ] || {{ shift 2; set -- --backoff=0 "$@"; '
    f'exec {sys.executable} -m flaxlm.supervise "$@"; }}\nexec {sys.executable} "$@"\n'
  )
  stubs.write("python", quick)
  process, number = job(stubs, tmp_path, "--", "--config=x", PATH=env)
  printed, _ = process.communicate(timeout=60)
  assert process.returncode == code, printed
  calls = [call[0] for call in stubs.calls()]
  assert calls == ["srun"] * starts + ["scontrol"] * (code == 75)
  if code == 75:
    assert stubs.calls()[-1] == ["scontrol", "requeue", number]


@pytest.mark.slow
def test_slurm_trains_saves_at_its_signal_and_goes_on(stubs, tmp_path):
  """Two real processes that find each other through Slurm's variables."""
  stubs.write("srun", SRUN.format(python=sys.executable))
  run = tmp_path / "run"
  arguments = [f"--workdir={run}", *TINY]
  quickly = {"XLA_FLAGS": quick.environment()["XLA_FLAGS"]}
  long = "--config.num_steps=100000"
  process, _ = job(stubs, tmp_path, "--", *arguments, long, **quickly)
  wait_for(lambda: steps(run) >= 3, process)
  for pid in (stubs.home / "pids").read_text().split():
    os.kill(int(pid), signal.SIGTERM)  # as --signal=TERM does: the step, not the script
  printed, _ = process.communicate(timeout=120)
  assert process.returncode == 75, printed
  assert [call[0] for call in stubs.calls()] == ["srun", "scontrol"]
  manifest = run / "checkpoints" / str(steps(run)) / "MANIFEST.json"
  assert manifest.exists(), printed
