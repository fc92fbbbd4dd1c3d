"""Makes a run at step 0 from a Hugging Face model: weights, config and tokenizer.

The small files that the model came with are kept in the run's directory, so that an
export can give them back.
"""

import json
import math
import pathlib
import shutil

import jax

from flaxlm.config import base
from flaxlm.config.load import apply_overrides, config_to_json, seal_config
from flaxlm.errors import MissingInputError, OutputError, printable
from flaxlm.files import write_atomically, write_directory, writing
from flaxlm.interop.export_manifest import check_export
from flaxlm.interop.hf_config import read_class_names
from flaxlm.interop.huggingface import Imported, read_model
from flaxlm.models.trees import nest
from flaxlm.runs.directory import RunFiles, hash_kept
from flaxlm.tokenizer.chat_template import read_template
from flaxlm.tokenizer.files import AnyTokenizer, file_name, load_tokenizer
from flaxlm.training.checkpoint import Checkpointer, list_steps

TOKENIZER_FILES = (
  *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
  *("special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt"),
  *("spiece.model", "chat_template.jinja"),
)
_BESIDE_A_TOKENIZER = {
  *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("merges.txt", "chat_template.jinja"),
}
_HUB_FILES = (
  *("*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model", "*.jinja"),
)
# The task that each head is trained for: it completes the config of an imported run.
_TASKS = {"sequence": "classify", "token": "tag", "span": "qa", "choice": "choice"}


def find_source(name: str) -> pathlib.Path:
  """Returns the directory that `--from` names; downloads a model from the hub first.

  Raises:
    MissingInputError: there is no such directory, and no such model on the hub.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  problem = "huggingface_hub is not installed, to fetch it by name"
  if not path.is_absolute() and name.count("/") <= 1:
    try:
      from huggingface_hub import snapshot_download

      return pathlib.Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except ImportError:
      pass
    except Exception as error:  # no network, no such model, no permission
      problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
  raise MissingInputError(
    f"--from={name} does not exist",
    f"{path.absolute()} (no such directory); the hub: {problem}",
    "a directory, or the name of a model on the hub",
  )


def import_model(
  source: pathlib.Path,
  workdir: pathlib.Path,
  skip: tuple[str, ...] = (),
  overrides: list[str] = (),
  with_tokenizer: bool = True,
  architecture: str = "",
) -> None:
  """Writes `workdir` as a run at step 0, from the Hugging Face files in `source`.

  Args:
    skip: patterns of tensors to leave out.
    overrides: `key=value` texts for the config of the run.
    architecture: see `huggingface.read_model`.
  Raises:
    OutputError, StorageError: `workdir` holds something, or cannot be written.
    DataError, MissingInputError: see `huggingface.read_model`.
  """
  files = RunFiles(workdir)
  if files.config.exists() or list_steps(files.checkpoints):
    raise OutputError(
      f"--workdir={workdir} holds a run already", workdir.absolute(), "a new directory"
    )
  with write_directory(workdir, f"--workdir={workdir}") as draft:
    tokenizer = read_tokenizer(source) if with_tokenizer else None
    model = read_model(source, skip, architecture)
    config = _make_config(model, tokenizer, overrides)
    with writing(f"--workdir={workdir}"):
      _keep_files(source, draft, config, tokenizer)
    directory = RunFiles(draft).checkpoints
    with Checkpointer(directory, **config.checkpoint) as checkpoints:
      meta = {
        "step": 0,
        "tokens": 0,
        "data_fingerprint": "imported",
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else "",
        "files": hash_kept(draft),
        "config": json.loads(config_to_json(config)),
      }
      checkpoints.save(0, {"model": nest(to_jax(model.leaves))}, meta)
  _print_summary(model, tokenizer, workdir)


def read_tokenizer(source: pathlib.Path) -> AnyTokenizer | None:
  """Returns the tokenizer in a directory, or None if it has no such files."""
  found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
  if not found:
    return None
  if not {*found} - _BESIDE_A_TOKENIZER:
    raise MissingInputError(
      f"{source} describes a tokenizer and does not hold it",
      " ".join(found),
      "tokenizer.json, tokenizer.model, vocab.txt, or vocab.json and merges.txt",
      "--no_tokenizer, to import the weights alone",
    )
  check_export(source, TOKENIZER_FILES)
  return load_tokenizer(source)


def _make_config(
  imported: Imported, tokenizer: AnyTokenizer | None, overrides: list[str]
):
  """Returns a whole config around the imported model."""
  config, fields = base.get_config(), imported.fields
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
  elif model.head in _TASKS:
    config.task.kind = _TASKS[model.head]
    config.task.labels = label_names(imported)
    config.task.path = "labelled.jsonl"  # a placeholder: fine-tuning names its own
  elif model.head != "lm":
    raise AssertionError(model.head)
  # Knobs that refer to these have been set above; the model keeps its own values.
  model.max_len, model.vocab_size = fields["max_len"], fields["vocab_size"]
  return apply_overrides(config, overrides)


def label_names(imported: Imported) -> tuple[str, ...]:
  """Returns the names of the classes by number; () if the model has no classes."""
  return read_class_names(imported.config) if imported.fields["num_labels"] else ()


def to_jax(leaves: dict) -> dict:
  """Returns JAX arrays over NumPy's memory, without a copy."""
  return {path: jax.dlpack.from_dlpack(leaf) for path, leaf in leaves.items()}


def _keep_files(
  source: pathlib.Path, workdir: pathlib.Path, config, tokenizer: AnyTokenizer | None
) -> None:
  """Writes config and tokenizer where other commands look, and keeps the originals."""
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
  write_atomically(files.config, seal_config(config))


def find_chat_template(source: pathlib.Path) -> str:
  """Returns the template beside a SentencePiece model, which cannot hold one, or ''."""
  try:
    return read_template(source)
  except MissingInputError:
    return ""


def _print_summary(
  model: Imported, tokenizer: AnyTokenizer | None, workdir: pathlib.Path
) -> None:
  count = sum(math.prod(leaf.shape) for leaf in model.leaves.values())
  print(f"imported {model.family.model_type}, {count:,} parameters: {workdir}")
  if model.left_out:
    names = printable(", ".join(model.left_out[:6]))
    print(f"left out: {names} ({len(model.left_out)} tensors)")
  rows = model.fields["vocab_size"]
  if tokenizer is None:
    print("no tokenizer was imported")
  elif tokenizer.vocab_size > rows:
    print(
      f"warning: the tokenizer has {tokenizer.vocab_size} ids, "
      f"the model only {rows} rows"
    )
