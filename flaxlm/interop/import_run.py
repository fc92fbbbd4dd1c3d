"""Makes a run of a Hugging Face model: weights, config, tokenizer."""

import json
import math
import pathlib
import shutil

from flaxlm.config.load import apply_overrides, config_to_json
from flaxlm.errors import MissingInputError, OutputError
from flaxlm.runs.directory import RunFiles

TOKENIZER_FILES = (
  *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
  *("special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt"),
  *("spiece.model", "chat_template.jinja"),
)
HUB_FILES = (
  "*.json",
  "*.safetensors",
  "pytorch_model*.bin",
  "*.txt",
  "*.model",
  "*.jinja",
)
# What each head is trained for, to complete the config of an imported run.
TASKS = {"sequence": "classify", "token": "tag", "span": "qa", "choice": "choice"}


def find_source(name: str) -> pathlib.Path:
  """The directory that `--from` names; a model of the hub is fetched first."""
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  problem = "huggingface_hub is not installed, to fetch it by name"
  if not path.is_absolute() and name.count("/") <= 1:
    try:
      from huggingface_hub import snapshot_download

      return pathlib.Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except ImportError:
      pass
    except Exception as error:  # no network, no such model, no permission: its words
      problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
  raise MissingInputError(
    f"--from={name} is not here\n  given:  {path.absolute()} (no such directory)\n"
    f"  needed: a directory, or the name of a model on the hub\n  hub:    {problem}"
  )


def import_model(
  source: pathlib.Path,
  workdir: pathlib.Path,
  skip: tuple[str, ...] = (),
  overrides: list[str] = (),
  with_tokenizer: bool = True,
) -> None:
  """Writes `workdir` as a run at step 0, from Hugging Face's files in `source`.

  Raises:
    OutputError: `workdir` holds a run already.
    DataError, MissingInputError: see `huggingface.read_model`.
  """
  from flaxlm.interop.huggingface import read_model
  from flaxlm.models.trees import nest
  from flaxlm.training.checkpoint import Checkpointer, list_steps

  files = RunFiles(workdir)
  if files.config.exists() or list_steps(files.checkpoints):
    raise OutputError(
      f"--workdir={workdir} holds a run already\n  given:  {workdir.absolute()}\n"
      "  needed: a new directory"
    )
  tokenizer = read_tokenizer(source) if with_tokenizer else None
  model = read_model(source, skip)
  names = model.config.get("id2label") or {}
  labels = (
    [names[i] for i in sorted(names, key=int)] if model.fields["num_labels"] else []
  )
  config = make_config(model.fields, tokenizer, labels, overrides)
  workdir.mkdir(parents=True, exist_ok=True)
  with Checkpointer(files.checkpoints, **config.checkpoint) as checkpoints:
    meta = {
      "step": 0,
      "tokens": 0,
      "data_fingerprint": "imported",
      "tokenizer_sha256": tokenizer.sha256 if tokenizer else "",
      "config": json.loads(config_to_json(config)),
    }
    checkpoints.save(0, {"model": nest(to_jax(model.leaves))}, meta)
  keep_files(source, workdir, config, tokenizer)
  count = sum(math.prod(leaf.shape) for leaf in model.leaves.values())
  print(f"imported {model.family.model_type}, {count:,} parameters: {workdir}")
  if model.left_out:
    names = ", ".join(model.left_out[:6])
    print(f"left out: {names} ({len(model.left_out)} tensors)")
  if tokenizer is None:
    print("no tokenizer was imported")
  elif tokenizer.vocab_size > config.model.vocab_size:
    print(
      f"warning: the tokenizer has {tokenizer.vocab_size} ids, the model fewer rows"
    )


def read_tokenizer(source: pathlib.Path):
  """The tokenizer of a directory, or None if it has no such files."""
  from flaxlm.tokenizer.files import load_tokenizer

  if not any((source / name).is_file() for name in TOKENIZER_FILES):
    return None
  return load_tokenizer(source)


def make_config(fields: dict, tokenizer, labels: list[str], overrides: list[str]):
  """A whole config around the imported model; `labels` are the names of its classes."""
  from flaxlm.config import base

  config = base.get_config()
  for key, value in fields.items():
    if isinstance(value, dict):
      config.model[key].update(value)
    else:
      config.model[key] = value
  model = config.model
  config.data.seq_len = min(model.max_len, 1024)
  config.tokenizer.vocab_size = min(
    tokenizer.vocab_size if tokenizer else model.vocab_size, model.vocab_size
  )
  if model.head == "mlm":
    config.objective.kind = "masked"
    config.objective.pairs = "nsp" if model.pair_head else "none"
  elif model.head in TASKS:
    config.task.kind = TASKS[model.head]
    config.task.labels = tuple(labels)
    config.task.path = "labelled.jsonl"  # to be named by who trains it
  # What follows its length and vocabulary has been set; the model keeps its own.
  model.max_len, model.vocab_size = fields["max_len"], fields["vocab_size"]
  return apply_overrides(config, overrides)


def to_jax(leaves: dict) -> dict:
  """JAX's view of numpy's memory: nothing is copied."""
  import jax

  return {path: jax.dlpack.from_dlpack(leaf) for path, leaf in leaves.items()}


def keep_files(source: pathlib.Path, workdir: pathlib.Path, config, tokenizer) -> None:
  """Puts config and tokenizer where other commands look, and the originals aside."""
  from flaxlm.files import write_atomically
  from flaxlm.tokenizer.files import file_name

  files = RunFiles(workdir)
  originals = files.originals
  originals.mkdir(exist_ok=True)
  for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
    if (source / name).is_file() and (tokenizer or name not in TOKENIZER_FILES):
      shutil.copyfile(source / name, originals / name)
  if tokenizer:
    write_atomically(workdir / file_name(tokenizer.model), tokenizer.model)
    template = tokenizer.chat_template or find_chat_template(source)
    if template:
      write_atomically(files.chat_template, template)
  write_atomically(files.config, config_to_json(config))


def find_chat_template(source: pathlib.Path) -> str:
  """The template beside a SentencePiece model, which holds none itself, or ''."""
  from flaxlm.tokenizer.chat_template import read_template

  try:
    return read_template(source)
  except MissingInputError:
    return ""
