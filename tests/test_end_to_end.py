"""The product as a user runs it: processes, signals, kills.

The main promise is tested here: a run that was killed and resumed is bit-equal to one
that was not.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.num_steps = 24
  config.data.store = {store!r}
  config.data.sources = base.sources(
    code=base.source("text", {texts!r} + "/*.py", document="paragraph", weight=3.0),
    words=base.source("text", {texts!r} + "/*.txt", document="paragraph"),
  )
  config.data.validation_fraction = 0.2
  config.data.loader = "numpy"
  config.data.seq_len = 32
  config.data.batch_size = 8
  config.tokenizer.vocab_size = 512
  config.model.num_layers = 2
  config.model.embed_dim = 32
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 8
  config.model.mlp_dim = 64
  config.optim.peak_learning_rate = 1e-2
  config.optim.warmup_steps = 4
  config.step.ema_decay = 0.9
  config.eval.every = 12
  config.checkpoint.every = 6
  config.log.every = 1
  config.log.tensorboard = False
  return config
"""


def environment(**changes):
  """Processes share a compilation cache, as a user's do."""
  kept = {"JAX_ENABLE_COMPILATION_CACHE": "true", "PYTHONPATH": str(ROOT)}
  return quick.environment() | kept | changes


def start(command, *arguments, **env):
  return subprocess.Popen(
    [sys.executable, "-m", f"flaxlm.{command}", *map(str, arguments)],
    cwd=ROOT, env=environment(**env), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def run(command, *arguments, code=0, **env):
  """Runs a command and waits for it; returns its output."""
  process = start(command, *arguments, **env)
  out, err = process.communicate(timeout=300)
  assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
  assert code == 0 or len(err.strip().splitlines()) <= 12 or "Gloo" in err, err
  return out + err


def wait_until(condition, process, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, "it takes too long"
    time.sleep(0.002)


def logged(workdir):
  """Returns {(step, kind): values} of metrics.jsonl, without those of the clock."""
  rows = {}
  path = pathlib.Path(workdir) / "metrics.jsonl"
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      row = json.loads(line)
    except ValueError:
      continue  # being written
    key = row["step"], row["kind"]
    assert key not in rows, f"{key} is logged twice"
    names = ("loss", "grad_norm", "learning_rate", "bits_per_byte", "tokens")
    rows[key] = {name: row[name] for name in names if name in row}
  return rows


def leaves(workdir, step):
  """Returns {name: array} of a checkpoint, read with only Orbax."""
  import orbax.checkpoint as ocp

  path = pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"
  with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns that no sharding was given
    tree = reader.restore(path)
  flat = {}

  def walk(prefix, node):
    for name, value in node.items():
      if isinstance(value, dict):
        walk(f"{prefix}/{name}", value)
      else:
        flat[f"{prefix}/{name}"] = np.asarray(value)

  walk("", tree)
  return flat


def assert_same_run(one, other, step=24):
  a, b = leaves(one, step), leaves(other, step)
  assert a.keys() == b.keys() and len(a) > 30
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  assert logged(one) == logged(other)


def make_project(home) -> None:
  """Writes texts, a config and a store to `home`, and trains there once."""
  texts = home / "texts"
  texts.mkdir()
  for path in sorted((pathlib.Path(os.__file__).parent / "json").glob("*.py")):
    (texts / path.name).write_bytes(path.read_bytes())
  words = "\n\n".join(
    f"Paragraph {i}: {i * i} is the square of {i}." for i in range(300)
  )
  (texts / "words.txt").write_text(words)
  (home / "config.py").write_text(
    CONFIG.format(store=str(home / "store"), texts=str(texts))
  )
  prepared = run("prepare", f"--config={home}/config.py")
  assert "lossless" in prepared and "code train" in prepared
  run("train", f"--config={home}/config.py", f"--workdir={home}/straight")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
  """A prepared store, its config file, and one uninterrupted run of it."""
  home = tmp_path_factory.mktemp("project")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    make_project(home)
    yield home


def test_a_run_learns_and_leaves_a_complete_record(project):
  rows = logged(project / "straight")
  assert [step for step, kind in rows if kind == "train"] == list(range(1, 25))
  assert [step for step, kind in rows if kind == "eval"] == [12, 24]
  assert rows[24, "train"]["loss"] < rows[1, "train"]["loss"] - 0.5
  steps = sorted(int(p.name) for p in (project / "straight/checkpoints").iterdir())
  assert steps == [18, 24]
  config = json.loads((project / "straight/config.json").read_text())
  assert config["optim"]["peak_learning_rate"] == 0.01


def test_evaluate_and_generate_work_from_the_run_alone(project):
  found = json.loads(
    run("evaluate", f"--workdir={project}/straight", "--json").splitlines()[0]
  )
  in_loop = logged(project / "straight")[24, "eval"]
  assert found["step"] == 24 and found["tokens"] == in_loop["tokens"]
  assert found["loss"] == pytest.approx(in_loop["loss"], rel=1e-6)
  assert found["bits_per_byte"] < found["unigram_bits_per_byte"] + 1.5
  text = run(
    "generate", f"--workdir={project}/straight", "--prompt=import ", "--max_tokens=30"
  )
  assert text.startswith("import ") and len(text) > 20


@pytest.mark.slow
@pytest.mark.parametrize(
  "command", [("evaluate", "--json"), ("generate", "--prompt=import ")]
)
def test_a_command_repeats_itself(project, command):
  name, flag = command
  first, again = (run(name, f"--workdir={project}/straight", flag) for _ in range(2))
  assert first.splitlines()[0] == again.splitlines()[0]


@pytest.mark.faults
@pytest.mark.parametrize(
  "moment",
  [
    "in a step",
    "while a checkpoint is written",
    pytest.param("before any checkpoint", marks=pytest.mark.slow),
  ],
)
def test_killed_and_resumed_is_bit_equal(project, tmp_path, moment):
  command = "train", f"--config={project}/config.py", f"--workdir={tmp_path}/run"
  process = start(*command)
  checkpoints = tmp_path / "run/checkpoints"
  if moment == "in a step":
    wait_until((checkpoints / "6").exists, process)
    steps = len(logged(tmp_path / "run"))
    wait_until(lambda: len(logged(tmp_path / "run")) > steps, process)
  elif moment == "before any checkpoint":
    wait_until(lambda: len(logged(tmp_path / "run")) >= 2, process)
  else:
    wait_until(lambda: (checkpoints / "12.unfinished").exists(), process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (checkpoints / "24").exists()
  printed = run(*command)
  if moment != "before any checkpoint":
    assert "(from step" in printed
  assert_same_run(project / "straight", tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize(
  "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_continues(project, tmp_path, number):
  command = "train", f"--config={project}/config.py", f"--workdir={tmp_path}/run"
  process = start(*command)
  wait_until(lambda: len(logged(tmp_path / "run")) >= 3, process)
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  stopped = max(step for step, _ in logged(tmp_path / "run"))
  assert process.returncode == 75 and f"stopped after step {stopped} of 24" in err
  assert (tmp_path / "run/checkpoints" / str(stopped) / "MANIFEST.json").exists()
  run(*command)
  assert_same_run(project / "straight", tmp_path / "run")


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_not_lost(project, tmp_path):
  command = "train", f"--config={project}/config.py", f"--workdir={tmp_path}/run"
  process = start(*command, JAX_ENABLE_COMPILATION_CACHE="false")
  wait_until(lambda: (tmp_path / "run/owner.json").exists(), process)
  process.send_signal(signal.SIGTERM)  # while it compiles
  process.communicate(timeout=60)
  assert process.returncode == 75
  run(*command)
  assert_same_run(project / "straight", tmp_path / "run")


@pytest.mark.slow
def test_an_evaluation_that_a_kill_prevented_is_made_up_for(project, tmp_path):
  command = "train", f"--config={project}/config.py", f"--workdir={tmp_path}/run"
  assert "profile of steps 5 to 7" in run(*command, "--config.log.profile_step=5")
  assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
  path = tmp_path / "run/metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  assert '"eval"' in lines[-1]
  path.write_text("".join(lines[:-1]) + lines[-1][:20])  # cut off, as after a kill
  run(*command)
  assert logged(tmp_path / "run") == logged(project / "straight")
  assert "nothing to do" in run(*command)


@pytest.mark.faults
def test_a_damaged_checkpoint_is_noticed_and_an_older_one_used(project, tmp_path):
  command = "train", f"--config={project}/config.py", f"--workdir={tmp_path}/run"
  shutil.copytree(project / "straight", tmp_path / "run")
  files = [p for p in (tmp_path / "run/checkpoints/24").rglob("*") if p.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  (tmp_path / "run/checkpoints/99").mkdir()
  printed = run(*command)
  assert "24" in printed and "99" in printed and "(from step 18)" in printed
  assert_same_run(project / "straight", tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_as_one(project, tmp_path):
  """2 hosts, then 1: the same batches and, up to the order of sums, the same losses."""
  script = ["bash", str(ROOT / "launch/local.sh"), "-n", "2"]
  script += [f"--config={project}/config.py", f"--workdir={tmp_path}/run"]
  env = environment(
    VIRTUAL_ENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}"
  )
  process = subprocess.Popen(
    script,
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  wait_until(lambda: len(logged(tmp_path / "run")) >= 8, process)
  process.terminate()
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 75, out
  run("train", f"--config={project}/config.py", f"--workdir={tmp_path}/run")
  expected, found = logged(project / "straight"), logged(tmp_path / "run")
  assert expected.keys() == found.keys()
  for key, row in expected.items():
    for name, value in row.items():
      assert found[key][name] == pytest.approx(value, rel=2e-4), (key, name)


def test_a_directory_in_use_is_refused(project, tmp_path):
  command = "train", f"--config={project}/config.py", f"--workdir={tmp_path}/run"
  first = start(*command)
  wait_until(lambda: (tmp_path / "run/owner.json").exists(), first)
  message = run(*command, code=73)
  assert f"process {first.pid}" in message
  first.kill()
  first.communicate()


@pytest.mark.faults
@pytest.mark.slow
def test_what_does_not_fit_the_run_is_refused(project, tmp_path):
  workdir = f"--workdir={project}/straight"
  wider = run(
    "train",
    f"--config={project}/config.py",
    workdir,
    "--config.model.mlp_dim=128",
    code=2,
  )
  assert "mlp" in wider and "128" in wider
  other = tmp_path / "other"
  change = f"--config.data.store={other}"
  seed = "--config.data.validation_fraction=0.3"
  run("prepare", f"--config={project}/config.py", change, seed)
  message = run(
    "train", f"--config={project}/config.py", workdir, change, seed, code=65
  )
  assert "other data" in message
  message = run("train", f"--config={project}/config.py", "--workdir=x",
                "--config.data.store=nowhere", code=66)  # fmt: skip
  assert "flaxlm.prepare" in message
  message = run("generate", f"--workdir={tmp_path}", code=66)
  assert "holds no model" in message


@pytest.mark.faults
@pytest.mark.slow
def test_numbers_that_stay_bad_stop_the_run(project, tmp_path):
  message = run(
    "train", f"--config={project}/config.py", f"--workdir={tmp_path}/run",
    "--config.optim.peak_learning_rate=1e30", "--config.optim.max_grad_norm=0",
    "--config.guards.max_bad_steps=4", code=86,
  )  # fmt: skip
  assert "4 steps in a row" in message
