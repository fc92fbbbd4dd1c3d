"""Saves and restores the state of a run: Orbax's async writer, under our own manifest.

Why a manifest: Orbax does not notice a flipped bit in an array. Here every file has a
sha256, the manifest has one of itself, and a checkpoint that does not match is not
used.

    <workdir>/checkpoints/500/state/...      Orbax's files; leaves have readable names
    <workdir>/checkpoints/500/MANIFEST.json  see manifest.py; holds `meta` too
    <workdir>/checkpoints/500.unfinished/    a save that is running, or was killed
    <workdir>/checkpoints/400.bad-1/         failed verification; moved, never deleted

Everything is written under `.unfinished` and published by one rename, after the
manifest is on disk. So a directory with a bare number is complete, or was damaged
later. Which steps exist is read from disk each time: an index could be wrong.
"""

import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from typing import Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flaxlm.errors import ConfigError, MissingInputError, StorageError, UserError
from flaxlm.files import rename, writing
from flaxlm.models.trees import PyTree, named_leaves, nest
from flaxlm.training.manifest import (
  CHECKPOINT_FORMAT,
  find_damage,
  hash_files,
  list_steps,
  read_manifest,
  write_manifest,
)

_NOTHING, _ALL_BAD = -1, -2  # what process 0 broadcasts if there is no step to restore


@functools.cache  # once per process
def _silence_echoes() -> None:
  """Reduces a failed write to one message.

  Orbax raises an error, which we report. It also logs it, and each task that it
  abandons prints a traceback of its own: hundreds of them when a disk is full.
  """
  logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
  logging.getLogger("asyncio").addFilter(lambda r: "/orbax/" not in r.getMessage())
  inner = sys.unraisablehook

  def hook(unraisable) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      inner(unraisable)

  sys.unraisablehook = hook


