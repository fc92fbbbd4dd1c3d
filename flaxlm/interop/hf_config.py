"""Translates a Hugging Face config.json to our model fields, and back.

A key that could change what is computed is understood or refused, never ignored. What
is written is read back before it is used: a model that its family cannot express is
refused, and the message names the fields that would be lost.
"""

from collections.abc import Iterable

from flaxlm.config import base
from flaxlm.config.choices import number_needed
from flaxlm.config.tree import flatten
from flaxlm.errors import ConfigError, DataError
from flaxlm.interop.decoders import DECODERS
from flaxlm.interop.encoders import ENCODERS
from flaxlm.interop.family import Architecture, Family, read_number, wrong_hf_value
from flaxlm.interop.hf_fields import (
  HF_ACTIVATIONS,
  HF_POOLINGS,
  NEUTRAL_FIELDS,
  SILENT_KEYS,
  canonical,
  pattern_of,
  windows_of,
)
from flaxlm.interop.hf_rope import read_rope, rope_keys, write_rope
from flaxlm.interop.hf_windows import WINDOW_KEYS, read_windows, write_windows

FAMILIES = (*DECODERS, *ENCODERS)
# Silent keys that are true of the original model alone: an export leaves them out.
_OF_THE_ORIGINAL = {
  *("auto_map", "_name_or_path", "name_or_path", "_model_name_or_path"),
  *("transformers_version", "is_llama_config"),
  *("vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id"),
  *("boi_token_index", "boi_token_id", "eoi_token_index", "eoi_token_id"),
}
_KNOBS = flatten(base.get_config())
_TYPES = dict.fromkeys(
  ("text_config", "id2label", "label2id", "rope_scaling", "rope_parameters"),
  (dict, "an object, or null"),
) | {
  "architectures": (list, "an array of names"),
  "layer_types": (list, "an array of names"),
  "num_labels": (int, "a whole number"),
}
# Without these keys, transformers would fill in the ids that are usual in some family.
_NO_IDS = dict.fromkeys(
  f"{role}_token_id" for role in ("bos", "eos", "pad", "cls", "sep")
)


def find_family(model_type: str) -> Family:
  """Returns the family of a model_type; DataError lists those that are supported."""
  for family in FAMILIES:
    if family.model_type == model_type:
      return family
  raise DataError(
    "this architecture is not supported",
    f"model_type={model_type} in config.json",
    f"one of {' '.join(f.model_type for f in FAMILIES)}",
  )


def read_config(
  hf: dict, tensor_names: Iterable[str]
) -> tuple[Family, Architecture, dict[str, object]]:
  """Returns the family, the architecture and our fields, with dots for groups.

  Args:
    hf: the content of a config.json.
    tensor_names: as the family spells them; they decide which head a file has.
  Raises:
    DataError: an architecture, a key or a value is not supported.
  """
  hf, family = dict(hf), find_family(hf.get("model_type"))
  _check_types(hf)
  if hf.get("text_config"):
    whole = ("model_type", "architectures")
    text = {k: v for k, v in hf.pop("text_config").items() if k not in whole}
    _check_types(text)
    hf |= text
  _check_keys(family, hf)
  complete = family.defaults | hf
  fields = NEUTRAL_FIELDS | family.fields
  for key in family.keys:
    if key not in complete and family.keys[key] not in fields:
      raise wrong_hf_value(key, "nothing", "a value")
  for key, field in family.keys.items():
    if key in complete:
      fields[field] = _to_our_value(key, field, complete[key], fields)
  _check_ranges(family, fields)
  fields["mlp_dim"] = fields["mlp_dim"] or 4 * fields["embed_dim"]
  fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
  if not fields["head_dim"]:
    if fields["embed_dim"] % fields["num_heads"]:
      raise wrong_hf_value(
        "the number of heads", fields["num_heads"], "a divisor of the width"
      )
    fields["head_dim"] = fields["embed_dim"] // fields["num_heads"]
  biases = {bool(complete.get(key)) for key in family.bias_keys}
  if len(biases) > 1:
    given = " ".join(f"{key}={complete.get(key)}" for key in family.bias_keys)
    raise wrong_hf_value("biases in only some places", given, "all true, or all false")
  fields["use_bias"] |= biases == {True}
  windows = read_windows(family, complete, fields["num_layers"])
  fields["sliding_window"] = max(windows)
  fields["layer_pattern"] = pattern_of(windows)
  fields |= read_rope(family, hf, fields["max_len"], windows)
  architecture, own = _find_architecture(family, hf, set(tensor_names)), family.keys
  if architecture.fields["head"] == "mlm" and "head_activation" not in own.values():
    fields["head_activation"] = fields["activation"]
  fields |= architecture.fields
  if "num_labels" not in architecture.fields and fields["head"] in (
    "sequence",
    "token",
  ):
    fields["num_labels"] = len(read_class_names(hf)) or hf.get("num_labels", 2)
  # Equal to the width of a head: the same as none.
  if fields["attention_scale"] == fields["head_dim"] ** -0.5:
    fields["attention_scale"] = 0.0
  return family, architecture, fields


