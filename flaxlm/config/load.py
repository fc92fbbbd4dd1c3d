"""Load, override, check and store the config of a run.

A config is refused here, before JAX is imported, whether the wrong value came from a
file, the command line or a stored run. ml_collections gives the locked, typed tree;
here is what it lacks: ranges, relations between knobs, messages that name the fix.
"""

import ast
import difflib
import importlib.util
import json
import math
import pathlib
import traceback

from ml_collections import ConfigDict

from flaxlm.config import base
from flaxlm.config.rules import broken_rules
from flaxlm.config.tree import flatten, set_value
from flaxlm.errors import ConfigError, DataError, MissingInputError

CHOICES = {
  "model.positions": ("rope", "learned", "none"),
  "model.norm": ("rmsnorm", "layernorm"),
  "model.norm_placement": ("pre", "post", "both", "residual"),
  "model.activation": ("silu", "gelu", "gelu_tanh", "relu"),
  "model.qk_norm": ("none", "head", "full"),
  "model.head": ("lm", "mlm", "sequence", "token", "span", "choice"),
  "model.head_activation": ("gelu", "gelu_tanh", "silu", "tanh"),
  "model.pooling": ("first", "mean", "last"),
  "model.rope.scaling": ("none", "linear", "llama3", "yarn"),
  "model.moe.router": ("softmax", "sigmoid"),
  "model.moe.balance": ("loss", "bias", "none"),
  "objective.kind": ("causal", "masked", "span", "prefix", "fim"),
  "objective.mask_unit": ("token", "word", "span"),
  "objective.pairs": ("none", "nsp", "sop"),
  "task.kind": ("none", "classify", "tag", "qa", "choice", "chat"),
  "model.attention": ("auto", "reference", "xla", "splash", "ring", "cudnn"),
  "model.dtype": ("float32", "bfloat16"),
  "model.quantize": ("none", "fp8", "int8"),
  "model.remat": ("none", "full", "dots"),
  "optim.name": ("adamw", "lion", "adafactor", "muon"),
  "optim.schedule": ("cosine", "linear", "wsd", "constant"),
  "task.format": ("auto", "csv", "tsv", "jsonl", "squad", "conll", "tfds"),
  "data.loader": ("tfdata", "numpy", "synthetic"),
  "data.split": ("hash", "tail"),
  "data.sources.*.kind": ("stdlib", "text", "jsonl", "csv", "tsv", "parquet", "tfds"),
  "data.sources.*.document": ("file", "paragraph", "line"),
  "tokenizer.kind": ("bpe", "unigram", "char"),
}
# Keys that older runs stored and that no longer choose anything.
RETIRED = ("step.chunk_size",)
# Numbers that are not listed may be anything from 0 up.
AT_LEAST_ONE = (
  "num_steps",
  "model.vocab_size",
  "model.max_len",
  "model.num_layers",
  "model.embed_dim",
  "model.num_heads",
  "model.num_kv_heads",
  "model.head_dim",
  "model.mlp_dim",
  "model.unroll",
  "model.moe.experts_per_token",
  "step.accumulation_steps",
  "mesh.slice",
  "mesh.stage",
  "mesh.fsdp",
  "mesh.expert",
  "mesh.context",
  "mesh.tensor",
  "mesh.stage_repeats",
  "data.seq_len",
  "data.batch_size",
  "data.num_threads",
  "data.prefetch",
  "data.shard_tokens",
  "tokenizer.vocab_size",
  "tokenizer.train_bytes",
  "task.doc_stride",
  "checkpoint.every",
  "checkpoint.keep_last",
  "log.every",
  "log.profile_num_steps",
  "guards.max_bad_steps",
)
POSITIVE = [
  "mesh.start_seconds",
  "model.norm_epsilon",
  "model.rope.theta",
  "model.rope.factor",
  "objective.mean_span",
  "lora.alpha",
  "optim.epsilon",
  "data.sources.*.weight",
]
BELOW_ONE = (
  "model.dropout",
  "optim.b1",
  "optim.b2",
  "step.ema_decay",
  "data.validation_fraction",
)
AT_MOST_ONE = (
  "objective.mask_rate",
  "objective.mask_token_rate",
  "objective.random_token_rate",
  "objective.fim_rate",
  "objective.spm_rate",
  "optim.end_factor",
  "optim.decay_fraction",
)


