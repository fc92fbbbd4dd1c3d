"""Reads the arrays of a checkpoint one at a time, without holding the whole model."""

import collections.abc
import pathlib

from flaxlm.errors import ConfigError


class StoredLeaves(collections.abc.Mapping):
  """The weights of a checkpoint by path; each is read from disk when it is asked for.

  The checkpoint is verified once, when this is made.
  """

  def __init__(self, directory: pathlib.Path, name: str, step: int | None):
    from flaxlm.training.checkpoint import choose_step, read_meta
    from flaxlm.training.manifest import read_manifest

    read_meta(directory, step)  # says it well if there is none
    step = choose_step(directory.absolute(), move_aside=False, only=step)
    self.directory, self.name = directory.absolute() / str(step), name
    manifest = read_manifest(self.directory)
    self.meta = manifest["meta"]
    self.shapes = {
      path.removeprefix(f"{name}/"): shape
      for path, (_, shape) in manifest["leaves"].items()
      if path.startswith(f"{name}/")
    }

  def __iter__(self):
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)

  def __getitem__(self, path: str):
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from flaxlm.models.trees import named_leaves, nest

    if path not in self.shapes:
      raise ConfigError(
        f"the checkpoint {self.directory}", f"no {self.name}/{path}",
        "the weights of its config.json",
      )  # fmt: skip
    name, shape = f"{self.name}/{path}", tuple(self.shapes[path])
    restore = ocp.args.PyTreeRestore(
      item=nest({name: jax.ShapeDtypeStruct(shape, np.float32)}),
      restore_args=nest({name: ocp.RestoreArgs(restore_type=np.ndarray)}),
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      return named_leaves(orbax.restore(self.directory / "state", args=restore))[name]
