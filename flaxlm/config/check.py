"""Checks of a whole config: its keys and types, then each value, then their relations.

A config may come from a file, from the command line or from a stored run: all pass
through here, before JAX is imported. ml_collections gives the locked, typed tree; this
adds ranges, relations between knobs, and messages that name the fix.
"""

import difflib
import sys

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
  for name in config.data.sources:
    base.check_source_name(name)
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
    check_type(key, value, expected)
  for key in known:
    if key not in given:
      raise ConfigError(
        f"config.{key}", "nothing", "every knob of flaxlm/config/base.py"
      )


def check_type(key: str, value: object, expected: object) -> None:
  """Raises ConfigError unless a leaf has the type of `expected`.

  A whole number may stand for a float. All tuples of the config are of texts.
  """
  kind = type(expected)
  if type(value) is not kind and not (kind is float and type(value) is int):
    needed = f"a value of type {kind.__name__}"
  elif kind is tuple and not all(isinstance(item, str) for item in value):
    needed = "texts alone"
  elif kind is float and type(value) is int and abs(value) > sys.float_info.max:
    needed = "a number that a float can hold"
  else:
    return
  raise ConfigError(f"config.{key}", f"{value!r}", needed, f"{expected}")


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
