"""Reads the weights in a checkpoint one at a time, without holding the whole model."""

import collections.abc
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from flaxlm.errors import ConfigError
from flaxlm.models.trees import named_leaves, nest
from flaxlm.training.checkpoint import choose_step, read_meta
from flaxlm.training.manifest import read_manifest


class StoredLeaves(collections.abc.Mapping):
  """The weights of a checkpoint by path; each is read from disk when it is asked for.

  The checkpoint is verified once, at the start.

  Args:
    directory: of all checkpoints of a run.
    name: of the tree in the checkpoint: model or ema.
    step: None is the newest checkpoint.
  """

  def __init__(self, directory: pathlib.Path, name: str, step: int | None):
    read_meta(directory, step)  # raises a clear error if there is no such checkpoint
    step = choose_step(directory.absolute(), move_aside=False, only=step)
    self.directory, self.name = directory.absolute() / str(step), name
    manifest = read_manifest(self.directory)
    self.meta = manifest["meta"]
    self.shapes = {
      path.removeprefix(f"{name}/"): tuple(shape)
      for path, (_, shape) in manifest["leaves"].items()
      if path.startswith(f"{name}/")
    }

  def __iter__(self):
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)

  def __getitem__(self, path: str) -> np.ndarray:
    if path not in self.shapes:
      raise ConfigError(
        f"the checkpoint {self.directory}",
        f"no {self.name}/{path}",
        "the weights of its config.json",
      )
    name, shape = f"{self.name}/{path}", self.shapes[path]
    restore = ocp.args.PyTreeRestore(
      item=nest({name: jax.ShapeDtypeStruct(shape, np.float32)}),
      restore_args=nest({name: ocp.RestoreArgs(restore_type=np.ndarray)}),
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      return named_leaves(orbax.restore(self.directory / "state", args=restore))[name]
