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

from configs import base
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
  "model.attention": ("auto", "reference", "xla", "cudnn"),
  "model.dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "full", "dots"),
  "optim.name": ("adamw", "lion", "adafactor", "muon"),
  "optim.schedule": ("cosine", "linear", "wsd", "constant"),
  "task.format": ("auto", "csv", "tsv", "jsonl", "squad", "conll", "tfds"),
  "data.loader": ("tfdata", "numpy", "synthetic"),
  "data.split": ("hash", "tail"),
  "data.sources.*.kind": ("stdlib", "text", "jsonl", "parquet", "tfds"),
  "data.sources.*.document": ("file", "paragraph", "line"),
  "tokenizer.kind": ("bpe", "unigram", "char"),
}
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
  "mesh.fsdp",
  "mesh.tensor",
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


def flatten(config: ConfigDict) -> dict[str, object]:
  """Returns {dotted key: value} of every leaf."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= {f"{key}.{rest}": leaf for rest, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def load(path: str, overrides: list[str] = ()) -> ConfigDict:
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
    return from_json(file.read_text(), overrides)
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
  return override(config, overrides)


def override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
  """Applies `key=value` texts from the command line, then checks the whole config."""
  check_keys(config)
  for text in overrides:
    key, equals, value = text.partition("=")
    flat = flatten(config)
    if not equals:
      raise ConfigError(f"--config.{key}", "no value", f"--config.{key}=VALUE")
    if key not in flat:
      raise unknown_key(key, flat)
    set_value(config, key, parse(key, value, flat[key]))
  check(config)
  return config


def set_value(config: ConfigDict, key: str, value: object) -> None:
  *groups, last = key.split(".")
  for group in groups:
    config = config[group]
  # A reference links knobs that are equal by default; both follow an override.
  config[last] = value


def parse(key: str, text: str, current: object) -> object:
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
    f"config.{key}", "an unknown key", "a knob of configs/base.py", hint
  )


def check_keys(config: ConfigDict) -> None:
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
      raise ConfigError(f"config.{key}", "nothing", "every knob of configs/base.py")


def generic(key: str, name: str = "*") -> str:
  """Replaces the name of a source, which the user chooses, by `name`."""
  parts = key.split(".")
  if parts[:2] == ["data", "sources"] and len(parts) > 2:
    parts[2] = name
  return ".".join(parts)


def check(config: ConfigDict) -> None:
  """Raises ConfigError for the first value, or pair of values, that cannot work."""
  check_keys(config)
  flat = flatten(config)
  for key, value in flat.items():
    check_value(f"config.{key}", generic(key), value)
  for holds, key, needed, hint in relations(config):
    if not holds:
      raise ConfigError(f"config.{key}", flat.get(key, "none"), needed, hint)


def relations(config: ConfigDict):
  """Yields (holds, key, what is needed, what to try) for what knobs owe each other."""
  model, data, optim, mesh = config.model, config.data, config.optim, config.mesh
  heads, layers = model.num_heads, model.num_layers
  yield (
    heads % model.num_kv_heads == 0,
    "model.num_kv_heads",
    f"a divisor of config.model.num_heads={heads}",
    divisors(heads, model.num_kv_heads),
  )
  yield from model_relations(model)
  yield from prediction_relations(config)
  yield (
    layers % model.unroll == 0,
    "model.unroll",
    f"a divisor of config.model.num_layers={layers}",
    divisors(layers, model.unroll),
  )
  limit = f"at most config.model.max_len={model.max_len}"
  yield data.seq_len <= model.max_len, "data.seq_len", limit, f"{model.max_len}"
  unit = config.step.accumulation_steps * max(mesh.data, 1) * mesh.fsdp
  yield (
    data.batch_size % unit == 0,
    "data.batch_size",
    f"a multiple of {unit} = accumulation_steps x mesh.data x mesh.fsdp",
    multiples(data.batch_size, unit),
  )
  limit = f"at most config.num_steps={config.num_steps}"
  hint = f"{config.num_steps // 10}"
  yield optim.warmup_steps <= config.num_steps, "optim.warmup_steps", limit, hint
  devices = "devices along the axis, or -1 for all that remain"
  yield mesh.data == -1 or mesh.data > 0, "mesh.data", devices, "-1"
  limit = f"at most config.model.vocab_size={model.vocab_size}"
  fits = config.tokenizer.path or config.tokenizer.vocab_size <= model.vocab_size
  yield fits, "tokenizer.vocab_size", limit, f"{model.vocab_size}"
  yield len(data.sources) > 0, "data.sources", "at least one source", "main"
  for name, axes in mesh.rules.items():
    known = set(axes) <= {"data", "fsdp", "tensor"}
    yield known, f"mesh.rules.{name}", "mesh axes", "data,fsdp or tensor or ()"


def model_relations(model: ConfigDict):
  """The relations within `config.model`."""
  yield (
    model.positions != "rope" or model.head_dim % 2 == 0,
    "model.head_dim",
    "an even number: rotary positions turn pairs",
    f"{model.head_dim + 1}",
  )
  pattern = set(model.layer_pattern)
  names = pattern <= {"local", "global"} and len(pattern) > 0
  yield names, "model.layer_pattern", "local and global, with commas", "local,global"
  moe, rope = model.moe, model.rope
  yield (
    moe.num_experts == 0 or moe.experts_per_token <= moe.num_experts,
    "model.moe.experts_per_token",
    f"at most config.model.moe.num_experts={moe.num_experts}",
    f"{moe.num_experts}",
  )
  yield (
    moe.num_experts == 0 or not model.use_bias,
    "model.use_bias",
    "False with experts, which have no biases",
    "False",
  )
  fewer = moe.num_experts == 0 or moe.first_dense_layers < model.num_layers
  limit = f"fewer than config.model.num_layers={model.num_layers}"
  yield fewer, "model.moe.first_dense_layers", limit, "1"
  yield (
    rope.scaling in ("none", "linear") or rope.original_max_len > 0,
    "model.rope.original_max_len",
    f"the length that {rope.scaling} scaling starts from",
    f"{model.max_len}",
  )
  alone = model.first_norm or (
    model.norm_placement in ("pre", "both") and moe.num_experts == 0
  )
  yield alone, "model.first_norm", "True, unless norms come before dense layers", "True"
  plain = model.attention != "cudnn" or model.attention_softcap == 0
  yield plain, "model.attention", "a backend that can soft-cap scores", "xla"


# Which head the model needs for what it is asked to do.
HEADS = {
  "causal": "lm",
  "span": "lm",
  "prefix": "lm",
  "fim": "lm",
  "masked": "mlm",
  "classify": "sequence",
  "tag": "token",
  "qa": "span",
  "choice": "choice",
  "chat": "lm",
}


def prediction_relations(config: ConfigDict):
  """The relations between what is predicted, and the model that predicts it."""
  model, objective, task = config.model, config.objective, config.task
  asked = objective.kind if task.kind == "none" else task.kind
  group = "objective" if task.kind == "none" else "task"
  head = HEADS[asked]
  needed = f"{head}, for config.{group}.kind={asked}"
  yield model.head == head, "model.head", needed, head
  needed = f"True, for config.{group}.kind={asked}"
  yield head != "lm" or model.causal, "model.causal", needed, "True"
  needed = "False: a masked token must be hidden from no side"
  yield asked != "masked" or not model.causal, "model.causal", needed, "False"
  pairs = task.kind == "none" and objective.pairs != "none"
  needed = f"masked, for config.objective.pairs={objective.pairs}"
  yield not pairs or asked == "masked", "objective.kind", needed, "masked"
  needed = f"True, for config.objective.pairs={objective.pairs}"
  yield not pairs or model.pair_head, "model.pair_head", needed, "True"
  rates = objective.mask_token_rate + objective.random_token_rate
  needed = "at most 1, with config.objective.mask_token_rate"
  yield rates <= 1 + 1e-9, "objective.random_token_rate", needed, "0.1"
  has_path = task.kind == "none" or task.path != ""
  needed = "labelled examples: csv, tsv, jsonl, or a TFDS name"
  yield has_path, "task.path", needed, "train.csv"
  needed = "False: a causal model has read nothing where an option begins"
  yield asked != "choice" or not model.causal, "model.causal", needed, "False"
  yield from objective_relations(config, asked, pairs)
  frozen = config.lora.rank == 0 or config.init_from != ""
  needed = "the run whose weights config.lora.rank adds to"
  yield frozen, "init_from", needed, "runs/base"


def objective_relations(config: ConfigDict, asked: str, pairs: bool):
  """What the knobs of `config.objective` need, where they are used."""
  objective, model, length = config.objective, config.model, config.data.seq_len
  given = asked not in ("masked", "span") or objective.mask_rate > 0
  yield given, "objective.mask_rate", f"above 0 for kind={asked}", "0.15"
  yield objective.mean_span >= 1, "objective.mean_span", "1 token or more", "3.0"
  yield not pairs or length >= 16, "data.seq_len", "room for two sentences", "128"
  types = not pairs or model.num_segment_types >= 2
  needed = f"2, for config.objective.pairs={objective.pairs}"
  yield types, "model.num_segment_types", needed, "2"
  if asked != "span":
    return
  some = objective.mask_rate < 1
  needed = "below 1: some of the text must be given"
  yield some, "objective.mask_rate", needed, "0.15"
  spans = math.ceil(length * objective.mask_rate / objective.mean_span) + 2
  needed = f"at least {spans}: one for each span of a row, and the end"
  yield objective.num_sentinels >= spans, "objective.num_sentinels", needed, f"{spans}"


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


def divisors(number: int, near: int) -> str:
  """The divisors of `number` that lie nearest to `near`, as text."""
  found = [d for d in range(1, number + 1) if number % d == 0]
  found = sorted(sorted(found, key=lambda d: abs(d - near))[:3])
  return " or ".join(map(str, found))


def multiples(given: int, unit: int) -> str:
  """The multiples of `unit` on both sides of `given`, as text."""
  down = given // unit * unit
  return " or ".join(str(m) for m in (down, down + unit) if m)


def to_json(config: ConfigDict) -> str:
  return json.dumps(json.loads(config.to_json()), indent=2) + "\n"


def from_json(text: str, overrides: list[str] = ()) -> ConfigDict:
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
    if key not in known:
      raise unknown_key(key, known)
    set_value(config, key, tuple(value) if isinstance(known[key], tuple) else value)
  return override(config, overrides)


def load_run(workdir: str | pathlib.Path, overrides: list[str] = ()) -> ConfigDict:
  """The config that the run in `workdir` stored, with overrides applied."""
  path = pathlib.Path(workdir) / "config.json"
  if not path.is_file():
    raise MissingInputError(
      f"--workdir={workdir} holds no run\n  given:  {path.absolute()} (missing)\n"
      "  needed: a directory that `python -m flaxlm.train --workdir=...` wrote"
    )
  return from_json(path.read_text(), overrides)