def load_config(path: str, overrides: list[str] = ()) -> ConfigDict:
  """Runs `get_config()` of the file at `path`, applies `key=value` texts, checks.

  The config.json of a run will do as well: to change a few knobs of what was done.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    near = sorted(str(f) for f in file.parent.glob("*.py") if f.stem != "__init__")
    raise MissingInputError(
      f"--config={path} does not exist\n  given:  {file.absolute()}\n"
      f"  needed: a file with get_config(), or of a run, as {' '.join(near[:6])}"
    )
  if file.suffix == ".json":
    return config_from_json(file.read_text(), overrides)
  spec = importlib.util.spec_from_file_location("flaxlm_run_config", file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f for f in frames if pathlib.Path(f.filename).name == file.name]
    where = f"{path} line {lines[-1].lineno}" if lines else path
    message = " ".join(str(error).split())
    raise ConfigError(
      where,
      f"{lines[-1].line if lines else '?'}",
      f"no {type(error).__name__}",
      message,
    ) from error
  return apply_overrides(config, overrides)


def apply_overrides(config: ConfigDict, overrides: list[str]) -> ConfigDict:
  """Applies `key=value` texts from the command line, then checks the whole config."""
  check_known_keys(config)
  for text in overrides:
    key, equals, value = text.partition("=")
    flat = flatten(config)
    if not equals:
      raise ConfigError(f"--config.{key}", "no value", f"--config.{key}=VALUE")
    if key not in flat:
      raise unknown_key(key, flat)
    # A reference links knobs that are equal by default; both follow an override.
    set_value(config, key, parse_value(key, value, flat[key]))
  check_config(config)
  return config


def parse_value(key: str, text: str, current: object) -> object:
  """Reads `text` as the type that the knob has now."""
  kind = type(current)
  try:
    if kind is bool:
      return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
    if kind is int:
      number = float(text) if not text.lstrip("+-").isdigit() else int(text)
      if number != int(number):
        raise ValueError
      return int(number)
    if kind is float:
      return float(text)
    if kind is tuple:
      value = (
        ast.literal_eval(text) if text.strip()[:1] in ("(", "[") else text.split(",")
      )
      return tuple(item for item in value if item != "")
    return text
  except (KeyError, ValueError, OverflowError, SyntaxError):
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    needed = names.get(kind, "values with commas between")
    raise ConfigError(f"config.{key}", text, needed, f"{current}") from None


def unknown_key(key: str, flat: dict) -> ConfigError:
  near = difflib.get_close_matches(key, flat, n=3, cutoff=0.6)
  last = key.split(".")[-1]
  near = [k for k in flat if k.split(".")[-1] == last][:3] or near
  groups = sorted({k.split(".")[0] for k in flat})
  hint = " or ".join(f"config.{k}" for k in near) or "a key of " + " ".join(groups)
  return ConfigError(
    f"config.{key}", "an unknown key", "a knob of flaxlm/config/base.py", hint
  )


def check_known_keys(config: ConfigDict) -> None:
  """Refuses keys and types that base.py lacks: a file may build its own tree."""
  known = flatten(base.get_config())
  for key, value in flatten(config).items():
    expected = known.get(generic(key, "main"))
    if expected is None:
      raise unknown_key(key, known)
    if isinstance(expected, float) and type(value) is int:
      continue
    if type(value) is not type(expected):
      kind = type(expected).__name__
      raise ConfigError(
        f"config.{key}", f"{value!r}", f"a value of type {kind}", f"{expected}"
      )
  given = {generic(key, "main") for key in flatten(config)}
  for key in known:
    if key not in given:
      raise ConfigError(
        f"config.{key}", "nothing", "every knob of flaxlm/config/base.py"
      )


def generic(key: str, name: str = "*") -> str:
  """Replaces the name of a source, which the user chooses, by `name`."""
  parts = key.split(".")
  if parts[:2] == ["data", "sources"] and len(parts) > 2:
    parts[2] = name
  return ".".join(parts)


def check_config(config: ConfigDict) -> None:
  """Raises ConfigError for the first value, or pair of values, that cannot work."""
  check_known_keys(config)
  flat = flatten(config)
  for key, value in flat.items():
    check_value(f"config.{key}", generic(key), value)
  for holds, key, needed, hint in broken_rules(config):
    if not holds:
      raise ConfigError(f"config.{key}", flat.get(key, "none"), needed, hint)


def check_value(name: str, key: str, value: object) -> None:
  """Checks one leaf against the tables at the top of this file."""
  if key in CHOICES:
    near = difflib.get_close_matches(str(value), CHOICES[key], n=1)
    if value not in CHOICES[key]:
      raise ConfigError(name, value, "one of " + " ".join(CHOICES[key]), "".join(near))
  if (
    isinstance(value, bool) or not isinstance(value, int | float) or key == "mesh.data"
  ):
    return
  low = 1 if key in AT_LEAST_ONE else 0
  if not math.isfinite(value) or value < low or (key in POSITIVE and value == 0):
    above = "above 0" if key in POSITIVE else f"of at least {low}"
    raise ConfigError(name, value, f"a finite number {above}")
  if (key in BELOW_ONE and value >= 1) or (key in AT_MOST_ONE and value > 1):
    raise ConfigError(
      name, value, "a fraction below 1" if key in BELOW_ONE else "at most 1"
    )


def config_to_json(config: ConfigDict) -> str:
  return json.dumps(json.loads(config.to_json()), indent=2) + "\n"


def config_from_json(text: str, overrides: list[str] = ()) -> ConfigDict:
  """Rebuilds a stored config; nothing in it is executed."""
  config = base.get_config()
  try:
    stored = json.loads(text)
    names = stored["data"]["sources"]
  except (ValueError, KeyError, TypeError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise DataError(f"the stored config is damaged\n  given:  {reason}") from error
  config.data.sources = base.sources(**{name: base.source() for name in names})
  known = flatten(config)
  for key, value in flatten(ConfigDict(stored)).items():
    if key in RETIRED:
      continue
    if key not in known:
      raise unknown_key(key, known)
    set_value(config, key, tuple(value) if isinstance(known[key], tuple) else value)
  return apply_overrides(config, overrides)


def load_run(workdir: str | pathlib.Path, overrides: list[str] = ()) -> ConfigDict:
  """The config that the run in `workdir` stored, with overrides applied."""
  path = pathlib.Path(workdir) / "config.json"
  if not path.is_file():
    raise MissingInputError(
      f"--workdir={workdir} holds no run\n  given:  {path.absolute()} (missing)\n"
      "  needed: a directory that `python -m flaxlm.train --workdir=...` wrote"
    )
  return config_from_json(path.read_text(), overrides)
