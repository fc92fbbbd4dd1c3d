"""Where a config comes from: a Python file, a stored run, the command line.

Whatever the source, `check.check_config` accepts the result or refuses it. Library code
never imports a package called `configs`: a user may have one. A shipped config is found
beside the package, by its file.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import pathlib
import stat
import sys
import traceback
import types

from ml_collections import ConfigDict

from flaxlm.config import base
from flaxlm.config.check import check_config, check_keys, check_type, unknown_key
from flaxlm.config.tree import flatten, set_value
from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.json_files import check_fields, parse_json

_TOO_DEEP = (RecursionError, MemoryError)  # what Python's parser raises
# Keys that older versions stored and that no longer choose anything.
_RETIRED = ("step.chunk_size",)
_SEAL = "sha256"  # the key of a stored config's check
_PACKAGE = pathlib.Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "configs"  # where a wheel puts the shipped configs: setup.py
_CLONE = _PACKAGE.parent


def load_config(
  name: str | pathlib.Path, overrides: list[str] = (), allow: bool = False
) -> ConfigDict:
  """Returns the config that `name` gives, with `key=value` texts applied, checked.

  Args:
    name: a Python file with `get_config()`; a run's config.json, to change a few knobs
      of an earlier run; or the bare name of a shipped config, such as `llama3_8b`.
    allow: run a Python file even if other users may write it.
  """
  file = find_config(name)
  if file.suffix == ".json":
    return config_from_json(file.read_bytes(), overrides, file)
  if not allow:
    _check_writers(file)
  try:
    config = _run_config_file(file)
  except (Exception, SystemExit) as error:  # else a command would seem to be done
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f for f in frames if pathlib.Path(f.filename).name == file.name]
    where = f"{name} line {lines[-1].lineno}" if lines else name
    message = " ".join(str(error).split())
    raise ConfigError(
      where,
      f"{lines[-1].line if lines else '?'}",
      f"no {type(error).__name__}",
      message,
    ) from error
  return apply_overrides(config, overrides)


def find_config(name: str | pathlib.Path) -> pathlib.Path:
  """Returns the file of a config; a name without suffix is that of a shipped one."""
  file = pathlib.Path(name)
  shipped = {path.stem: path for path in shipped_configs()}
  if str(name) in shipped:
    return shipped[str(name)]
  if file.is_file() and file.suffix in (".py", ".json"):
    return file
  needed = "a .py file with get_config(), a run's config.json, or a shipped config"
  if file.is_file():
    raise ConfigError(f"--config={name}", "another kind of file", needed)
  known = {stem: stem for stem in shipped}
  known |= {path.stem: str(path) for path in sorted(file.parent.glob("[!_]*.py"))}
  near = difflib.get_close_matches(file.stem, known, n=3) or [*known][:6]
  hint = " or ".join(known[stem] for stem in near)
  raise MissingInputError(
    f"--config={name} does not exist", file.absolute(), needed, hint
  )


def shipped_configs() -> list[pathlib.Path]:
  """Returns the files of the configs that come with flaxlm."""
  folder = _INSTALLED if _INSTALLED.is_dir() else _CLONE / "configs"
  return sorted(folder.glob("[!_]*.py"))


def _check_writers(file: pathlib.Path) -> None:
  """Raises ConfigError if other users may write what a config file would run.

  That is the file, those beside it that it may import, and their directory, unless it
  has the sticky bit, as /tmp has. The user's own group is trusted.
  """
  text = file.read_text(errors="replace")
  beside = [path for path in file.parent.glob("*.py") if path.stem in text]
  for path in (file.absolute().parent, file, *beside):
    status = path.stat()
    group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
    if not (status.st_mode & stat.S_IWOTH or group):
      continue
    if path.is_dir() and status.st_mode & stat.S_ISVTX:
      continue
    raise ConfigError(
      f"--config={file}",
      f"{path}, mode {stat.S_IMODE(status.st_mode):o}: others may change what it runs",
      "a file and a directory that only you can write",
      f"chmod go-w {path}, or --allow",
    )


def _run_config_file(file: pathlib.Path) -> ConfigDict:
  """Returns what `get_config()` of `file` returns.

  The file runs as a module of a package of its own, whose folder is that of the file:
  `from . import gpt2_124m` finds the file beside it. Nothing stays in `sys.modules`.
  """
  package = types.ModuleType("flaxlm_run_config")
  package.__path__ = [str(file.parent.absolute())]
  spec = importlib.util.spec_from_file_location(
    f"{package.__name__}.{file.stem.replace('.', '_')}", file
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules |= {package.__name__: package, spec.name: module}
  try:
    with _clone_importable():
      spec.loader.exec_module(module)
      config = module.get_config()
  finally:
    for name in [name for name in sys.modules if name.startswith(package.__name__)]:
      del sys.modules[name]
  if not isinstance(config, ConfigDict):
    raise TypeError(f"get_config() returned a {type(config).__name__}, no ConfigDict")
  return config


@contextlib.contextmanager
def _clone_importable():
  """Lets a config anywhere say `from configs import base`, where flaxlm is a clone.

  The clone comes last on the path: a `configs` package of the user's comes before it.
  """
  if _INSTALLED.is_dir() or str(_CLONE) in sys.path:
    yield
    return
  sys.path.append(str(_CLONE))
  try:
    yield
  finally:
    sys.path.remove(str(_CLONE))


def apply_overrides(config: ConfigDict, overrides: list[str]) -> ConfigDict:
  """Applies `key=value` texts from the command line, then checks the whole config."""
  check_keys(config)
  for text in overrides:
    key, equals, value = text.partition("=")
    flat = flatten(config)
    if not equals:
      raise ConfigError(f"--config.{key}", "no value", f"--config.{key}=VALUE")
    if key not in flat:
      raise unknown_key(key, flat)
    # A reference links knobs that are equal by default; both follow an override.
    set_value(config, key, _parse_value(key, value, flat[key]))
  check_config(config)
  return config


def _parse_value(key: str, text: str, current: object) -> object:
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
  except (KeyError, ValueError, TypeError, ArithmeticError, *_TOO_DEEP, SyntaxError):
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    needed = names.get(kind, "values separated by commas")
    raise ConfigError(f"config.{key}", text, needed, f"{current}") from None


def config_to_json(config: ConfigDict) -> str:
  """Returns what `config_from_json` reads, one knob per line."""
  return json.dumps(json.loads(config.to_json()), indent=2) + "\n"


def seal_config(config: ConfigDict) -> str:
  """Returns `config_to_json` with a sha256 of its values, which readers check."""
  stored = json.loads(config_to_json(config))
  return json.dumps(stored | {_SEAL: _digest(stored)}, indent=2) + "\n"


def _digest(stored: dict) -> str:
  """Returns the sha256 of a stored config: of its values, not of its layout."""
  return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _check_seal(stored: dict, where: object) -> None:
  """Removes the sha256 of a stored config; raises DataError if it is another's.

  Older versions stored none.
  """
  if _SEAL in stored and stored.pop(_SEAL) != _digest(stored):
    raise DataError(
      f"{where} is damaged, or was edited",
      "values that do not match its sha256",
      "the values that a run stored",
      f'without its line "{_SEAL}" it is a config for a new run',
    )


def config_from_json(
  text: str | bytes, overrides: list[str] = (), where: object = "the stored config"
) -> ConfigDict:
  """Rebuilds a stored config; nothing in it is executed.

  Knobs that it lacks, because an older version wrote it, have their defaults.

  Args:
    where: names the config in messages.
  Raises:
    DataError: it is no JSON, or a value stands where a group does.
    ConfigError: a key or value of it cannot be used.
  """
  config = base.get_config()
  stored = parse_json(text, where, {"data.sources": dict})
  _check_seal(stored, where)
  names = stored["data"]["sources"]
  config.data.sources = base.sources(**{name: base.source() for name in names})
  known = flatten(config)
  _check_groups(stored, config, where)
  for key, value in flatten(stored).items():
    if key in _RETIRED:
      continue
    if key not in known:
      raise unknown_key(key, known)
    value = tuple(value) if isinstance(value, list) else value
    check_type(key, value, known[key])
    set_value(config, key, value)
  return apply_overrides(config, overrides)


def _check_groups(stored: dict, config: ConfigDict, where: object) -> None:
  """Raises DataError or ConfigError where a group stands for a value, or vice versa."""
  for key, value in stored.items():
    if key in config and hasattr(config[key], "items"):
      check_fields(stored, where, {key: dict})
      _check_groups(value, config[key], f"{where}: {key}")
    elif key in config and isinstance(value, dict):
      raise ConfigError(f"{where}: {key}", f"{value}", "a value, not a group")
