"""Checks of a whole config: its keys and types, then each value, then their relations.

A config may come from a file, from the command line or from a stored run: all pass
through here, before JAX is imported. ml_collections gives the locked, typed tree; this
adds ranges, relations between knobs, and messages that name the fix.
"""

import difflib

from ml_collections import ConfigDict

from flaxlm.config import base
from flaxlm.config.choices import check_value
from flaxlm.config.rules import broken_rules
from flaxlm.config.tree import flatten
from flaxlm.errors import ConfigError


def check_config(config: ConfigDict) -> None:
  """Raises ConfigError for the first value, or pair of values, that cannot work."""
  check_keys(config)
  flat = flatten(config)
  for key, value in flat.items():
    check_value(f"config.{key}", _with_source_named(key, "*"), value)
  for key, needed, hint in broken_rules(config):
    raise ConfigError(f"config.{key}", flat.get(key, "none"), needed, hint)


def check_keys(config: ConfigDict) -> None:
  """Raises ConfigError for keys and types that base.py lacks, and for missing keys.

  The lock of base.py does not suffice: a file may build a tree of its own.
  """
  known = flatten(base.get_config())
  given = {_with_source_named(key, "main") for key in flatten(config)}
  for key, value in flatten(config).items():
    expected = known.get(_with_source_named(key, "main"))
    if expected is None:
      raise unknown_key(key, known)
    if isinstance(expected, float) and type(value) is int:
      continue
    if type(value) is not type(expected):
      kind = type(expected).__name__
      raise ConfigError(
        f"config.{key}", f"{value!r}", f"a value of type {kind}", f"{expected}"
      )
  for key in known:
    if key not in given:
      raise ConfigError(
        f"config.{key}", "nothing", "every knob of flaxlm/config/base.py"
      )


def unknown_key(key: str, known: dict) -> ConfigError:
  """Returns the error for a key that is not `known`, with those that are near it."""
  near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
  last = key.split(".")[-1]
  near = [k for k in known if k.split(".")[-1] == last][:3] or near
  groups = sorted({k.split(".")[0] for k in known})
  hint = " or ".join(f"config.{k}" for k in near) or "a key of " + " ".join(groups)
  return ConfigError(
    f"config.{key}", "an unknown key", "a knob of flaxlm/config/base.py", hint
  )


def _with_source_named(key: str, name: str) -> str:
  """Replaces the name of a source, which the user chooses, by `name`."""
  steps = key.split(".")
  if steps[:2] == ["data", "sources"] and len(steps) > 2:
    steps[2] = name
  return ".".join(steps)
