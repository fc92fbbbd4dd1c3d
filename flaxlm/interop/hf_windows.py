"""Sliding windows and layer patterns in a config.json, in the families' spellings."""

from flaxlm.interop.family import GLOBAL, LOCAL, Family, wrong_hf_value

# The values of `Family.window`, and the keys of config.json that each understands.
WINDOW_KEYS = {
  "none": (),
  "all": ("sliding_window",),
  "qwen": (
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
  ),
  "qwen3_moe": ("sliding_window", "use_sliding_window", "max_window_layers"),
  "gemma": ("sliding_window", "layer_types", "sliding_window_pattern"),
  "modernbert": ("local_attention", "layer_types", "global_attn_every_n_layers"),
}


def read_windows(family: Family, hf: dict, num_layers: int) -> list[int]:
  """Returns the window of each layer in tokens, the query included; 0 is the whole row.

  Args:
    hf: config.json, completed by the defaults of the family.
  Raises:
    DataError: an unknown kind of layer, or local layers without a window.
  """
  kind = family.window
  if kind == "none":
    return [0] * num_layers
  if kind in ("all", "qwen3_moe"):
    used = kind == "all" or hf.get("use_sliding_window")
    return [_size(hf, "sliding_window") if used else 0] * num_layers
  types = hf.get("layer_types")
  if types is None:
    is_local = _default_pattern(kind, hf, num_layers)
    types = [LOCAL if local else GLOBAL for local in is_local]
  if len(types) != num_layers or not set(types) <= {GLOBAL, LOCAL}:
    given = f"{len(types)} of {' '.join(sorted(set(types)))}"
    raise wrong_hf_value("layer_types", given, f"{num_layers} of {GLOBAL} or {LOCAL}")
  if LOCAL not in types:
    return [0] * num_layers
  if kind == "modernbert":
    window = (
      _size(hf, "local_attention") // 2 + 1
    )  # half on each side, and the token itself
  elif kind in ("qwen", "gemma"):
    window = _size(hf, "sliding_window")
  else:
    raise AssertionError(kind)
  if not window or (kind == "qwen" and not hf.get("use_sliding_window")):
    raise wrong_hf_value("layer_types", f"{LOCAL} without a window", "sliding_window")
  return [window if name == LOCAL else 0 for name in types]


def _default_pattern(kind: str, hf: dict, layers: int) -> list[bool]:
  """Returns whether each layer is local, where `layer_types` is missing."""
  if kind == "modernbert":
    period = _size(hf, "global_attn_every_n_layers", 1)
    return [i % period > 0 for i in range(layers)]
  if kind == "gemma":
    period = _size(hf, "sliding_window_pattern", 1)
    return [(i + 1) % period > 0 for i in range(layers)]
  if kind != "qwen":
    raise AssertionError(kind)
  if not hf.get("use_sliding_window"):
    return [False] * layers
  if "qkv_bias" in hf:  # Qwen 2 MoE: its rule has changed between versions
    raise wrong_hf_value("use_sliding_window", True, "layer_types beside it")
  first = _size(hf, "max_window_layers")
  return [i >= first for i in range(layers)]


def _size(hf: dict, key: str, least: int = 0) -> int:
  """Returns the whole number at a key; null is 0."""
  value = 0 if hf[key] is None else hf[key]
  if type(value) is not int or not least <= value < 2**31:
    raise wrong_hf_value(key, value, f"a whole number of at least {least}")
  return value


def write_windows(family: Family, windows: list[int]) -> dict[str, object]:
  """Returns the keys of config.json for the windows of the layers."""
  window, kind = max(windows), family.window
  if kind == "none":
    return {}
  if kind == "all":
    return {"sliding_window": window or None}
  if kind == "qwen3_moe":
    return {"sliding_window": window or None, "use_sliding_window": window > 0}
  types = [LOCAL if w else GLOBAL for w in windows]
  written = {"layer_types": types}
  if kind == "qwen":
    first_local = types.index(LOCAL) if window else len(types)
    return written | {
      "sliding_window": window or None,
      "use_sliding_window": window > 0,
      "max_window_layers": first_local,
    }
  if kind == "gemma":
    written["sliding_window"] = window or family.defaults["sliding_window"]
    key = "sliding_window_pattern"
  elif kind == "modernbert":
    written["local_attention"] = 2 * (window - 1) if window else 128
    key = "global_attn_every_n_layers"
  else:
    raise AssertionError(kind)
  # The older key too, if the layers follow its rule.
  local = [w > 0 for w in windows]
  for period in range(1, len(local) + 2):
    if _default_pattern(kind, {key: period}, len(local)) == local:
      return written | {key: period}
  return written