class Checkpointer:
  """Saves in the background, deletes old checkpoints, restores the newest whole one.

  Every process of a job calls every method. Process 0 verifies, publishes and deletes.
  The caller holds the lock of the directory (`runs.directory.RunLock`).
  """

  def __init__(self, directory, keep_last: int, keep_every: int, every: int):
    """Opens `directory`, and deletes what killed saves left there.

    Args:
      keep_last: newest checkpoints to keep.
      keep_every: steps; checkpoints at multiples of it are never deleted; 0 = none.
      every: steps between two saves.
    Raises:
      OutputError, StorageError: it cannot be written.
    """
    _silence_echoes()
    self.directory = pathlib.Path(directory).absolute()
    self.keep_last, self.keep_every, self.every = keep_last, keep_every, every
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None  # of the save in the background
    self._newest = -1  # the step that was last saved or restored
    self._began = 0.0  # of the last save: how far the clock was from a monotonic one
    # Weights hardly compress (6%), and the compressor keeps a second copy in memory.
    self._orbax = ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(use_compression=False)
    )
    if jax.process_index() == 0:
      with writing(self.directory):
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.directory)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if error is None or isinstance(error, UserError):
      self.close()
      return
    # After a failure of another process the save may never end: wait a minute only.
    if self._thread is not None:
      self._thread.join(60 if jax.process_count() > 1 else None)
    if self._error is not None:
      print(f"flaxlm: also: {self._error}", file=sys.stderr)

  def is_due(self, step: int) -> bool:
    """Says whether the state after `step` is to be saved."""
    return step % self.every == 0

  def save(self, step: int, state: PyTree, meta: dict) -> None:
    """Copies `state` to the host, then writes it in the background.

    Waits for an earlier save first. The caller may donate `state` as soon as this
    returns. A step that was just restored or saved is not saved again.

    Args:
      step: the number of finished steps, which names the directory.
      state: a pytree of `jax.Array`s; in a job of many processes, global ones.
      meta: a JSON object, stored in the manifest.
    Raises:
      StorageError: this or the previous save failed.
      jax.errors.JaxRuntimeError: another process is gone, or a device failed.
    """
    self.wait()
    if step == self._newest:
      return
    leaves = named_leaves(state)
    assert all(isinstance(x, jax.Array) for x in leaves.values())
    tree = nest(leaves)
    manifest = {
      "format": CHECKPOINT_FORMAT,
      "step": step,
      "meta": json.loads(json.dumps(meta, allow_nan=False)),
      "leaves": {name: [str(x.dtype), list(x.shape)] for name, x in leaves.items()},
    }
    draft = self.directory / f"{step}.unfinished"
    self._began = time.time() - time.monotonic()
    try:
      if jax.process_index() == 0:
        if (self.directory / str(step)).exists():
          raise FileExistsError(
            f"{self.directory / str(step)} exists, from another run"
          )
        _remove_leftovers(self.directory)
        _check_space(self.directory, sum(x.nbytes for x in leaves.values()))
        draft.mkdir()
      self._orbax.save(draft / "state", args=ocp.args.PyTreeSave(tree))
    except StorageError:
      raise
    except Exception as error:
      what = f"the checkpoint of step {step} cannot be saved"
      raise _explain(what, error, self._began) from error
    self._newest = step
    self._thread = threading.Thread(
      target=self._finish, args=(step, draft, manifest), name="checkpoint"
    )
    self._thread.start()

  def _finish(self, step: int, draft: pathlib.Path, manifest: dict) -> None:
    """Waits for Orbax, hashes, publishes, deletes old checkpoints; in a thread."""
    try:
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        manifest["files"] = hash_files(draft / "state", sync=True)
        write_manifest(draft, manifest)
        rename(draft, self.directory / str(step))
        self._delete_old(step)
    except BaseException as error:
      self._newest = -1
      what = f"saving the checkpoint of step {step} failed"
      self._error = _explain(what, error, self._began)

  def _delete_old(self, newest: int) -> None:
    steps = list_steps(self.directory)
    keep = {newest, *steps[-self.keep_last :]}
    if self.keep_every:
      keep |= {step for step in steps if step % self.keep_every == 0}
    for step in set(steps) - keep:
      # Renamed first: if the deletion is killed, the rest is no checkpoint.
      doomed = self.directory / f"{step}.deleted"
      os.rename(self.directory / str(step), doomed)
      shutil.rmtree(doomed)

  def poll(self) -> bool:
    """Returns whether a save in the background has just ended; costs nothing.

    Raises:
      StorageError: it failed.
    """
    ended = self._thread is not None and not self._thread.is_alive()
    if ended:
      self.wait()
    return ended

  def wait(self) -> None:
    """Waits for the save in the background. Raises StorageError if it failed."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def close(self) -> None:
    """Waits for the last save. Raises StorageError if it failed."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def restore_latest(self, target: PyTree) -> tuple[PyTree, dict] | None:
    """Restores the newest whole checkpoint, on the shardings of `target`.

    Damaged ones are named on stderr and moved aside, so that their steps can be saved
    again.

    Args:
      target: `jax.ShapeDtypeStruct`s with shardings, in the structure of the saved
        state.
    Returns:
      (state, meta), or None if there never was a checkpoint.
    Raises:
      StorageError: there are checkpoints, but none is whole.
      ConfigError: names, shapes or dtypes differ from those of `target`.
    """
    self.wait()
    step = choose_step(self.directory, move_aside=True)
    if step is None:
      return None
    manifest = read_manifest(self.directory / str(step))
    state = _restore(self.directory / str(step), manifest, target, partial=False)
    self._newest = step
    return state, manifest["meta"]