def _check_types(hf: dict) -> None:
  """Raises DataError for a key whose value is of a kind that no version writes."""
  for key, (kind, needed) in _TYPES.items():
    value = hf.get(key)
    if value is not None and not isinstance(value, kind):
      raise wrong_hf_value(key, value, needed)
  names = [*(hf.get("architectures") or ()), *(hf.get("layer_types") or ())]
  if wrong := [name for name in names if not isinstance(name, str)]:
    raise wrong_hf_value("architectures or layer_types", wrong[0], "names alone")
  for key, name in (hf.get("id2label") or {}).items():
    if not (key.isdecimal() and len(key) < 10 and isinstance(name, str)):
      raise wrong_hf_value("id2label", f"{key}: {name}", "names by number")


def read_class_names(hf: dict) -> tuple[str, ...]:
  """Returns the names of a classifier's classes by number; () if it gives none.

  Raises:
    DataError: id2label skips a number, or label2id says otherwise.
  """
  names, numbers = hf.get("id2label") or {}, hf.get("label2id") or {}
  for key, value in (("id2label", names), ("label2id", numbers)):
    if not isinstance(value, dict):
      raise wrong_hf_value(key, f"{value}"[:80], "an object")
  by_number = {str(key): str(name) for key, name in names.items()}
  if not names:
    by_number = {str(number): name for name, number in numbers.items()}
  count = len(names or numbers)
  if set(by_number) != set(map(str, range(count))):
    key = "id2label" if names else "label2id"
    given = " ".join(by_number)[:80]
    raise wrong_hf_value(key, f"the numbers {given}", f"0 to {count - 1}, each once")
  found = tuple(by_number[str(number)] for number in range(count))
  for number, name in enumerate(found):
    if str(numbers.get(name, number)) != str(number):
      raise wrong_hf_value(
        "label2id", f"{name}: {numbers[name]}", f"{number}, as in id2label",
        "delete the one that is wrong",
      )  # fmt: skip
  return found


def _check_keys(family: Family, hf: dict) -> None:
  """Raises DataError for a key or value that could change what is computed."""
  for key, allowed in family.fixed.items():
    if key in hf and hf[key] not in allowed:
      raise wrong_hf_value(key, hf[key], " or ".join(map(str, allowed)))
  known = {*family.keys, *family.fixed, *family.bias_keys, *SILENT_KEYS}
  known |= {*WINDOW_KEYS[family.window], *rope_keys(family)}
  for key, value in hf.items():
    # A value that is off or empty changes nothing, whatever its key means.
    if key not in known and value not in (None, False, [], {}, ""):
      raise wrong_hf_value(
        f"the key {key!r}",
        f"{value}"[:80],
        f"a key that is supported for {family.model_type}",
        "delete it there, if it cannot change what the model computes",
      )


