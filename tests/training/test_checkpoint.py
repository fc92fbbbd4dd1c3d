"""Checkpoints are restored bit for bit, or the damage is detected."""

import dataclasses
import gc
import inspect
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flaxlm.errors import ConfigError, MissingInputError, OutputError, StorageError
from flaxlm.models import trees
from flaxlm.training import checkpoint
from flaxlm.training.checkpoint import Checkpointer


class Layer(nnx.Module):
  def __init__(self, rng: np.random.Generator, width: int):
    self.kernel = nnx.Param(jnp.asarray(rng.normal(size=(width, width)), jnp.float32))
    self.bias = nnx.Param(jnp.asarray(rng.normal(size=width), jnp.float32))


class Model(nnx.Module):
  def __init__(self, rng: np.random.Generator, width: int):
    self.embed = nnx.Param(jnp.asarray(rng.normal(size=(16, width)), jnp.float32))
    self.layers = nnx.List([Layer(rng, width) for _ in range(2)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  step: jax.Array
  model: Model
  opt_state: tuple


def make_state(seed: int = 0, width: int = 8, shape: tuple = (8,)) -> State:
  """A state whose matrices are sharded over a mesh of `shape`."""
  devices = jax.devices()[: int(np.prod(shape))]
  names = ("fsdp", "tensor")[: len(shape)]
  mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), names)
  model = Model(np.random.default_rng(seed), width)
  state = State(jnp.int32(seed), model, optax.adamw(1e-3).init(model))

  def place(x):
    spec = PartitionSpec(*names) if x.ndim == 2 else PartitionSpec()
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(place, state)


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def host(state) -> list[np.ndarray]:
  return [np.array(x) for x in jax.tree.leaves(state)]


def assert_equal(state, expected: list[np.ndarray]) -> None:
  for got, want in zip(host(state), expected, strict=True):
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes()


def opened(path, keep_last=3, keep_every=0, every=1) -> Checkpointer:
  return Checkpointer(path, keep_last, keep_every, every)


def save_steps(path, *steps, **policy) -> None:
  with opened(path, **policy) as saver:
    for step in steps:
      saver.save(step, make_state(step), {"step": step})


def latest(path, shape=(8,), width=8):
  with opened(path) as saver:
    return saver.restore_latest(abstract(make_state(0, width, shape)))


def entries(path) -> list[str]:
  return sorted(os.listdir(path))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  """A directory with steps 1 and 2; tests copy it."""
  path = tmp_path_factory.mktemp("pristine") / "checkpoints"
  save_steps(path, 1, 2)
  return path


@pytest.fixture
def saved(pristine, tmp_path):
  return pathlib.Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def test_round_trip_names_and_meta(saved):
  state, meta = latest(saved)
  assert_equal(state, host(make_state(2)))
  assert meta == {"step": 2} == checkpoint.read_meta(saved)
  assert checkpoint.read_meta(saved, step=1) == {"step": 1}
  leaves = checkpoint.read_manifest(saved / "2")["leaves"]
  assert leaves["model/layers/1/kernel"] == ["float32", [8, 8]]
  assert leaves["opt_state/0/mu/embed"] == ["float32", [16, 8]]


@pytest.mark.faults
@pytest.mark.parametrize("shape", [(4, 2), (2,), (1,), (2, 4)])
def test_restores_onto_another_mesh(saved, shape):
  state, _ = latest(saved, shape)
  assert_equal(state, host(make_state(2)))
  wanted = make_state(0, shape=shape).model.embed[...].sharding
  assert state.model.embed[...].sharding == wanted


def test_donated_buffers_are_saved_as_they_were(tmp_path):
  """On CPU, numpy views share the array's memory, which a donated step overwrites."""
  overwrite = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0 + jnp.array(77, x.dtype), s),
    donate_argnums=0,
  )
  with opened(tmp_path / "c", keep_last=9) as saver:
    expected = {}
    for step in range(1, 6):
      state = jax.block_until_ready(make_state(step, width=256))
      expected[step] = host(state)
      saver.save(step, state, {})
      for _ in range(4):
        state = overwrite(state)
      jax.block_until_ready(state)
  target = abstract(make_state(0, width=256))
  for step, leaves in expected.items():
    state, _ = checkpoint.restore_for_inference(tmp_path / "c", target, step)
    assert_equal(state, leaves)


