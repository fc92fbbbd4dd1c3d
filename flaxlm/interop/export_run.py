"""Writes a run as a Hugging Face model that transformers loads."""

import json
import os
import pathlib
import shutil

from flaxlm.errors import OutputError
from flaxlm.interop.import_run import TOKENIZER_FILES, read_tokenizer
from flaxlm.runs.directory import RunFiles, load_run_config, split_address
from flaxlm.training.stored_leaves import StoredLeaves

GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_model(config, workdir: pathlib.Path, out: pathlib.Path, args) -> None:
  """Writes a checkpoint of the run in `workdir` as Hugging Face's files to `out`.

  Raises:
    ConfigError: no family of Hugging Face computes what this model does.
    OutputError: `out` holds something.
  """
  from flaxlm.interop.huggingface import write_model

  draft = out.with_name(f"{out.name}.unfinished")
  for path in (out, draft):
    if path.exists() and any(path.iterdir()):
      raise OutputError(
        f"--to={out} cannot be written\n  given:  {path.absolute()}, not empty\n"
        "  needed: a new or empty directory"
      )
  originals = find_originals(config, workdir)
  draft.mkdir(parents=True, exist_ok=True)
  try:
    leaves, meta = read_leaves(config, workdir, args.step)
    tokenizer, files = tokenizer_files(config, workdir, originals)
    like = export_special_ids(tokenizer)
    if originals:
      like = json.loads((originals / "config.json").read_text())
    like |= task_labels(config)
    if args.family:
      like["model_type"] = args.family
    fields = config.model.to_dict()
    hf = write_model(draft, fields, leaves, args.dtype, like)
    saved = originals / "generation_config.json" if originals else None
    if saved and saved.is_file():
      files["generation_config.json"] = saved.read_bytes()
    elif fields["head"] == "lm":
      generation = {key: i for key, i in hf.items() if key in GENERATION_KEYS}
      text = json.dumps(generation | {"_from_model_config": True}, indent=2) + "\n"
      files["generation_config.json"] = text.encode()
    for name, content in files.items():
      (draft / name).write_bytes(content)
    if out.exists():
      out.rmdir()
    os.replace(draft, out)
  except BaseException:
    shutil.rmtree(draft, ignore_errors=True)
    raise
  print(f"exported step {meta['step']} as {hf['architectures'][0]}: {out}")


def find_originals(config, workdir: pathlib.Path) -> pathlib.Path | None:
  """What was kept of the model that this run, or the one it started from, came from."""
  while not (RunFiles(workdir).originals / "config.json").is_file():
    if not config.init_from:
      return None
    workdir = split_address(config.init_from)[0]
    config = load_run_config(workdir)
  return RunFiles(workdir).originals


def read_leaves(config, workdir: pathlib.Path, step: int | None):
  """Returns ({path: weight}, meta of the checkpoint), averaged and merged."""
  from flaxlm.models.trees import named_leaves
  from flaxlm.parallel.mesh import one_device
  from flaxlm.runs.weights import restore_model

  if not config.lora.rank:
    leaves = StoredLeaves(
      RunFiles(workdir).checkpoints, "ema" if config.step.ema_decay else "model", step
    )
    return leaves, leaves.meta
  mesh = one_device()
  model, meta = restore_model(workdir, config, mesh, config.mesh.rules.to_dict(), step)
  return named_leaves(model), meta


def tokenizer_files(config, workdir: pathlib.Path, originals: pathlib.Path | None):
  """Returns (the tokenizer of a run or None, {file name: content} to put beside it).

  The files that the model came with, if the tokenizer is still theirs; else new ones.
  """
  from flaxlm.tokenizer.export import export_files
  from flaxlm.tokenizer.files import find_tokenizer, open_tokenizer

  path = find_tokenizer(workdir)
  if path is None:
    return None, {}
  tokenizer, model = open_tokenizer(path.read_bytes()), config.model
  template = RunFiles(workdir).chat_template
  template = template.read_text() if template.is_file() else ""
  if originals and (originals / "tokenizer.json").is_file():
    first = read_tokenizer(originals)
    if first is not None and first.sha256 == tokenizer.sha256:
      names = [name for name in TOKENIZER_FILES if (originals / name).is_file()]
      files = {name: (originals / name).read_bytes() for name in names}
      if template and template != first.chat_template:
        files["chat_template.jinja"] = template.encode()
      return tokenizer, files
  files = export_files(tokenizer.model, model.max_len, template, not model.causal)
  return tokenizer, files


def export_special_ids(tokenizer) -> dict[str, int | None]:
  """The keys of config.json for the tokens that begin, end and fill texts."""
  if tokenizer is None:
    return {}
  ids = {
    "pad_token_id": tokenizer.pad_id,
    "cls_token_id": tokenizer.cls_id,
    "sep_token_id": tokenizer.sep_id,
  }
  # Of a tokenizer like BERT's, these are the same: transformers has no others then.
  if tokenizer.bos_id != tokenizer.cls_id:
    ids["bos_token_id"] = tokenizer.bos_id
  if tokenizer.eos_id != tokenizer.sep_id:
    ids["eos_token_id"] = tokenizer.eos_id
  return {key: i for key, i in ids.items() if i >= 0}


def task_labels(config) -> dict[str, dict]:
  """The names of the classes, as config.json has them."""
  labels = config.task.labels
  if not labels or len(labels) != config.model.num_labels:
    return {}
  return {
    "id2label": {str(i): name for i, name in enumerate(labels)},
    "label2id": {name: i for i, name in enumerate(labels)},
  }
