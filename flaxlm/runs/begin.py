"""The state that a run begins with: its newest checkpoint, or weights for step 0.

Weights for step 0 are those of config.init_from, or random.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp

from flaxlm.config.load import config_from_json
from flaxlm.config.tree import flatten
from flaxlm.data.feed import Feed
from flaxlm.errors import DataError
from flaxlm.models.transformer import Transformer
from flaxlm.runs.program import Program
from flaxlm.runs.progress import say
from flaxlm.runs.weights import initial_model
from flaxlm.training import lora
from flaxlm.training.checkpoint import Checkpointer
from flaxlm.training.state import TrainState, shardings_of


def initial_state(
  config, mesh: jax.sharding.Mesh, program: Program, feed: Feed, checkpoints
) -> tuple[TrainState, Transformer | None]:
  """Returns (state, frozen weights that config.lora adapts, or None).

  Raises:
    DataError: the checkpoints, or config.init_from, belong to other data or to another
      tokenizer.
    ConfigError, StorageError: see `Checkpointer.restore_latest`, `initial_model`.
  """
  state = restore(checkpoints, program.target, feed, config)
  fresh, adapting = state is None, config.lora.rank > 0
  if fresh:
    state = program.init(jax.random.key(config.seed))
  if not config.init_from or not (fresh or adapting):
    return state, None
  model, meta = initial_model(config, mesh, config.mesh.rules.to_dict())
  _check_tokenizer(meta["tokenizer_sha256"], feed, config.init_from)
  base = model if adapting else None
  if not fresh:
    return state, base
  if meta["new"]:
    say(f"initialised, not in {config.init_from}: {' '.join(meta['new'])}")
  if meta["left"]:
    say(f"not needed from {config.init_from}: {' '.join(meta['left'])}")
  if adapting:
    adapt = functools.partial(lora.init, **config.lora, seed=config.seed)
    model = jax.jit(adapt, out_shardings=shardings_of(program.target.model))(base)
  ema = None if state.ema is None else jax.tree.map(jnp.copy, model)
  return dataclasses.replace(state, model=model, ema=ema), base


def restore(
  checkpoints: Checkpointer, target: TrainState, feed: Feed, config
) -> TrainState | None:
  """Returns the newest valid state, or None for a new run.

  Prints the knobs that have changed since it was saved.

  Raises:
    DataError: the run was trained on other data.
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
  before = flatten(config_from_json(json.dumps(meta["config"])))
  for key, value in flatten(config).items():
    if key in before and value != before[key]:
      say(f"changed since step {meta['step']}: config.{key} {before[key]} -> {value}")
  return state


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
