"""config.json of a Hugging Face model to our model fields, and back.

A key that could change what is computed is understood or refused, never passed over.
What is written is read back before it is used: a model that its family cannot express
is refused by the fields that would be lost.
"""

from collections.abc import Iterable

from flaxlm.errors import ConfigError, DataError
from flaxlm.interop.decoders import DECODERS
from flaxlm.interop.encoders import ENCODERS
from flaxlm.interop.family import Architecture, Family
from flaxlm.interop.hf_fields import (
  ACTIVATIONS,
  NEUTRAL,
  POOLINGS,
  SILENT,
  canonical,
  pattern_of,
  windows_of,
)
from flaxlm.interop.hf_rope import read_rope, rope_keys, write_rope
from flaxlm.interop.hf_windows import (
  WINDOW_KEYS,
  read_windows,
  write_windows,
  wrong_hf_value,
)

FAMILIES = (*DECODERS, *ENCODERS)


def find_family(model_type: str) -> Family:
  for family in FAMILIES:
    if family.model_type == model_type:
      return family
  raise DataError(
    "this architecture is not supported\n"
    f"  given:  model_type={model_type} in config.json\n"
    f"  needed: one of {' '.join(f.model_type for f in FAMILIES)}"
  )


def read_config(
  hf: dict, tensor_names: Iterable[str]
) -> tuple[Family, Architecture, dict[str, object]]:
  """Returns the family, the architecture and our fields, with dots for groups.

  Args:
    hf: the content of a config.json.
    tensor_names: as the family spells them; they decide which head a file has.
  Raises:
    DataError: an architecture, a key or a value that we do not compute.
  """
  hf, family = dict(hf), find_family(hf.get("model_type"))
  if "text_config" in hf:
    whole = ("model_type", "architectures")
    text = {k: v for k, v in hf.pop("text_config").items() if k not in whole}
    hf |= text
  check_hf_keys(family, hf)
  complete = family.defaults | hf
  fields = NEUTRAL | family.fields
  for key in family.keys:
    if key not in complete and family.keys[key] not in fields:
      raise wrong_hf_value(key, "nothing", "a value")
  for key, field in family.keys.items():
    if key in complete:
      fields[field] = to_ours(key, field, complete[key], fields)
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
    raise wrong_hf_value("biases in some places alone", given, "all true, or all false")
  fields["use_bias"] |= biases == {True}
  windows = read_windows(family, complete, fields["num_layers"])
  fields["sliding_window"] = max(windows)
  fields["layer_pattern"] = pattern_of(windows)
  fields |= read_rope(family, hf, fields["max_len"], windows)
  architecture, own = find_architecture(family, hf, set(tensor_names)), family.keys
  if architecture.fields["head"] == "mlm" and "head_activation" not in own.values():
    fields["head_activation"] = fields["activation"]
  fields |= architecture.fields
  if "num_labels" not in architecture.fields and fields["head"] in (
    "sequence",
    "token",
  ):
    fields["num_labels"] = len(hf.get("id2label") or "") or hf.get("num_labels", 2)
  # Equal to the width of a head: the same as none.
  if fields["attention_scale"] == fields["head_dim"] ** -0.5:
    fields["attention_scale"] = 0.0
  return family, architecture, fields


def check_hf_keys(family: Family, hf: dict) -> None:
  """Raises DataError for a key or value that could change what is computed."""
  for key, allowed in family.fixed.items():
    if key in hf and hf[key] not in allowed:
      raise wrong_hf_value(key, hf[key], " or ".join(map(str, allowed)))
  known = {*family.keys, *family.fixed, *family.bias_keys, *SILENT}
  known |= {*WINDOW_KEYS[family.window], *rope_keys(family)}
  for key, value in hf.items():
    # What is off or empty changes nothing, whatever it is called.
    if key not in known and value not in (None, False, [], {}, ""):
      raise wrong_hf_value(
        f"the key {key!r}",
        f"{value}"[:80],
        f"a key that is understood for {family.model_type}\n"
        "  try:    delete it there, if it cannot change what the model computes",
      )