@pytest.mark.faults
def test_every_file_every_damage_is_found(saved, capsys):
  """A flipped bit, a cut or a deletion in each file, including the manifest."""
  path = saved / "2"
  files = sorted(f for f in path.rglob("*") if f.is_file())
  assert len(files) > 8 and path / "MANIFEST.json" in files
  for file in files:
    data = file.read_bytes()
    for position in {0, len(data) // 2, len(data) - 1}:
      flipped = bytearray(data)
      flipped[position] ^= 1
      file.write_bytes(flipped)
      assert checkpoint.find_damage(path), f"bit flip at {position} of {file}"
    for cut in (data[:-1], data[: len(data) // 2], b"", data + b"\n"):
      file.write_bytes(cut)
      damage = checkpoint.find_damage(path)
      assert damage, f"{len(cut)} of {len(data)} bytes of {file}"
      assert "bytes, not" in damage or file.name == "MANIFEST.json"
    file.unlink()
    assert checkpoint.find_damage(path), f"{file} deleted"
    file.write_bytes(data)
    assert checkpoint.find_damage(path) is None


@pytest.mark.faults
def test_falls_back_past_bad_steps_and_saves_them_again(saved, capsys):
  file = max((saved / "2").rglob("*"), key=lambda f: f.stat().st_size)
  data = bytearray(file.read_bytes())
  data[100] ^= 4
  file.write_bytes(data)
  (saved / "3").mkdir()
  shutil.copytree(saved / "1", saved / "4")
  (saved / "5").write_text("a file")
  shutil.copytree(saved / "1", saved / "6")
  (saved / "6" / "MANIFEST.json").unlink()
  (saved / "7.unfinished" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
  (saved / "notes.txt").write_text("not ours")
  with opened(saved) as saver:
    state, meta = saver.restore_latest(abstract(make_state()))
    assert_equal(state, host(make_state(1)))
    assert meta == {"step": 1}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    for step, reason in {
      6: "no MANIFEST.json",
      5: "not a directory",
      4: "is of step 1",
      3: "empty",
      2: "does not match its sha256",
    }.items():
      assert (
        sum(f"{saved / str(step)}: " in line and reason in line for line in said) == 1
      )
    bad = [f"{step}.bad-1" for step in range(2, 7)]
    assert entries(saved) == ["1", *bad, "notes.txt"]
    saver.save(2, make_state(2), {})
    saver.save(3, make_state(3), {})
  assert_equal(latest(saved)[0], host(make_state(3)))


@pytest.mark.faults
def test_never_from_scratch_when_checkpoints_were_lost(saved, capsys):
  for step in ("1", "2"):
    (saved / step / "MANIFEST.json").write_text("{}")
  for _ in range(2):  # the second attempt must not see a directory that looks new
    with pytest.raises(StorageError, match="no checkpoint is whole") as caught:
      latest(saved)
    assert len(str(caught.value).splitlines()) <= 5
    assert entries(saved) == ["1", "2"]
  for step in ("1", "2"):
    (saved / step).rename(saved / f"{step}.bad-1")
  with pytest.raises(StorageError, match="no checkpoint is whole"):
    latest(saved)


def changed(tree, name, **changes):
  """`tree` with the leaf called `name` replaced by another shape or dtype."""
  names = list(trees.named_leaves(tree))
  leaves, treedef = jax.tree.flatten(tree)
  old = leaves[names.index(name)]
  new = {"shape": old.shape, "dtype": old.dtype, "sharding": old.sharding} | changes
  leaves[names.index(name)] = jax.ShapeDtypeStruct(**new)
  return jax.tree.unflatten(treedef, leaves)


@pytest.mark.faults
def test_mismatches_are_refused_by_name(saved):
  good = {"state": abstract(make_state())}
  save_state = {"state": make_state(), "extra": {"ema": jnp.ones(3)}}
  path = saved.parent / "mismatch"
  with opened(path) as saver:
    saver.save(1, save_state, {})

  def message(target) -> str:
    with opened(path) as saver, pytest.raises(ConfigError) as caught:
      saver.restore_latest(target)
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)

  full = abstract(save_state)
  assert "no extra/ema" in message(good)
  assert "no more" in message(full | {"more": full["extra"]["ema"]})
  embed = "state/model/embed"
  text = message(changed(full, embed, shape=(16, 16)))
  assert "embed float32[16, 8]" in text and "embed float32[16, 16]" in text
  text = message(changed(full, embed, dtype=jnp.bfloat16))
  assert "embed float32[16, 8]" in text and "embed bfloat16[16, 8]" in text
  assert "17 in all" in message({"extra": full["extra"]})
  assert entries(path) == ["1"]  # an error in the config damages nothing


def test_partial_restore_reads_only_what_is_named(saved):
  target = abstract(make_state(0, shape=(2,)))
  part, meta = checkpoint.restore_for_inference(saved, {"model": target.model})
  assert meta == {"step": 2}
  assert isinstance(part["model"], Model)
  assert_equal(part["model"], host(make_state(2).model))
  plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target.model)
  part, _ = checkpoint.restore_for_inference(saved, {"model": plain}, step=1)
  assert_equal(part["model"], host(make_state(1).model))
  with pytest.raises(ConfigError, match="no ema/embed"):
    checkpoint.restore_for_inference(saved, {"ema": target.model})


def test_inference_reads_past_damage_but_moves_nothing(saved, capsys):
  (saved / "2" / "MANIFEST.json").unlink()
  target = {"model": abstract(make_state()).model}
  _, meta = checkpoint.restore_for_inference(saved, target)
  assert meta == {"step": 1} == checkpoint.read_meta(saved)
  assert "no MANIFEST.json" in capsys.readouterr().err
  assert entries(saved) == ["1", "2"]
  with pytest.raises(StorageError, match="checkpoint 2"):
    checkpoint.restore_for_inference(saved, target, step=2)
  with pytest.raises(MissingInputError, match="step 7"):
    checkpoint.restore_for_inference(saved, target, step=7)
  with pytest.raises(MissingInputError, match="no checkpoint"):
    checkpoint.read_meta(saved / "elsewhere")


def test_retention(tmp_path):
  path = tmp_path / "c"
  assert latest(path) is None
  save_steps(path, *range(1, 12), keep_last=2, keep_every=5)
  assert entries(path) == ["10", "11", "5"]
  save_steps(path, 12, keep_last=1)
  assert entries(path) == ["12"]


def test_what_a_failed_save_left_is_no_hindrance_to_the_next(tmp_path):
  path = tmp_path / "c"
  with opened(path) as saver:
    saver.save(1, make_state(1), {})
    saver.wait()
    for name in ("2.unfinished", "1.deleted"):  # as of a save that failed just now
      (path / name / "state").mkdir(parents=True)
    saver.save(2, make_state(2), {})
  assert entries(path) == ["1", "2"]
  assert_equal(latest(path)[0], host(make_state(2)))


def test_a_step_that_was_restored_or_saved_is_not_saved_again(saved):
  with opened(saved) as saver:
    saver.restore_latest(abstract(make_state()))
    before = (saved / "2" / "MANIFEST.json").stat().st_mtime_ns
    saver.save(2, make_state(2), {})
    saver.save(3, make_state(3), {})
    saver.save(3, make_state(3), {})
  assert (saved / "2" / "MANIFEST.json").stat().st_mtime_ns == before
  with opened(saved) as saver, pytest.raises(StorageError, match="exists"):
    saver.save(3, make_state(4), {})


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # by Orbax
def test_background_errors_surface_at_the_next_poll(tmp_path):
  path = tmp_path / "c"
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  saver = opened(path)
  try:
    saver.save(1, make_state(1), {})
    saver.poll()
    for step in (2, 3):
      saver.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
      saver.save(step, make_state(step, width=512), {})
      with pytest.raises(StorageError, match=f"step {step} failed"):
        for _ in range(500):
          time.sleep(0.02)
          saver.poll()
    saver.save(4, make_state(4, width=512), {})
    with pytest.raises(StorageError, match="step 4 failed"):
      saver.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, previous)
  gc.collect()  # what Orbax left, while its warnings are ignored
  save_steps(path, 5)
  assert entries(path) == ["1", "5"]
  assert_equal(latest(path)[0], host(make_state(5)))


def test_a_lost_peer_is_not_called_a_storage_error(tmp_path, monkeypatch):
  """Orbax meets the others at barriers: those break when another process has died."""

  def lose_peer(*_, **__):
    broken = jax.errors.JaxRuntimeError("UNAVAILABLE: barrier: a task is gone")
    raise TimeoutError("Timeout waiting at barrier") from broken

  saver = opened(tmp_path / "c")
  with monkeypatch.context() as patch:
    patch.setattr(saver._orbax, "save", lose_peer)
    with pytest.raises(jax.errors.JaxRuntimeError):
      saver.save(1, make_state(1), {})
  with monkeypatch.context() as patch:
    patch.setattr(saver._orbax, "wait_until_finished", lose_peer)
    saver._finish(1, tmp_path / "draft", {})
  with pytest.raises(jax.errors.JaxRuntimeError):
    saver.save(1, make_state(1), {})
  saver.close()


def test_directory_lost_during_the_run(tmp_path):
  path = tmp_path / "c"
  saver = opened(path)
  shutil.rmtree(path)
  path.write_text("a file")
  for step in (2, 3):
    with pytest.raises(StorageError, match=f"step {step}"):
      saver.save(step, make_state(step), {})
  saver.close()
  with pytest.raises(OutputError, match="cannot be written"):
    opened(path)


@pytest.mark.faults
def test_full_disk_is_refused_before_the_save(tmp_path, monkeypatch):
  with opened(tmp_path / "c") as saver:
    saver.save(1, make_state(1), {})
    saver.wait()
    size = sum(x.nbytes for x in jax.tree.leaves(make_state(2)))
    usage = shutil._ntuple_diskusage(10**9, 0, int(1.19 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="not enough disk space"):
      saver.save(2, make_state(2), {})
    usage = shutil._ntuple_diskusage(10**9, 0, int(1.21 * size))
    saver.save(2, make_state(2), {})
  assert entries(tmp_path / "c") == ["1", "2"]


CHILD = """
import dataclasses, os, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from flaxlm.training import checkpoint
{source}
path, phase = sys.argv[1:]
def die(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)
saver = checkpoint.Checkpointer(path, 1, 0, 1)
saver.save(1, make_state(1, 8, (2,)), {{"step": 1}})
saver.wait()
state = jax.block_until_ready(make_state(2, 512, (2,)))
if phase == "commit":
  checkpoint.hash_files = die
elif phase == "rename":
  def rename(old, new):
    return die() if str(new).endswith("/2") else os.replace(old, new)
  checkpoint.rename = rename
elif phase == "delete":
  checkpoint.shutil.rmtree = die
else:
  threading.Timer(float(phase), die).start()
saver.save(2, state, {{"step": 2}})
saver.close()
time.sleep(30)
"""


@pytest.mark.faults
def test_kill_in_the_middle_of_a_save(tmp_path):
  source = "\n".join(
    inspect.getsource(thing) for thing in (Layer, Model, State, make_state)
  )
  code = CHILD.format(source=source)
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  phases = ["0.0", "0.1", "commit", "rename", "delete"]
  children = {
    phase: subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path / phase), phase], env=environment
    )
    for phase in phases
  }
  for phase, child in children.items():
    assert child.wait(180) == -signal.SIGKILL
    path = tmp_path / phase
    left = entries(path)
    if phase in ("commit", "rename"):
      assert left == ["1", "2.unfinished"]
    if phase == "delete":  # step 2 was published; the old one was being deleted
      assert left == ["1.deleted", "2"]
    newest = max(s for s in left if s.isdigit())
    width = {"1": 8, "2": 512}[newest]
    with opened(path) as saver:
      state, meta = saver.restore_latest(abstract(make_state(0, width)))
      assert_equal(state, host(make_state(int(newest), width)))
      assert meta == {"step": int(newest)}
      saver.save(3, make_state(3), {})
    assert entries(path)[-1] == "3" and not any("." in e for e in entries(path))
    assert_equal(latest(path)[0], host(make_state(3)))