def _check_ranges(family: Family, fields: dict) -> None:
  """Raises DataError for a size that no model has; 0 may stand for the usual one."""
  for key, field in family.keys.items():
    usual = field in ("num_kv_heads", "head_dim", "mlp_dim") and not fields[field]
    if not usual and (needed := number_needed(f"model.{field}", fields[field])):
      raise wrong_hf_value(key, fields[field], needed)


def _to_our_value(key: str, field: str, value: object, fields: dict) -> object:
  """Returns a value of config.json in the type and unit of our field."""
  tables = {
    "activation": HF_ACTIVATIONS,
    "head_activation": HF_ACTIVATIONS,
    "pooling": HF_POOLINGS,
  }
  if field in tables:
    if not isinstance(value, str) or value not in tables[field]:
      raise wrong_hf_value(key, value, "one of " + " ".join(tables[field]))
    return tables[field][value]
  if field == "moe.first_dense_layers":
    layers = [] if value is None else value
    if not isinstance(layers, list) or layers != list(range(len(layers))):
      raise wrong_hf_value(key, value, "the first layers, or none")
    return len(layers)
  if field == "attention_scale":
    return read_number(key, value, above=0.0) ** -0.5
  if field in ("attention_softcap", "logit_softcap"):
    return read_number(key, value or 0.0)
  if value is None and field in ("num_kv_heads", "head_dim", "mlp_dim"):
    return 0
  kind = type(_KNOBS[f"model.{field}"])
  if (kind is bool) is not isinstance(value, bool):
    raise wrong_hf_value(key, value, "true or false" if kind is bool else "a number")
  if kind is not bool and kind(read_number(key, value)) != value:
    raise wrong_hf_value(key, value, "a whole number")
  # Two keys may mean one field.
  if field == "moe.num_experts" and fields[field] not in (0, value):
    raise wrong_hf_value(key, value, f"{fields[field]}, as elsewhere in the file")
  return kind(value)


def _find_architecture(family: Family, hf: dict, names: set[str]) -> Architecture:
  """Returns the architecture that config.json names; of several, one that fits.

  An architecture fits when the tensors that it adds to its family are there.
  """
  named = (hf.get("architectures") or [None])[0]
  fits = [
    architecture
    for architecture in family.architectures
    if all(
      row.name in names
      for row in architecture.rows
      if row.name.endswith(".weight") and row.path != "unembed"
    )
  ]
  for architecture in (*fits, *family.architectures):
    if named in (architecture.name, architecture.instead_of):
      return architecture  # missing tensors are listed later
    # Heads with labels look alike; the tensors tell the others apart.
    has_labels = architecture.fields["head"] in ("sequence", "token", "choice")
    unlabelled = not has_labels or architecture.fields.get("num_labels") == 0
    if named is None and unlabelled and architecture in fits:
      return architecture
  known = dict.fromkeys(a.name for a in family.architectures)
  raise DataError(
    "this architecture is not supported",
    f"architectures={named}",
    f"one of {' '.join(known)}",
    "--architecture=NAME, if the tensors are those of one of them",
  )


def write_config(
  family: Family, architecture: Architecture, fields: dict[str, object]
) -> dict[str, object]:
  """Returns the config.json for `fields`, as far as the family can express them."""
  fields = NEUTRAL_FIELDS | fields
  hf = {"model_type": family.model_type, "architectures": [architecture.name]}
  hf |= {key: allowed[0] for key, allowed in family.fixed.items()}
  hf |= {key: fields["use_bias"] for key in family.bias_keys}
  for key, field in family.keys.items():
    hf[key] = _to_their_value(field, fields, family)
  windows = windows_of(fields)
  hf |= write_windows(family, windows) | write_rope(family, fields)
  if fields["head"] in ("sequence", "token") and fields["num_labels"]:
    names = [f"LABEL_{i}" for i in range(fields["num_labels"])]
    hf["id2label"] = {str(i): name for i, name in enumerate(names)}
    hf["label2id"] = {name: i for i, name in enumerate(names)}
  return hf