def restore_for_inference(
  directory: str | os.PathLike, target: PyTree, step: int | None = None
) -> tuple[PyTree, dict]:
  """Restores the part of a checkpoint that `target` names, such as {"model": ...}.

  Changes nothing on disk, so it may run while training writes there.

  Args:
    directory: the `checkpoints` directory of a run.
    target: `jax.ShapeDtypeStruct`s; those without a sharding go to the first local
      device.
    step: which checkpoint; None takes the newest whole one.
  Returns:
    (tree like `target`, meta)
  Raises:
    MissingInputError: there is no such checkpoint.
    StorageError, ConfigError: as for `Checkpointer.restore_latest`.
  """
  directory = pathlib.Path(directory).absolute()
  step = _require(directory, step)
  manifest = read_manifest(directory / str(step))
  tree = _restore(directory / str(step), manifest, target, partial=True)
  return tree, manifest["meta"]


def read_meta(directory: str | os.PathLike, step: int | None = None) -> dict:
  """Returns the `meta` of a checkpoint, by default the newest that has one.

  Reads no arrays, so it can be called before a model is built. Raises as
  `restore_for_inference` does.
  """
  directory = pathlib.Path(directory).absolute()
  for candidate in [step] if step is not None else list_steps(directory)[::-1]:
    try:
      return read_manifest(directory / str(candidate))["meta"]
    except (OSError, ValueError):
      continue
  _require(directory, step)
  raise StorageError(f"{directory} changed while it was read")


def _require(directory: pathlib.Path, step: int | None) -> int:
  """Returns the step to read; raises MissingInputError if there is none."""
  steps = list_steps(directory)
  if not steps or step not in (None, *steps):
    has = " ".join(map(str, steps[-8:])) or "no checkpoint"
    raise MissingInputError(
      f"no checkpoint {'' if step is None else f'of step {step} '}to read",
      f"{directory} ({has})",
      "a directory in which `python -m flaxlm.train` has saved",
    )
  return choose_step(directory, move_aside=False, only=step)


def choose_step(
  directory: pathlib.Path, move_aside: bool, only: int | None = None
) -> int | None:
  """Returns the newest step that verifies, the same on all processes.

  Args:
    move_aside: renames the damaged checkpoints that are newer.
    only: the step to verify instead of the newest.
  Returns:
    The step; None if there never was a checkpoint.
  Raises:
    StorageError: there are checkpoints, but none is whole.
  """
  step = _NOTHING
  if jax.process_index() == 0:
    step = _choose_alone(directory, move_aside, only)
  if jax.process_count() > 1:
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
  if step == _ALL_BAD:
    raise StorageError(
      "no checkpoint is whole" if only is None else f"checkpoint {only} is damaged",
      f"{directory} (the damage of each is named above)",
      "one that matches its MANIFEST.json; nothing was deleted",
      "a backup of it, another step, or a new --workdir to start over",
    )
  return None if step == _NOTHING else step


def _choose_alone(directory: pathlib.Path, move_aside: bool, only: int | None) -> int:
  if not directory.is_dir():
    return _NOTHING
  bad = []
  for step in [only] if only is not None else list_steps(directory)[::-1]:
    reason = find_damage(directory / str(step))
    if reason is None:
      # Only now that there is a whole one: otherwise all stay where they are.
      for other in bad if move_aside else []:
        _move_aside(directory / str(other))
      return step
    print(
      f"flaxlm: warning: skipping {directory / str(step)}: {reason}", file=sys.stderr
    )
    bad.append(step)
  # A run that once had checkpoints must not silently start over.
  moved = any(re.fullmatch(r"\d+\.bad-\d+", p.name) for p in directory.iterdir())
  return _ALL_BAD if bad or moved else _NOTHING


def _move_aside(path: pathlib.Path) -> None:
  number = 1
  while path.with_name(f"{path.name}.bad-{number}").exists():
    number += 1
  os.rename(path, path.with_name(f"{path.name}.bad-{number}"))


def _remove_leftovers(directory: pathlib.Path) -> None:
  """Deletes what a killed save or deletion left behind; nothing else has its name."""
  for path in directory.iterdir():
    if not re.fullmatch(r"\d+\.(unfinished|deleted)", path.name):
      continue
    for patience in (0.1, 0.5, 2):
      try:
        shutil.rmtree(path)
        break
      except OSError:  # writers of a failed save may still be adding files
        time.sleep(patience)
    else:
      shutil.rmtree(path)


