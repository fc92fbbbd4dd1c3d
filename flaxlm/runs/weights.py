"""The weights of a run: to evaluate, to decode, or to start another run from.

A run is named by its directory or by one of its checkpoints: `runs/x` means its newest
checkpoint, `runs/x/checkpoints/500` that of step 500.
"""

import os
import pathlib
from collections.abc import Callable

import jax
from flax import nnx

from flaxlm.data.tasks.labels import Labels, same_classes
from flaxlm.errors import ConfigError
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.models.trees import named_leaves
from flaxlm.runs.binding import check_base
from flaxlm.runs.directory import RunFiles, load_run_config, split_address
from flaxlm.tokenizer.files import find_tokenizer
from flaxlm.training import lora
from flaxlm.training.checkpoint import read_meta, restore_for_inference
from flaxlm.training.manifest import list_steps
from flaxlm.training.state import with_shardings

_HEADS = ("head/", "pair_head/")  # may be missing in the other run, or left over


def restore_model(
  workdir: str | os.PathLike,
  config,
  mesh: jax.sharding.Mesh,
  rules: dict,
  step: int | None = None,
) -> tuple[Transformer, dict]:
  """Returns (the weights to evaluate and decode with, meta of their checkpoint).

  These are the averaged weights if config.step.ema_decay is set. Adapters (config.lora)
  are merged into the weights that the run started from.
  """
  trained = abstract = abstract_model(config)
  if config.lora.rank:
    trained = jax.eval_shape(lambda model: lora.init(model, **config.lora), abstract)
  name = "ema" if config.step.ema_decay else "model"
  target = {name: with_shardings(trained, mesh, rules)}
  restored, meta = restore_for_inference(RunFiles(workdir).checkpoints, target, step)
  if not config.lora.rank:
    return restored[name], meta
  base, found = initial_model(config, mesh, rules)
  check_base(config.init_from, meta.get("base"), found)
  return lora.merge(base, restored[name], config.lora.alpha), meta


def assembler(config) -> Callable:
  """Returns (what is trained, frozen weights or None) -> the model."""
  if not config.lora.rank:
    return lambda trained, base: trained
  return lambda trained, base: lora.merge(base, trained, config.lora.alpha)


def tokenizer_path(config) -> pathlib.Path | str:
  """Returns config.tokenizer.path or, if that is "", that of config.init_from."""
  if config.tokenizer.path or not config.init_from:
    return config.tokenizer.path
  return find_tokenizer(split_address(config.init_from)[0]) or ""


def template_path(config) -> str:
  """Returns config.task.chat_template or, if that is "", that of config.init_from."""
  if config.task.chat_template or not config.init_from:
    return config.task.chat_template
  path = RunFiles(split_address(config.init_from)[0]).chat_template
  return str(path) if path.is_file() else ""


def class_labels(config) -> Labels:
  """Returns the classes of config.task: those of config.init_from if it has them.

  A classifier whose scores are taken over keeps the order and names of its classes.
  config.task.labels may give them new names.

  Raises:
    ConfigError: a class of config.task.labels has another number in that model.
  """
  task, model = config.task, config.model
  asked = Labels(task.labels, numbered=task.kind != "choice")
  if task.kind not in ("classify", "tag") or not config.init_from:
    return asked
  workdir, step = split_address(config.init_from)
  files = RunFiles(workdir)
  if not files.config.is_file() and not list_steps(files.checkpoints):
    return asked  # a run that goes on needs it no more; a new one is refused later
  source = load_run_config(workdir)
  names, classes = source.task.labels, source.model.num_labels
  same_head = source.model.head == model.head and classes == model.num_labels
  if not same_head or len(names) != classes:
    return asked
  if task.labels and not same_classes(names, task.labels):
    raise ConfigError(
      "config.task.labels", " ".join(task.labels),
      f"{' '.join(names)}: the order of config.init_from={config.init_from}",
      f"--config.task.labels={','.join(names)}",
    )  # fmt: skip
  if task.labels:
    return asked
  numbered = read_meta(RunFiles(workdir).checkpoints, step).get("labels_numbered", True)
  return Labels(names, numbered=numbered, owner=f"config.init_from={config.init_from}")


def abstract_model(config) -> Transformer:
  """Returns the model of config.model without memory: shapes and types alone."""
  model_config = TransformerConfig(**config.model)
  return jax.eval_shape(lambda: Transformer(model_config, nnx.Rngs(jax.random.key(0))))


def initial_model(
  config, mesh: jax.sharding.Mesh, rules: dict
) -> tuple[Transformer, dict]:
  """Returns (the model with the weights of config.init_from, meta of its checkpoint).

  Weights are matched by name. Heads may differ: new weights are initialised from
  config.seed and named in `meta["new"]`; `meta["left"]` names those not used.

  Raises:
    ConfigError: any other weight is missing, left over, or of another shape.
  """
  workdir, step = split_address(config.init_from)
  source_config = load_run_config(workdir)
  source, meta = restore_model(workdir, source_config, mesh, rules, step)
  found = named_leaves(source)
  if source_config.model.pair_head and config.model.head in ("sequence", "choice"):
    # BERT's pooler, trained on sentence pairs: classifiers start from it.
    for name in [name for name in found if name.startswith("pair_head/dense")]:
      found[name.removeprefix("pair_")] = found.pop(name)
  target = with_shardings(abstract_model(config), mesh, rules)
  wanted = named_leaves(target)
  new = [
    name
    for name, leaf in wanted.items()
    if name not in found or found[name].shape != leaf.shape
  ]
  left = [name for name in found if name not in wanted]
  if bad := [name for name in new + left if not name.startswith(_HEADS)]:
    raise ConfigError(
      "config.init_from",
      f"{config.init_from}, whose weights are not those of config.model: "
      + _describe_differences(bad, wanted, found),
      "the config.model of that run, but for its head",
      f"the values in {RunFiles(workdir).config}",
    )
  fresh = {}
  if new:
    shardings = {name: wanted[name].sharding for name in new}

    def initialise(key):
      leaves = named_leaves(
        Transformer(TransformerConfig(**config.model), nnx.Rngs(key))
      )
      return {name: leaves[name] for name in new}

    fresh = jax.jit(initialise, out_shardings=shardings)(jax.random.key(config.seed))
  leaves = [
    fresh[name] if name in fresh else jax.device_put(found[name], leaf.sharding)
    for name, leaf in wanted.items()
  ]
  model = jax.tree.unflatten(jax.tree.structure(target), leaves)
  return model, meta | {"new": new, "left": left}


def _describe_differences(names: list[str], wanted: dict, found: dict) -> str:
  """Returns the first weights that differ: the shapes needed and those there."""
  shown = []
  for name in names[:3]:
    sides = [
      list(side[name].shape) if name in side else "none" for side in (wanted, found)
    ]
    shown.append(f"{name} {sides[0]} (there: {sides[1]})")
  return ", ".join(shown) + (f", ... {len(names)} in all" if len(names) > 3 else "")
