"""Rotary positions in a config.json, in their several spellings.

transformers 4 has `rope_theta` and `rope_scaling`, with further keys for the local
layers of some families; transformers 5 has `rope_parameters`, where the layers of a
model may differ. An export has both spellings, so that either version can read it.
"""

import math

from flaxlm.config.choices import number_needed
from flaxlm.interop.family import GLOBAL, LOCAL, Family, read_number, wrong_hf_value

# The keys of each kind of scaling, and our fields.
_SCALINGS = {
  "default": {},
  "linear": {"factor": "rope.factor"},
  "llama3": {
    "factor": "rope.factor",
    "original_max_position_embeddings": "rope.original_max_len",
    "low_freq_factor": "rope.low_frequency_factor",
    "high_freq_factor": "rope.high_frequency_factor",
  },
  "yarn": {
    "factor": "rope.factor",
    "original_max_position_embeddings": "rope.original_max_len",
    "beta_fast": "rope.beta_fast",
    "beta_slow": "rope.beta_slow",
    "attention_factor": "rope.attention_factor",
  },
}
ROPE_FIELDS = {
  "rope.scaling": "none",
  "rope.factor": 1.0,
  "rope.original_max_len": 0,
  "rope.low_frequency_factor": 1.0,
  "rope.high_frequency_factor": 4.0,
  "rope.beta_fast": 32.0,
  "rope.beta_slow": 1.0,
  "rope.attention_factor": 0.0,
}
# The keys in transformers 4 for the base of (global, local) layers.
_THETAS = {
  "one": ("rope_theta", None),
  "gemma3": ("rope_theta", "rope_local_base_freq"),
  "modernbert": ("global_rope_theta", "local_rope_theta"),
}


def rope_keys(family: Family) -> set[str]:
  """Returns the keys of config.json that `read_rope` understands."""
  if family.rope == "none":
    return set()
  named = {key for key in _THETAS[family.rope] if key}
  return named | {"rope_scaling", "rope_parameters", "partial_rotary_factor"}


def read_rope(
  family: Family, hf: dict, max_len: int, windows: list[int]
) -> dict[str, object]:
  """Returns our rope fields.

  Args:
    hf: config.json as it is, without defaults.
    windows: of each layer, in tokens; 0 is the whole row. Only kinds of layers that
      occur matter.
  Raises:
    DataError: the scaling is not supported, or two spellings disagree.
  """
  if family.rope == "none":
    return {}
  if hf.get("partial_rotary_factor") not in (None, 1.0):
    raise wrong_hf_value("partial_rotary_factor", hf["partial_rotary_factor"], "1.0")
  new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
  nested = any(kind in new for kind in (GLOBAL, LOCAL))
  if new and not nested and family.rope != "one":
    raise wrong_hf_value("rope_parameters", new, f"values for {GLOBAL} and {LOCAL}")
  keys = _THETAS[family.rope]
  both = family.rope != "gemma3"  # Gemma 3's rope_scaling is for global layers alone
  ropes = [
    _read_one(
      _object(kind, new.get(kind)) if nested else new,
      old if both or kind == GLOBAL else {},
      hf.get(key or keys[0]),
      family.defaults[key or keys[0]],
      max_len,
    )
    for kind, key in zip((GLOBAL, LOCAL), keys, strict=True)
  ]
  if 0 not in windows:  # no global layers: their rope has no effect
    return ropes[1] | {"rope.local_theta": 0.0}
  if not any(windows) or ropes[0] == ropes[1]:
    return ropes[0] | {"rope.local_theta": 0.0}
  if ropes[1]["rope.scaling"] != "none" or family.rope == "one":
    raise wrong_hf_value(
      "rope_parameters", new or old, "one rope for all layers, or local layers unscaled"
    )
  return ropes[0] | {"rope.local_theta": ropes[1]["rope.theta"]}


def _object(key: str, value: object) -> dict:
  if value is not None and not isinstance(value, dict):
    raise wrong_hf_value(f"rope_parameters: {key}", value, "an object")
  return value or {}


