"""The state that a run begins with: its newest checkpoint, or weights for step 0.

Weights for step 0 are those of config.init_from, or random.
"""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.config.load import config_to_json
from flaxlm.config.tree import flatten
from flaxlm.data.feed import Feed
from flaxlm.errors import DataError
from flaxlm.models.transformer import Transformer
from flaxlm.runs.binding import (
  check_base,
  check_resumed,
  name_checkpoint,
  trained_config,
)
from flaxlm.runs.directory import hash_kept
from flaxlm.runs.program import Program
from flaxlm.runs.progress import say
from flaxlm.runs.weights import initial_model
from flaxlm.training import lora
from flaxlm.training.checkpoint import Checkpointer
from flaxlm.training.state import TrainState, shardings_of


class Start(NamedTuple):
  """Where a run begins or goes on, and what its checkpoints say of it."""

  state: TrainState
  base: Transformer | None  # frozen weights that config.lora adapts
  base_name: str | None  # of the checkpoint that these come from
  step: int  # finished steps
  rows: int  # of the training data that were read
  files: (
    dict | None
  )  # what `hash_kept` returned when the run began; None: not yet known

  def with_files(self, workdir) -> "Start":
    """Returns this with the hashes of the run's files, which are all there by now."""
    return self if self.files is not None else self._replace(files=hash_kept(workdir))

  def rows_after(self, step: int, batch_size: int) -> int:
    """Returns how many rows were read when `step` steps are finished."""
    return self.rows + (step - self.step) * batch_size


def initial_state(
  config, mesh: jax.sharding.Mesh, program: Program, feed: Feed, checkpoints
) -> Start:
  """Returns the newest checkpoint, or weights for step 0.

  Raises:
    DataError: the checkpoints, or config.init_from, belong to other data or to another
      tokenizer.
    ConfigError, StorageError: see `Checkpointer.restore_latest`, `initial_model`.
  """
  restored = restore(checkpoints, program.target, feed, config)
  fresh, adapting = restored is None, config.lora.rank > 0
  if fresh:
    start = Start(program.init(jax.random.key(config.seed)), None, None, 0, 0, None)
  else:
    state, before = restored
    base, step, files = before.get("base"), before["step"], before.get("files")
    start = Start(state, None, base, step, rows_read(before), files)
  if not config.init_from or not (fresh or adapting):
    return start
  model, meta = initial_model(config, mesh, config.mesh.rules.to_dict())
  _check_tokenizer(meta["tokenizer_sha256"], feed, config.init_from)
  if not fresh:
    check_base(config.init_from, start.base_name, meta)
    return start._replace(base=model)
  if meta["new"]:
    say(f"initialised, not in {config.init_from}: {' '.join(meta['new'])}")
  if meta["left"]:
    say(f"not needed from {config.init_from}: {' '.join(meta['left'])}")
  if adapting:
    start = start._replace(base=model, base_name=name_checkpoint(meta))
    adapt = functools.partial(lora.init, **config.lora, seed=config.seed)
    model = jax.jit(adapt, out_shardings=shardings_of(program.target.model))(model)
  ema = None if start.state.ema is None else jax.tree.map(jnp.copy, model)
  return start._replace(state=dataclasses.replace(start.state, model=model, ema=ema))


def rows_read(meta: dict) -> int:
  """Returns how many rows of its data a run has read at a checkpoint, from its `meta`.

  Older versions counted steps alone, and read the rows that follow from those.
  """
  if "rows" in meta:
    return meta["rows"]
  return meta["step"] * meta["config"]["data"]["batch_size"]


def describe_checkpoint(config, feed: Feed, start: Start, step: int) -> dict:
  """Returns the `meta` of a checkpoint of the run that began with `start`."""
  rows = start.rows_after(step, config.data.batch_size)
  meta = {
    "step": step,
    "rows": rows,
    "tokens": rows * config.data.seq_len,
    "data_fingerprint": feed.fingerprint,
    "tokenizer_sha256": feed.tokenizer_sha256,
    "files": start.files,
    "config": json.loads(config_to_json(config)),
  }
  if feed.examples:
    meta["labels_numbered"] = feed.examples.numbered
  return meta | ({"base": start.base_name} if start.base_name else {})


def restore(
  checkpoints: Checkpointer, target: TrainState, feed: Feed, config
) -> tuple[TrainState, dict] | None:
  """Returns the newest valid state and its `meta`, or None for a new run.

  Prints the knobs that have changed since it was saved.

  Raises:
    DataError: the run was trained on other data.
    ConfigError: knobs differ that must stay as they were.
  """
  restored = checkpoints.restore_latest(target)
  if restored is None:
    return None
  state, meta = restored
  if meta["data_fingerprint"] != feed.fingerprint:
    raise DataError(
      "the run was started with other data",
      f"{config.data.store}, fingerprint {feed.fingerprint[:12]}",
      f"fingerprint {meta['data_fingerprint'][:12]}, as in its checkpoints",
      "the config.data.store of that run, or another --workdir",
    )
  trained = trained_config(meta)
  check_resumed(config, trained, meta["step"])
  before = flatten(trained)
  for key, value in flatten(config).items():
    if key in before and value != before[key]:
      say(f"changed since step {meta['step']}: config.{key} {before[key]} -> {value}")
  return state, meta


def _check_tokenizer(needed: str, feed: Feed, init_from: str) -> None:
  """Raises DataError if both have a tokenizer, and not the same one.

  Random tokens and models imported without a tokenizer go with any.
  """
  given = feed.tokenizer_sha256
  if given and needed and given != needed:
    raise DataError(
      "the data was made with another tokenizer than the model's",
      given[:12],
      f"{needed[:12]}, of {init_from}",
      f"--config.tokenizer.path={init_from} when you prepare the data",
    )