def to_ours(key: str, field: str, value: object, fields: dict) -> object:
  """One value of config.json as the type and unit of our field."""
  tables = {
    "activation": ACTIVATIONS,
    "head_activation": ACTIVATIONS,
    "pooling": POOLINGS,
  }
  if field in tables:
    if value not in tables[field]:
      raise wrong_hf_value(key, value, "one of " + " ".join(tables[field]))
    return tables[field][value]
  if field == "moe.first_dense_layers":
    count = len(value or ())
    if list(value or ()) != list(range(count)):
      raise wrong_hf_value(key, value, "the first layers, or none")
    return count
  if field == "attention_scale":
    return float(value) ** -0.5
  if field in ("attention_softcap", "logit_softcap"):
    return float(value or 0)
  if value is None and field in ("num_kv_heads", "head_dim", "mlp_dim"):
    return 0
  kind = float if field in ("norm_epsilon", "moe.aux_loss") else int
  if isinstance(value, bool) or value is None:
    kind = bool
  if not isinstance(value, int | float) or kind(value) != value:
    raise wrong_hf_value(key, value, "a number")
  # Two keys may mean one field.
  if field == "moe.num_experts" and fields[field] not in (0, value):
    raise wrong_hf_value(key, value, f"{fields[field]}, as elsewhere in the file")
  return kind(value)


def find_architecture(family: Family, hf: dict, names: set[str]) -> Architecture:
  """The one that config.json names; among several, one whose tensors are there."""
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
      return architecture  # tensors that it lacks will be listed
    # Heads with labels look alike; the others are told by their tensors.
    has_labels = architecture.fields["head"] in ("sequence", "token", "choice")
    unlabelled = not has_labels or architecture.fields.get("num_labels") == 0
    if named is None and unlabelled and architecture in fits:
      return architecture
  known = dict.fromkeys(a.name for a in family.architectures)
  raise DataError(
    "this architecture is not supported\n"
    f"  given:  architectures={named} in config.json\n"
    f"  needed: one of {' '.join(known)}"
  )


def write_config(
  family: Family, architecture: Architecture, fields: dict[str, object]
) -> dict[str, object]:
  """Returns the config.json that means `fields`, as far as the family can say it."""
  fields = NEUTRAL | fields
  hf = {"model_type": family.model_type, "architectures": [architecture.name]}
  hf |= {key: allowed[0] for key, allowed in family.fixed.items()}
  hf |= {key: fields["use_bias"] for key in family.bias_keys}
  for key, field in family.keys.items():
    hf[key] = to_theirs(field, fields, family)
  windows = windows_of(fields)
  hf |= write_windows(family, windows) | write_rope(family, fields)
  if fields["head"] in ("sequence", "token") and fields["num_labels"]:
    names = [f"LABEL_{i}" for i in range(fields["num_labels"])]
    hf["id2label"] = {str(i): name for i, name in enumerate(names)}
    hf["label2id"] = {name: i for i, name in enumerate(names)}
  return hf


def to_theirs(field: str, fields: dict, family: Family) -> object:
  """One of our fields as config.json has it."""
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
  """Returns the family to write `fields` as, and its config.json.

  The first that says all of them: what it writes is read back and compared.

  Raises:
    ConfigError: none does, or not the one asked for; names what would be lost.
  """
  families = [f for f in FAMILIES if f.model_type != "gemma3"]  # written as gemma3_text
  if model_type:
    model_type = model_type.replace("gemma3", "gemma3_text").replace(
      "_text_text", "_text"
    )
    families = [find_family(model_type)]
  closest = None
  for family in families:
    lost, architecture, hf = try_family(fields, family)
    if not lost:
      return family, architecture, hf
    # Another kind of model is further away than any number of other differences.
    distance = sum(100 if key in ("causal", "head") else 1 for key, _ in lost)
    if closest is None or distance < closest[0]:
      closest = distance, family.model_type, lost
  _, name, lost = closest
  more = f", ... {len(lost)} in all" if len(lost) > 4 else ""
  ours, theirs = (
    ", ".join(f"{key}={shorten(values[side])}" for key, values in lost[:4])
    for side in (0, 1)
  )
  raise ConfigError(
    "this model has no equal at Hugging Face, and",
    f"config.model with {ours}{more}",
    f"for {name}: {theirs}",
    "the checkpoint itself, or a model of one of its families",
  )


def shorten(value: object) -> str:
  """A value for a message; what each layer sees as the pattern that it follows."""
  if isinstance(value, tuple):
    return ",".join(pattern_of(list(value))) if any(value) else "global"
  return f"{value}"[:40]


def try_family(fields: dict, family: Family):
  """Returns ([(field, (ours, what would be read back))], architecture, config.json)."""
  whole = NEUTRAL | fields
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