def _read_one(new: dict, old: dict, theta, default_theta: float, max_len: int) -> dict:
  """Returns the rope fields of one kind of layer, from every key that sets them."""
  found: dict[str, object] = {}
  for source in (new, old, {"rope_theta": theta}):
    for key, value in source.items():
      key = "rope_type" if key == "type" else key
      if value is None:
        continue
      if found.setdefault(key, value) != value:
        raise wrong_hf_value(key, f"{found[key]} and {value}", "one value")
  kind = found.pop("rope_type", "default")
  theta = read_number("rope_theta", found.pop("rope_theta", default_theta), above=0)
  if found.pop("partial_rotary_factor", 1.0) != 1.0:
    raise wrong_hf_value("partial_rotary_factor", new, "1.0")
  if not isinstance(kind, str) or kind not in _SCALINGS:
    needed = "one of " + " ".join(_SCALINGS)
    raise wrong_hf_value("the rope scaling (rope_type)", kind, needed)
  if kind in ("llama3", "yarn"):
    found.setdefault("original_max_position_embeddings", max_len)
    if kind == "yarn":
      key = "original_max_position_embeddings"
      found.setdefault("factor", max_len / read_number(key, found[key], above=0))
      _set_yarn_attention_factor(found)
  rope = {"rope.theta": theta} | ROPE_FIELDS
  rope["rope.scaling"] = "none" if kind == "default" else kind
  for key, value in found.items():
    if key not in _SCALINGS[kind]:
      raise wrong_hf_value(f"the rope scaling {kind}: {key}", value, "no such key")
    field, number = _SCALINGS[kind][key], read_number(key, value)
    rope[field] = int(number) if field == "rope.original_max_len" else number
    if needed := number_needed(f"model.{field}", rope[field]):
      raise wrong_hf_value(key, value, needed)
  if kind != "default" and "factor" not in found:
    raise wrong_hf_value(f"the rope scaling {kind}", found, "a factor")
  return rope


def _set_yarn_attention_factor(found: dict) -> None:
  """Replaces DeepSeek's mscale pair by the attention factor that it means."""
  scales = found.pop("mscale", None), found.pop("mscale_all_dim", None)
  if found.pop("truncate", True) is not True:
    raise wrong_hf_value("the rope scaling yarn: truncate", False, "true")
  if all(scales) and "attention_factor" not in found:
    scales = [read_number("mscale", scale, above=0) for scale in scales]
    log = math.log(max(read_number("factor", found["factor"]), 1))
    found["attention_factor"] = (0.1 * scales[0] * log + 1) / (
      0.1 * scales[1] * log + 1
    )


def write_rope(family: Family, fields: dict) -> dict[str, object]:
  """Returns the keys of config.json for our rope fields, in both spellings."""
  if family.rope == "none":
    return {}
  kind = fields["rope.scaling"].replace("none", "default")
  theta, local_theta = fields["rope.theta"], fields["rope.local_theta"]
  scaling = {"rope_type": kind}
  for key, field in _SCALINGS[kind].items():
    if field != "rope.attention_factor" or fields[field]:
      scaling[key] = fields[field]
  scaled = None if kind == "default" else scaling | {"type": kind}
  everywhere = scaling | {"rope_theta": theta}
  if family.rope == "one":
    return {
      "rope_theta": theta,
      "rope_scaling": scaled,
      "rope_parameters": everywhere,
    }
  local = everywhere
  if local_theta:
    local = {"rope_type": "default", "rope_theta": local_theta}
  keys = _THETAS[family.rope]
  written = {
    keys[0]: theta,
    keys[1]: local_theta or theta,
    "rope_parameters": {GLOBAL: everywhere, LOCAL: local},
  }
  # The old key applies to all layers of ModernBERT, and to Gemma 3's global layers.
  meant = kind if family.rope == "modernbert" else "default"
  if local["rope_type"] == meant:
    written["rope_scaling"] = scaled
  return written
