"""Writes a run as a Hugging Face model that transformers loads.

A run that was imported keeps the family, special ids and tokenizer files of its
original, as far as they are still true of it.
"""

import pathlib
from collections.abc import Mapping

from flaxlm.files import write_atomically, write_directory, writing
from flaxlm.interop.end_of_text import (
  GENERATION_FILE,
  find_end_ids,
  generation_config,
)
from flaxlm.interop.export_manifest import seal_export
from flaxlm.interop.huggingface import write_model
from flaxlm.interop.import_run import TOKENIZER_FILES, read_tokenizer
from flaxlm.json_files import read_json
from flaxlm.models.trees import named_leaves
from flaxlm.parallel.mesh import one_device
from flaxlm.runs.directory import RunFiles, find_originals
from flaxlm.runs.weights import restore_model
from flaxlm.tokenizer.chat_template import ChatTemplate
from flaxlm.tokenizer.export import export_files, find_inconvertible
from flaxlm.tokenizer.files import AnyTokenizer, find_tokenizer, open_tokenizer
from flaxlm.training.stored_leaves import StoredLeaves

_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_model(
  config,
  workdir: pathlib.Path,
  out: pathlib.Path,
  step: int | None = None,
  dtype: str = "float32",
  family: str = "",
) -> None:
  """Writes a checkpoint of the run in `workdir` as Hugging Face files to `out`.

  Args:
    config: of the run.
    step: of the checkpoint; None is the newest.
    dtype: of the weights: float32, bfloat16 or float16.
    family: the model_type to write; "" is that of the original, or the first that fits.
  Raises:
    ConfigError: no Hugging Face family computes what this model does.
    OutputError, StorageError: `out` is not empty, or cannot be written.
  """
  with write_directory(out, f"--to={out}") as draft:
    hf, meta = _write_files(config, workdir, draft, step, dtype, family)
    bare = find_tokenizer(workdir) is None
  print(f"exported step {meta['step']} as {hf['architectures'][0]}: {out}")
  if bare:
    print("warning: the run has no tokenizer, so none was exported: add its files")


def _write_files(
  config,
  workdir: pathlib.Path,
  directory: pathlib.Path,
  step: int | None,
  dtype: str,
  family: str,
) -> tuple[dict, dict]:
  """Writes everything to `directory`; returns (config.json, meta of the checkpoint)."""
  originals = find_originals(config, workdir)
  leaves, meta = _read_leaves(config, workdir, step)
  tokenizer, files = _tokenizer_files(config.model, workdir, originals)
  like = _special_token_keys(tokenizer)
  if originals:
    like = read_json(originals / "config.json")
  like |= _label_keys(config)
  if config.task.kind == "classify" and meta["step"]:
    like.pop("problem_type", None)  # we train one class per text, whatever the original
  if family:
    like["model_type"] = family
  hf = write_model(directory, config.model.to_dict(), leaves, dtype, like)
  if config.model.head == "lm" or (
    originals and (originals / GENERATION_FILE).exists()
  ):
    generation = {key: i for key, i in hf.items() if key in _GENERATION_KEYS}
    files[GENERATION_FILE] = generation_config(
      originals,
      generation | {"_from_model_config": True},
      find_end_ids(originals, tokenizer, _chat_template(workdir, tokenizer)),
    )
  with writing(f"--to={directory}"):
    for name, content in files.items():
      write_atomically(directory / name, content)
    seal_export(directory, meta["step"])
  return hf, meta


def _read_leaves(
  config, workdir: pathlib.Path, step: int | None
) -> tuple[Mapping, dict]:
  """Returns ({path: weight}, meta of the checkpoint): averaged, adapters merged."""
  if not config.lora.rank:
    name = "ema" if config.step.ema_decay else "model"
    leaves = StoredLeaves(RunFiles(workdir).checkpoints, name, step)
    return leaves, leaves.meta
  rules = config.mesh.rules.to_dict()
  model, meta = restore_model(workdir, config, one_device(), rules, step)
  return named_leaves(model), meta


def _tokenizer_files(
  model, workdir: pathlib.Path, originals: pathlib.Path | None
) -> tuple[AnyTokenizer | None, dict[str, bytes]]:
  """Returns (the run's tokenizer or None, {file name: content} to put beside it).

  The original's files are kept if the run still has its tokenizer; else new ones are
  made.
  """
  path = find_tokenizer(workdir)
  if path is None:
    return None, {}
  tokenizer = open_tokenizer(path.read_bytes())
  template = RunFiles(workdir).chat_template
  template = template.read_text() if template.is_file() else ""
  has_json = originals and (originals / "tokenizer.json").is_file()
  if has_json or (originals and find_inconvertible(tokenizer.model)):
    first = read_tokenizer(originals)
    if first is not None and first.sha256 == tokenizer.sha256:
      names = [name for name in TOKENIZER_FILES if (originals / name).is_file()]
      files = {name: (originals / name).read_bytes() for name in names}
      if template and template != first.chat_template:
        files["chat_template.jinja"] = template.encode()
      return tokenizer, files
  files = export_files(tokenizer.model, model.max_len, template, not model.causal)
  return tokenizer, files


def _chat_template(
  workdir: pathlib.Path, tokenizer: AnyTokenizer | None
) -> ChatTemplate | None:
  file = RunFiles(workdir).chat_template
  source = file.read_text("utf-8") if file.is_file() else ""
  source = source or (tokenizer.chat_template if tokenizer else "")
  return ChatTemplate(source) if source else None


def _special_token_keys(tokenizer: AnyTokenizer | None) -> dict[str, int]:
  """Returns the keys of config.json for the tokens that begin, end and pad texts."""
  if tokenizer is None:
    return {}
  ids = {
    "pad_token_id": tokenizer.pad_id,
    "cls_token_id": tokenizer.cls_id,
    "sep_token_id": tokenizer.sep_id,
  }
  # A tokenizer like BERT's has the same tokens in both roles; transformers expects
  # cls and sep alone.
  if tokenizer.bos_id != tokenizer.cls_id:
    ids["bos_token_id"] = tokenizer.bos_id
  if tokenizer.eos_id != tokenizer.sep_id:
    ids["eos_token_id"] = tokenizer.eos_id
  return {key: i for key, i in ids.items() if i >= 0}


def _label_keys(config) -> dict[str, dict]:
  """Returns the keys of config.json for the names of the classes."""
  labels = config.task.labels
  if not labels or len(labels) != config.model.num_labels:
    return {}
  return {
    "id2label": {str(i): name for i, name in enumerate(labels)},
    "label2id": {name: i for i, name in enumerate(labels)},
  }