def complete_config(hf: dict, like: dict, dtype: str) -> dict:
  """Adds the keys of `like` that do not change what is computed, and the dtype."""
  kept = {k: v for k, v in like.items() if k in SILENT_KEYS - _OF_THE_ORIGINAL}
  if len(kept.get("id2label") or ()) == len(hf.get("id2label", ())):
    hf = {k: v for k, v in hf.items() if k not in ("id2label", "label2id")}
  else:
    kept.pop("id2label", None)
    kept.pop("label2id", None)
  return _NO_IDS | kept | hf | {"dtype": dtype, "torch_dtype": dtype}


def _to_their_value(field: str, fields: dict, family: Family) -> object:
  """Returns one of our fields as config.json spells it."""
  value = fields[field]
  if field in ("activation", "head_activation"):
    return family.gelu_tanh if value == "gelu_tanh" else value
  if field == "pooling":
    return {"first": "cls"}.get(value, value)
  if field == "moe.first_dense_layers":
    return list(range(value))
  if field == "moe.expert_dim":
    return value or fields["mlp_dim"]
  if field == "attention_scale":
    return round((value or fields["head_dim"] ** -0.5) ** -2)
  if field in ("attention_softcap", "logit_softcap"):
    return value or None
  return value


def choose_family(
  fields: dict[str, object], model_type: str = ""
) -> tuple[Family, Architecture, dict[str, object]]:
  """Returns the first family that can express `fields`, and its config.json.

  What a family writes is read back and compared.

  Args:
    model_type: the only family to try, if given.
  Raises:
    ConfigError: no family can; names what would be lost.
  """
  families = [f for f in FAMILIES if f.model_type != "gemma3"]  # written as gemma3_text
  if model_type:
    model_type = model_type.replace("gemma3", "gemma3_text").replace(
      "_text_text", "_text"
    )
    families = [find_family(model_type)]
  closest = None
  for family in families:
    lost, architecture, hf = _try_family(fields, family)
    if not lost:
      return family, architecture, hf
    # Another kind of model counts for more than any number of other differences.
    distance = sum(100 if key in ("causal", "head") else 1 for key, _ in lost)
    if closest is None or distance < closest[0]:
      closest = distance, family.model_type, lost
  _, name, lost = closest
  more = f", ... {len(lost)} in all" if len(lost) > 4 else ""
  ours, theirs = (
    ", ".join(f"{key}={_shorten(values[side])}" for key, values in lost[:4])
    for side in (0, 1)
  )
  raise ConfigError(
    "this model, which no Hugging Face family computes,",
    f"config.model with {ours}{more}",
    f"for {name}: {theirs}",
    "the checkpoint itself, or a model that one of the families can express",
  )


def _shorten(value: object) -> str:
  """Returns a value as text for a message; windows of layers as their pattern."""
  if isinstance(value, tuple):
    return ",".join(pattern_of(list(value))) if any(value) else "global"
  return f"{value}"[:40]


def _try_family(fields: dict, family: Family):
  """Returns ([(field, (ours, read back))] that differ, architecture, config.json)."""
  whole = NEUTRAL_FIELDS | fields
  bare = whole["head"] in ("sequence", "token") and not whole["num_labels"]
  fits = [
    architecture
    for architecture in family.architectures
    if all(whole[key] == value for key, value in architecture.fields.items())
    and (not bare or "num_labels" in architecture.fields)
  ]
  architecture = fits[0] if fits else family.architectures[0]
  hf = write_config(family, architecture, fields)
  names = {row.name for row in (*family.rows, *architecture.rows)}
  try:
    _, _, back = read_config(hf, names)
  except DataError as error:
    return [(family.model_type, (str(error).splitlines()[0], "other values"))], None, hf
  ours, theirs = canonical(fields), canonical(back)
  lost = [
    (key, (ours.get(key), theirs.get(key)))
    for key in sorted(ours | theirs)
    if ours.get(key) != theirs.get(key)
  ]
  return lost, architecture, hf
