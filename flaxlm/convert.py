"""Import a model from Hugging Face's files, or export one to them.

  python -m flaxlm.convert import --from=downloads/SmolLM2-135M --workdir=runs/smollm2
  python -m flaxlm.convert export --workdir=runs/smollm2 --to=exports/smollm2

--from is a directory with config.json and weights, or the name of a model on the hub,
where huggingface_hub is installed and there is a network. What is imported is a run at
step 0: other runs start from it (--config.init_from=runs/smollm2), and the other doors
read it. What is exported is loaded by `transformers` with from_pretrained.
"""

import collections.abc
import json
import math
import os
import pathlib
import shutil

from flaxlm import cli
from flaxlm import config as configs
from flaxlm.errors import ConfigError, MissingInputError, OutputError

ORIGINALS = "huggingface"  # in the directory of a run: small files of what it came from
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
GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What each head is trained for, to complete the config of an imported run.
TASKS = {"sequence": "classify", "token": "tag", "span": "qa", "choice": "choice"}


def main(argv: list[str] | None = None) -> None:
  parser = cli.parser(__doc__, "convert")
  parser.add_argument("direction", choices=("import", "export"))
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--from", dest="source", help="import: what to read")
  parser.add_argument(
    "--skip", action="append", default=[], metavar="PATTERN",
    help="import: leave out tensors whose name matches; repeatable",
  )  # fmt: skip
  parser.add_argument(
    "--no_tokenizer", action="store_true", help="import: weights and config alone"
  )
  parser.add_argument("--to", help="export: a new or empty directory")
  parser.add_argument("--step", type=int, help="export: default: the newest checkpoint")
  parser.add_argument("--dtype", default="float32", help="or bfloat16, float16")
  parser.add_argument("--family", default="", help="export: default: one that fits")
  args, overrides = cli.parse(parser, argv)
  workdir = pathlib.Path(args.workdir)
  needed = args.source if args.direction == "import" else args.to
  if not needed:
    name = "--from" if args.direction == "import" else "--to"
    raise ConfigError(name, "nothing", "a directory", f"{name}=models/a")
  if args.direction == "import":
    source = find_source(args.source)
    import_model(source, workdir, tuple(args.skip), overrides, not args.no_tokenizer)
  else:
    config = configs.load_run(workdir, overrides)
    export_model(config, workdir, pathlib.Path(args.to), args)


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
  from flaxlm.training.checkpoint import Checkpointer, list_steps, nest

  if (workdir / "config.json").exists() or list_steps(workdir / "checkpoints"):
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
  with Checkpointer(workdir / "checkpoints", **config.checkpoint) as checkpoints:
    meta = {
      "step": 0,
      "tokens": 0,
      "data_fingerprint": "imported",
      "tokenizer_sha256": tokenizer.sha256 if tokenizer else "",
      "config": json.loads(configs.to_json(config)),
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
  from flaxlm.data.tokenizer_files import load_tokenizer

  if not any((source / name).is_file() for name in TOKENIZER_FILES):
    return None
  return load_tokenizer(source)


def make_config(fields: dict, tokenizer, labels: list[str], overrides: list[str]):
  """A whole config around the imported model; `labels` are the names of its classes."""
  from configs import base

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
  return configs.override(config, overrides)


def to_jax(leaves: dict) -> dict:
  """JAX's view of numpy's memory: nothing is copied."""
  import jax

  return {path: jax.dlpack.from_dlpack(leaf) for path, leaf in leaves.items()}


def keep_files(source: pathlib.Path, workdir: pathlib.Path, config, tokenizer) -> None:
  """Puts config and tokenizer where the other doors look, and the originals aside."""
  from flaxlm.data.store import write_atomically
  from flaxlm.data.tokenizer_files import file_name

  originals = workdir / ORIGINALS
  originals.mkdir(exist_ok=True)
  for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
    if (source / name).is_file() and (tokenizer or name not in TOKENIZER_FILES):
      shutil.copyfile(source / name, originals / name)
  if tokenizer:
    write_atomically(workdir / file_name(tokenizer.model), tokenizer.model)
    template = tokenizer.chat_template or find_chat_template(source)
    if template:
      write_atomically(workdir / "chat_template.jinja", template.encode())
  write_atomically(workdir / "config.json", configs.to_json(config).encode())


def find_chat_template(source: pathlib.Path) -> str:
  """The template beside a SentencePiece model, which holds none itself, or ''."""
  from flaxlm.data.chat import read_template

  try:
    return read_template(source)
  except MissingInputError:
    return ""


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
    like = special_ids(tokenizer)
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
  from flaxlm.weights import split_address

  while not (workdir / ORIGINALS / "config.json").is_file():
    if not config.init_from:
      return None
    workdir = split_address(config.init_from)[0]
    config = configs.load_run(workdir)
  return workdir / ORIGINALS


def read_leaves(config, workdir: pathlib.Path, step: int | None):
  """Returns ({path: weight}, meta of the checkpoint), averaged and merged."""
  from flaxlm.parallel.mesh import one_device
  from flaxlm.training.checkpoint import named_leaves
  from flaxlm.weights import restore_model

  if not config.lora.rank:
    leaves = StoredLeaves(
      workdir / "checkpoints", "ema" if config.step.ema_decay else "model", step
    )
    return leaves, leaves.meta
  mesh = one_device()
  model, meta = restore_model(workdir, config, mesh, config.mesh.rules.to_dict(), step)
  return named_leaves(model), meta


class StoredLeaves(collections.abc.Mapping):
  """The weights of a checkpoint by path; each is read from disk when it is asked for.

  The checkpoint is verified once, when this is made.
  """

  def __init__(self, directory: pathlib.Path, name: str, step: int | None):
    from flaxlm.training.checkpoint import choose, read_meta
    from flaxlm.training.manifest import read_manifest

    read_meta(directory, step)  # says it well if there is none
    step = choose(directory.absolute(), move_aside=False, only=step)
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

    from flaxlm.training.checkpoint import named_leaves, nest

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


def tokenizer_files(config, workdir: pathlib.Path, originals: pathlib.Path | None):
  """Returns (the tokenizer of a run or None, {file name: content} to put beside it).

  The files that the model came with, if the tokenizer is still theirs; else new ones.
  """
  from flaxlm.data.export_tokenizer import export_files
  from flaxlm.data.tokenizer_files import find_tokenizer, open_tokenizer

  path = find_tokenizer(workdir)
  if path is None:
    return None, {}
  tokenizer, model = open_tokenizer(path.read_bytes()), config.model
  template = workdir / "chat_template.jinja"
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


def special_ids(tokenizer) -> dict[str, int | None]:
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


if __name__ == "__main__":
  cli.run(main)
