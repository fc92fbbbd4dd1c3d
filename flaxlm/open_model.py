"""Opens a model where it lies: a run, a checkpoint, or a Hugging Face directory.

This is above `interop`, because it reads both kinds of directories. What a model can be
asked is below it, in inference/language_model.py: evaluations and audits are handed a
`LanguageModel` and never open one.
"""

import contextlib
import os
import pathlib
import sys
from typing import NamedTuple

from ml_collections import ConfigDict

from flaxlm import machine
from flaxlm.errors import ConfigError, MissingInputError
from flaxlm.json_files import read_json
from flaxlm.runs.directory import (
  RunFiles,
  find_originals,
  load_run_config,
  split_address,
)
from flaxlm.training.manifest import list_steps


class Found(NamedTuple):
  """A model that has been found, before anything slow is imported."""

  directory: pathlib.Path
  step: int | None
  config: ConfigDict | None  # of a run; None is a Hugging Face model


def find_model(
  path: str | os.PathLike, step: int | None = None, overrides: list[str] = ()
) -> Found:
  """Returns which model is at `path`; see `flaxlm.load` for the arguments.

  Args:
    overrides: `key=value` texts for the config of a run.
  Raises:
    MissingInputError: there is no model.
    ConfigError: `step` or `overrides` do not suit it.
  """
  directory, own_step = split_address(os.fspath(path))
  if step is not None and own_step is not None and step != own_step:
    raise ConfigError("step", step, f"{own_step}, or the directory of the run")
  if not _is_hugging_face(directory):
    config = load_run_config(directory, overrides)
    return Found(directory, own_step if step is None else step, config)
  if step is not None or overrides:
    given = f"step={step}" if step is not None else " ".join(overrides)
    needed = f"nothing: {directory} is a Hugging Face model, without steps or knobs"
    raise ConfigError("an argument", given, needed, "flaxlm convert import makes a run")
  return Found(directory, None, None)


def load_model(
  path: str | os.PathLike,
  step: int | None = None,
  mesh=None,
  overrides: list[str] = (),
):
  """Returns the `LanguageModel` at `path`; see `find_model` and `flaxlm.load`."""
  found = find_model(path, step, overrides)
  if "jax" not in sys.modules:
    machine.choose_platform()
  if found.config is None:
    return _load_hugging_face(found.directory, mesh)
  return _load_run(*found, mesh)


def _is_hugging_face(directory: pathlib.Path) -> bool:
  """Returns whether the config.json of a directory is not that of a run."""
  files = RunFiles(directory)
  config = files.config
  if list_steps(files.checkpoints):  # a run, whatever became of its config.json
    return False
  try:
    return "model_type" in read_json(config)
  except OSError as error:
    raise MissingInputError(
      f"{directory} holds no model",
      f"{config.absolute()}: {error.strerror}",
      "a run (runs/a), one of its checkpoints (runs/a/checkpoints/500), or a "
      "directory with a Hugging Face model",
    ) from error


def _load_run(workdir: pathlib.Path, step: int | None, config: ConfigDict, mesh):
  from flaxlm.inference.language_model import LanguageModel
  from flaxlm.interop.end_of_text import find_end_ids
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
  template = ChatTemplate(source) if source else None
  return LanguageModel(
    model,
    tokenizer,
    mesh,
    rules,
    template=template,
    labels=tuple(config.task.labels),
    step=meta["step"],
    end_ids=find_end_ids(_kept_files(config, workdir), tokenizer, template),
  )


def _kept_files(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path | None:
  """Returns the Hugging Face files of the model that a run began with, if it has any.

  A fine-tuned run has those of the run that it started from, which may be gone.
  """
  with contextlib.suppress(MissingInputError):
    return find_originals(config, workdir)


def _load_hugging_face(directory: pathlib.Path, mesh):
  import jax

  from flaxlm.config import base
  from flaxlm.inference.language_model import LanguageModel
  from flaxlm.interop.end_of_text import find_end_ids
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
  template = ChatTemplate(source) if source else None
  return LanguageModel(
    model,
    tokenizer,
    mesh,
    rules,
    template=template,
    labels=label_names(found),
    end_ids=find_end_ids(directory, tokenizer, template),
  )
