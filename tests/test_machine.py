"""Choosing the platform and caching programs harm no run."""

import errno
import fnmatch
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from flaxlm import machine

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.num_steps = config.log.every = 2
  config.data.loader = "synthetic"
  config.data.seq_len, config.data.batch_size = 16, 2
  config.tokenizer.vocab_size = 64
  model = config.model
  model.num_layers, model.embed_dim, model.head_dim, model.mlp_dim = 1, 16, 4, 32
  model.num_heads = model.num_kv_heads = 2
  config.optim.warmup_steps = 1
  config.log.tensorboard = False
  return config
"""


class Runs:
  """Runs short trainings whose cache is under `home`."""

  def __init__(self, home: pathlib.Path):
    self.home, self.count = home, 0
    (home / "config.py").write_text(CONFIG)

  def start(self, **env) -> tuple:
    self.count += 1
    workdir = self.home / f"run{self.count}"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    plain |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    plain |= {"XDG_CACHE_HOME": str(self.home / "cache")} | env
    command = [
      sys.executable,
      "-m",
      "flaxlm.train",
      "--config",
      self.home / "config.py",
    ]
    process = subprocess.Popen(
      [*map(str, command), "--workdir", str(workdir)],
      env=plain, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, workdir

  def finish(self, process, workdir) -> tuple:
    """Returns (programs found, programs requested, losses, stderr)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found = re.search(r"first step [\d.]+ s after the command; (.*)", out).group(1)
    numbers = [int(n) for n in re.findall(r"\d+", found)] or [0, 0]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return (*numbers, [json.loads(line)["loss"] for line in lines], err)

  def entries(self) -> list[pathlib.Path]:
    return sorted((self.home / "cache").rglob("*-cache"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
  return Runs(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def cold(runs) -> list:
  """Two runs at the same time, with an empty cache."""
  return [runs.finish(*one) for one in [runs.start(), runs.start()]]


def test_a_second_start_compiles_next_to_nothing(runs, cold):
  for found, asked, _, err in cold:
    assert found < asked / 2 and "cache" not in err
  assert runs.entries()
  found, asked, losses, err = runs.finish(*runs.start())
  assert asked == cold[0][1] and found >= len(runs.entries()) - 1 > 0
  assert losses == cold[0][2] == cold[1][2]
  # XLA must not warn that it was compiled for another machine either.
  assert "cache" not in err and "machine" not in err.lower()


@pytest.mark.slow
def test_damaged_entries_are_compiled_again(runs, cold):
  # All programs are cached, not only those that are slow to compile here.
  every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  runs.finish(*runs.start(**every))
  assert len(runs.entries()) == cold[0][1] > 2
  for i, entry in enumerate(runs.entries()):
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 255
    entry.write_bytes([data[: len(data) // 2], b"", data][i % 3])
  found, _, losses, err = runs.finish(*runs.start(**every))
  assert found == 0 and losses == cold[0][2]
  assert "Error reading persistent compilation cache entry" in err


@pytest.mark.slow
def test_jax_s_own_variable_turns_it_off(runs, tmp_path):
  before = runs.entries()
  off = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XDG_CACHE_HOME": str(tmp_path)}
  assert runs.finish(*runs.start(**off))[:2] == (0, 0)
  assert runs.entries() == before and not list(tmp_path.rglob("*-cache"))


@pytest.fixture
def environment(monkeypatch, tmp_path) -> dict:
  clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  clean |= {"XDG_CACHE_HOME": str(tmp_path)}
  monkeypatch.setattr(os, "environ", clean)
  return clean


def test_the_directory_is_the_users_alone_and_bounded(environment, tmp_path):
  machine.keep_programs()
  directory = pathlib.Path(environment["JAX_COMPILATION_CACHE_DIR"])
  assert directory.parent == tmp_path / "flaxlm" / "programs"
  assert directory.stat().st_mode & 0o077 == 0
  assert 0 < int(environment["JAX_COMPILATION_CACHE_MAX_SIZE"]) < 2**33


def test_a_directory_that_was_chosen_is_left_alone(environment):
  environment["JAX_COMPILATION_CACHE_DIR"] = "elsewhere"
  before = dict(environment)
  machine.keep_programs()
  assert environment == before


def test_a_home_that_cannot_be_written_keeps_nothing(environment, tmp_path):
  (tmp_path / "flaxlm").write_text("a file, where a directory should be")
  machine.keep_programs()
  assert not any(name.startswith("JAX_COMPILATION") for name in environment)


def test_entries_that_a_kill_tore_go(environment):
  machine.keep_programs()
  directory = pathlib.Path(environment.pop("JAX_COMPILATION_CACHE_DIR"))
  names = ("whole-cache", "whole-atime", "torn-cache", "new-cache")
  for name in names:
    (directory / name).write_bytes(b"x")
  os.utime(directory / "torn-cache", (0, 0))
  os.utime(directory / "whole-cache", (0, 0))
  machine.keep_programs()
  assert {p.name for p in directory.iterdir()} == {*names} - {"torn-cache"}


def test_another_processor_has_another_directory(tmp_path):
  def named(flags: str, speed: str = "2000") -> str:
    path = tmp_path / "cpuinfo"
    path.write_text(f"model name\t: X\ncpu MHz\t: {speed}\nflags\t: {flags}\n\nrest\n")
    return machine.processor(str(path))

  assert named("avx2") == named("avx2", "2100") != named("avx2 avx512f")
  assert machine.processor(str(tmp_path / "none"))  # no such file on a Mac


@pytest.mark.parametrize(
  ("devices", "platforms"),
  [((), "cpu"), (("/dev/nvidia0",), "cuda,cpu"), (("/dev/vfio/0",), None)],
)
def test_libtpu_is_asked_only_where_there_are_tpus(devices, platforms, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(machine.os.path, "exists", lambda path: path in devices)
  monkeypatch.setattr(machine.glob, "glob", lambda p: fnmatch.filter(devices, p))
  machine.choose_platform()
  assert os.environ.get("JAX_PLATFORMS") == platforms
  monkeypatch.setenv("JAX_PLATFORMS", "tpu")
  machine.choose_platform()
  assert os.environ["JAX_PLATFORMS"] == "tpu"


@pytest.mark.faults
def test_a_full_cache_costs_a_warning_and_nothing_else(monkeypatch):
  from jax._src import compilation_cache

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(compilation_cache, "put_executable_and_time", full)
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    with pytest.warns(UserWarning, match="No space left on device"):
      assert jax.jit(lambda x: 3 * x + 1)(2) == 7
  finally:
    jax.config.update(name, before)