def _check_space(directory: pathlib.Path, state_bytes: int) -> None:
  """Raises StorageError unless 1.2 times the size of the state is free."""
  free, needed = shutil.disk_usage(directory).free, int(1.2 * state_bytes)
  if free < needed:
    raise StorageError(
      "not enough disk space for a checkpoint",
      f"{free / 1e9:.3f} GB free at {directory}",
      f"{needed / 1e9:.3f} GB, 1.2 x the state",
      "a lower --config.checkpoint.keep_last, or free some space",
    )


def _restore(
  path: pathlib.Path, manifest: dict, target: PyTree, partial: bool
) -> PyTree:
  _silence_echoes()
  leaves = named_leaves(target)
  _check_leaves(path, manifest["leaves"], leaves, partial)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  arguments = {
    name: ocp.ArrayRestoreArgs(
      sharding=leaf.sharding or here, global_shape=leaf.shape, dtype=leaf.dtype
    )
    for name, leaf in leaves.items()
  }
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      tree = orbax.restore(
        path / "state",
        args=ocp.args.PyTreeRestore(
          item=nest(leaves), restore_args=nest(arguments), partial_restore=partial
        ),
      )
  except Exception as error:
    raise _storage_error(f"{path} cannot be read", error) from error
  restored = named_leaves(tree)
  treedef = jax.tree.structure(target)
  return jax.tree.unflatten(treedef, [restored[name] for name in leaves])


def _check_leaves(
  path: pathlib.Path, stored: dict, leaves: dict, partial: bool
) -> None:
  """Raises ConfigError with the first differences between a checkpoint and `leaves`.

  Orbax would find most of them too, but it silently casts to another dtype.
  """
  needed = {name: [str(x.dtype), list(x.shape)] for name, x in leaves.items()}
  names = [n for n in needed if needed[n] != stored.get(n)]
  if not partial:
    names += [n for n in stored if n not in needed]
  if not names:
    return

  def describe(side: dict) -> str:
    shown = [
      f"{n} {side[n][0]}{side[n][1]}" if n in side else f"no {n}" for n in names[:3]
    ]
    return ", ".join(shown) + (f", ... {len(names)} in all" if len(names) > 3 else "")

  raise ConfigError(
    f"the checkpoint {path}",
    describe(stored),
    describe(needed),
    "the config it was saved with (config.json beside it), or a new --workdir",
  )


def _explain(what: str, error: BaseException, began: float) -> Exception:
  """Returns the error to raise: of a lost process or device, else of the storage.

  Orbax's processes meet at barriers, and it reports a broken barrier as a timeout. It
  also takes the time of day for its limits, so that a clock that is set forward looks
  like a storage that does not answer.

  Args:
    began: what the time of day was ahead of a monotonic clock when the save began.
  """
  cause: BaseException | None = error
  is_timeout = False
  while cause is not None:
    if isinstance(cause, jax.errors.JaxRuntimeError):
      return cause
    is_timeout |= isinstance(cause, TimeoutError)
    cause = cause.__cause__
  jump = time.time() - time.monotonic() - began
  if is_timeout and abs(jump) > 1:
    given = f"the machine's clock jumped by {jump:+,.0f} s while it was written"
    return StorageError(what, given, "a steady clock", "the same command again")
  return _storage_error(what, error)


def _storage_error(what: str, error: BaseException) -> StorageError:
  reason = " ".join(str(error).split())
  if len(reason) > 300:  # TensorStore names paths at length; the cause comes last
    reason = f"{reason[:100]} ... {reason[-180:]}"
  return StorageError(
    what,
    f"{type(error).__name__}: {reason}",
    "a directory with space that can be read and written",
    "the same command again, when that is so: it continues the run",
  )
