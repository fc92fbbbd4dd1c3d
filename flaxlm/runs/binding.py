"""What ties the files of a run to its checkpoints: both must describe one model.

A checkpoint keeps the config that its weights were trained with, and the sha256 of the
files that give them a meaning. Knobs that say how to train may change when a run is
resumed. Those that say what the weights compute, or in which order rows are read, may
not. No JAX here: commands check a run before anything slow is imported.
"""

import hashlib
import json
import pathlib

from ml_collections import ConfigDict

from flaxlm.config.load import config_from_json
from flaxlm.config.tree import flatten
from flaxlm.errors import ConfigError, DataError
from flaxlm.json_files import parse_json
from flaxlm.tokenizer.files import MODEL, find_tokenizer

# Knobs of the model that a machine or a phase of training decides.
_FREE = {
  f"model.{name}"
  for name in (
    "attention", "dtype", "quantize", "remat", "keep", "offload", "unroll", "dropout",
    "moe.balance", "moe.aux_loss", "moe.z_loss", "moe.bias_rate",
  )
}  # fmt: skip
_MODEL = ("model.", "lora.", "objective.", "task.kind", "task.labels")


def of_the_model(config) -> dict[str, object]:
  """Returns the knobs, by key, that decide what the weights of a run compute."""
  flat = flatten(config)
  knobs = {k: v for k, v in flat.items() if k.startswith(_MODEL) and k not in _FREE}
  knobs["step.ema_decay"] = "on" if flat["step.ema_decay"] else "off"
  return knobs


def of_the_order(config) -> dict[str, object]:
  """Returns the knobs, by key, that decide which row comes after how many others."""
  flat = flatten(config)
  sources = {k: v for k, v in flat.items() if k.startswith("data.sources.")}
  weights = {key: value for key, value in sources.items() if key.endswith(".weight")}
  return {"seed": flat["seed"], "data.seq_len": flat["data.seq_len"]} | weights


def differences(knobs: dict, trained: dict) -> list[str]:
  """Returns "config.KEY=VALUE (trained with OTHER)" of each knob that differs."""
  keys = [key for key in {**trained, **knobs} if knobs.get(key) != trained.get(key)]
  return [
    f"config.{key}={knobs.get(key, 'nothing')} (trained with {trained.get(key)})"
    for key in keys
  ]


def trained_config(meta: dict) -> ConfigDict | None:
  """Returns the config in the `meta` of a checkpoint; None if it has none."""
  return config_from_json(json.dumps(meta["config"])) if "config" in meta else None


def check_resumed(config, before: ConfigDict, step: int) -> None:
  """Raises ConfigError if `config` cannot continue a run that `before` began."""
  for group, hint in (
    (of_the_model, "a new --workdir; --config.init_from=RUN starts from its weights"),
    (of_the_order, "a new --workdir; this run's place in its data would be lost"),
  ):
    knobs, trained = group(config), group(before)
    if found := _named(differences(knobs, trained)):
      needed = f"the values of checkpoint {step}: a run keeps these"
      raise ConfigError("the config to resume with", found, needed, hint)


def check_stored(path: pathlib.Path, config, meta: dict) -> None:
  """Raises DataError if the config stored at `path` is not that of a checkpoint."""
  trained = trained_config(meta)
  if trained is None:
    return
  if found := _named(differences(of_the_model(config), of_the_model(trained))):
    raise not_of_this_run(path, found, meta)


def not_of_this_run(path: pathlib.Path, found: str, meta: dict) -> DataError:
  """Returns the error for a stored config that its checkpoints contradict."""
  return DataError(
    f"{path} is not the config that its checkpoints were trained with",
    found,
    f"the config of checkpoint {meta['step']}",
    f"remove {path.name}: that checkpoint has it too; or give --config.KEY=VALUE",
  )


def describe_edit(text: bytes, meta: dict) -> str:
  """Returns how the values of a stored config differ from a checkpoint's, if at all."""
  try:
    stored = flatten(parse_json(text, "the config"))
  except ValueError:
    return ""
  trained = flatten(meta["config"])
  known = {k: v for k, v in stored.items() if k in trained and k != "model.attention"}
  return _named(differences(known, {key: trained[key] for key in known}))


def name_checkpoint(meta: dict) -> str:
  """Returns a name for the weights of a checkpoint, from all that its `meta` says."""
  own = {key: value for key, value in meta.items() if key not in ("new", "left")}
  text = json.dumps(own, sort_keys=True)
  return f"step {meta['step']}, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def check_base(init_from: str, needed: str | None, base: dict) -> None:
  """Raises DataError if adapters were trained on other weights than those there now.

  Args:
    needed: the name that their checkpoint gives; None if it is of an older version.
    base: the `meta` of the weights of config.init_from.
  """
  if needed and needed != name_checkpoint(base):
    raise DataError(
      "the adapters of this run were trained on other weights",
      f"{name_checkpoint(base)}, of {init_from}",
      needed,
      f"--config.init_from=RUN/checkpoints/N, for the {needed.split(',')[0]}",
    )


def check_files(workdir: pathlib.Path, meta: dict) -> None:
  """Raises DataError if the tokenizer or another small file of a run is not its own."""
  named = dict(meta.get("files", {}))  # older versions name none
  if meta.get("tokenizer_sha256"):
    tokenizer = find_tokenizer(workdir)
    named[tokenizer.name if tokenizer else MODEL] = meta["tokenizer_sha256"]
  for name, sha256 in named.items():
    path = workdir / name
    found = file_sha256(path) if path.is_file() else "no such file"
    if found != sha256:
      raise DataError(
        f"{path} is not the file that its checkpoints were trained with",
        found[:12],
        f"sha256 {sha256[:12]}..., as in checkpoint {meta['step']}",
        "a backup of it; a run that was trained writes it again when you repeat its "
        "training command, with --config",
      )


def file_sha256(path: pathlib.Path) -> str:
  """Returns the sha256 of a small file."""
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _named(found: list[str]) -> str:
  """Returns the first differences; "" if there are none."""
  more = f", ... {len(found)} in all" if len(found) > 3 else ""
  return ", ".join(found[:3]) + more