JOB = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from flaxlm.training.checkpoint import Checkpointer
port, index, path = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
def state(step):
  rows = np.arange(64, dtype=np.float32).reshape(8, 8) + step
  return {"w": jax.make_array_from_callback((8, 8), sharding, lambda i: rows[i])}
target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
with Checkpointer(path, 2, 0, 1) as saver:
  assert saver.restore_latest(target) is None
  for step in (1, 2, 3):
    saver.save(step, state(step), {"step": step})
    saver.poll()
from jax.experimental.multihost_utils import sync_global_devices
sync_global_devices("saved")
if index == "0":
  os.remove(os.path.join(path, "3", "MANIFEST.json"))
sync_global_devices("damaged")
with Checkpointer(path, 2, 0, 1) as saver:
  restored, meta = saver.restore_latest(target)
  assert meta == {"step": 2}
  local = [[s.data.tolist() for s in tree["w"].addressable_shards]
           for tree in (restored, state(2))]
  assert local[0] == local[1]
  saver.save(4, state(4), {"step": 4})
"""


def test_two_processes_save_and_agree_on_what_to_restore(tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  path = tmp_path / "c"
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  children = [
    subprocess.Popen(
      [sys.executable, "-c", JOB, port, str(index), str(path)],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = [child.communicate(timeout=60)[1] for child in children]
  assert [child.returncode for child in children] == [0, 0], said
  assert "/c/3: unfinished" in said[0] and "/c/3: " not in said[1]
  assert entries(path) == ["2", "3.bad-1", "4"]
  target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
  state, meta = checkpoint.restore_for_inference(path, target)
  assert meta == {"step": 4}
  assert np.array_equal(state["w"], np.arange(64).reshape(8, 8) + 4)


@pytest.mark.faults
@pytest.mark.slow
def test_memory_does_not_grow_with_saves(tmp_path):
  state, process = make_state(1, shape=(1,)), psutil.Process()
  with opened(tmp_path / "c", keep_last=1) as saver:
    for step in range(70):
      if step == 20:
        saver.wait()
        before = process.memory_info().rss
      saver.save(step, state, {})
    saver.wait()
  growth = (process.memory_info().rss - before) / 50 / 1e6
  assert growth < 1, f"{growth:.2f} MB a save"


def test_meta_that_is_not_json_fails_in_the_caller(tmp_path):
  with opened(tmp_path / "c") as saver, pytest.raises(TypeError):
    saver.save(1, make_state(1), {"config": object()})
  assert entries(tmp_path / "c") == []


def test_a_weight_may_be_called_value(tmp_path):
  class Attention(nnx.Module):
    def __init__(self):
      self.key, self.value = nnx.Param(jnp.ones(3)), nnx.Param(jnp.arange(3.0))

  state = {"model": Attention()}
  assert set(trees.named_leaves(state)) == {"model/key", "model/value"}
  with Checkpointer(tmp_path, keep_last=1, keep_every=0, every=1) as checkpoints:
    checkpoints.save(1, state, {})
  target = jax.eval_shape(lambda: state)
  restored, _ = checkpoint.restore_for_inference(tmp_path, target)
  np.testing.assert_array_equal(restored["model"].value[...], np.arange(3.0))


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # by Orbax
def test_a_jump_of_the_clock_is_not_called_a_full_disk(tmp_path, monkeypatch):
  """Orbax measures its limits in the time of day: it gives up when that is set."""
  real, jumps = time.time, [0.0]
  saver = opened(tmp_path / "c")
  saver.save(1, make_state(1), {})
  saver.wait()

  def jumping():
    jumps[0] += 3600
    return real() + jumps[0]

  with monkeypatch.context() as patch:
    patch.setattr(time, "time", jumping)
    with pytest.raises(StorageError, match=r"clock jumped by \+") as caught:
      saver.save(2, make_state(2), {})
      saver.wait()
  assert "space" not in str(caught.value)
  saver.save(3, make_state(3), {})
  saver.close()
  gc.collect()  # what Orbax left, while its warnings are ignored
  assert checkpoint.list_steps(tmp_path / "c") == [1, 3]


@pytest.mark.faults
def test_steps_are_in_the_order_of_their_numbers_whatever_the_clock_said(saved):
  for step, seconds in ((1, 4e9), (2, 1e9)):  # the older one is from the future
    for path in (*(saved / str(step)).rglob("*"), saved / str(step)):
      os.utime(path, (seconds, seconds))
  assert checkpoint.list_steps(saved) == [1, 2]
  assert latest(saved)[1] == {"step": 2}
  with opened(saved, keep_last=1) as saver:
    saver.restore_latest(abstract(make_state()))
    saver.save(10, make_state(3), {})
  assert entries(saved) == ["10"]
