"""Opens a model where it lies: a run, a checkpoint, or a Hugging Face directory.

This is above `interop`, because it reads both kinds of directories. What a model can be
asked is below it, in inference/language_model.py: evaluations and audits are handed a
`LanguageModel` and never open one.
"""

import json
import os
import pathlib
import sys

from flaxlm import machine
from flaxlm.errors import ConfigError, MissingInputError
from flaxlm.runs.directory import RunFiles, load_run_config, split_address


def load_model(
  path: str | os.PathLike,
  step: int | None = None,
  mesh=None,
  overrides: list[str] = (),
):
  """Returns the `LanguageModel` at `path`; see `flaxlm.load` for the arguments.

  Args:
    overrides: `key=value` texts for the config of a run.
  Raises:
    MissingInputError: there is no model.
    ConfigError: `step` or `overrides` where there are no checkpoints.
  """
  workdir, at_step = split_address(os.fspath(path))
  if step is not None and at_step is not None and step != at_step:
    raise ConfigError("step", step, f"{at_step}, or the directory of the run")
  kind = _kind_of(workdir)
  if "jax" not in sys.modules:
    machine.choose_platform()
  if kind == "run":
    return _load_run(workdir, at_step if step is None else step, mesh, overrides)
  if step is not None or overrides:
    given = f"step={step}" if step is not None else " ".join(overrides)
    needed = f"nothing: {workdir} is a Hugging Face model, without steps or knobs"
    raise ConfigError("an argument", given, needed, "flaxlm convert import makes a run")
  return _load_hugging_face(workdir, mesh)


def _kind_of(directory: pathlib.Path) -> str:
  """Returns "run" or "hugging face", from the config.json of a directory."""
  config = RunFiles(directory).config
  try:
    tree = json.loads(config.read_bytes())
  except (OSError, ValueError) as error:
    raise MissingInputError(
      f"{directory} holds no model",
      f"{config.absolute()}: {getattr(error, 'strerror', None) or error}",
      "a run (runs/a), one of its checkpoints (runs/a/checkpoints/500), or a "
      "directory with a Hugging Face model",
    ) from error
  is_theirs = isinstance(tree, dict) and "model_type" in tree
  return "hugging face" if is_theirs else "run"


def _load_run(workdir: pathlib.Path, step: int | None, mesh, overrides: list[str]):
  config = load_run_config(workdir, overrides)
  from flaxlm.inference.language_model import LanguageModel
  from flaxlm.parallel.mesh import one_device
  from flaxlm.runs.weights import restore_model
  from flaxlm.tokenizer.chat_template import ChatTemplate
  from flaxlm.tokenizer.files import find_tokenizer, open_tokenizer

  mesh, rules = mesh or one_device(), config.mesh.rules.to_dict()
  model, meta = restore_model(workdir, config, mesh, rules, step)
  file = find_tokenizer(workdir)
  tokenizer = open_tokenizer(file.read_bytes()) if file else None
  own = RunFiles(workdir).chat_template
  source = own.read_text("utf-8") if own.is_file() else ""
  source = source or (tokenizer.chat_template if tokenizer else "")
  return LanguageModel(
    model,
    tokenizer,
    mesh,
    rules,
    template=ChatTemplate(source) if source else None,
    labels=tuple(config.task.labels),
    step=meta["step"],
  )


def _load_hugging_face(directory: pathlib.Path, mesh):
  import jax

  from flaxlm.config import base
  from flaxlm.inference.language_model import LanguageModel
  from flaxlm.interop.huggingface import make_model, read_model
  from flaxlm.interop.import_run import (
    find_chat_template,
    label_names,
    read_tokenizer,
    to_jax,
  )
  from flaxlm.parallel.mesh import one_device
  from flaxlm.tokenizer.chat_template import ChatTemplate
  from flaxlm.training.state import shardings_of, with_shardings

  mesh, rules = mesh or one_device(), base.get_config().mesh.rules.to_dict()
  tokenizer, found = read_tokenizer(directory), read_model(directory)
  model = make_model(found.fields, to_jax(found.leaves))
  target = with_shardings(jax.eval_shape(lambda: model), mesh, rules)
  model = jax.device_put(model, shardings_of(target))
  source = tokenizer.chat_template if tokenizer else ""
  source = source or find_chat_template(directory)
  return LanguageModel(
    model,
    tokenizer,
    mesh,
    rules,
    template=ChatTemplate(source) if source else None,
    labels=label_names(found),
  )
