"""One reader for JSON that may be damaged, or made to do harm.

A file is read up to a size and its value used up to a depth, because much of our code
walks such values by recursion. What readers of JSON understand differently is refused
rather than guessed: repeated keys, NaN, numbers of many digits, and texts
that cannot be written as UTF-8.
"""

import collections
import json
import math
import os
import re

from flaxlm.errors import DataError

MAX_BYTES = 64 << 20  # large tokenizers have 35 MB, indexes of large models 10 MB
MAX_DEPTH = 100  # far below Python's limit of recursion
_MAX_CONTAINERS = 4_000_000  # each takes 60 to 250 bytes, and as few as 3 in the file
_MAX_DIGITS = 40  # of a whole number; transformers writes int(1e30) for "no limit"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
  dict: "an object",
  list: "an array",
  str: "a text",
  int: "a whole number",
  float: "a number",
  bool: "true or false",
  type(None): "null",
}


def read_json(
  path: str | os.PathLike,
  fields: dict[str, type] | None = None,
  limit: int = MAX_BYTES,
) -> dict:
  """Returns the object in a file; see `parse_json`.

  Raises:
    OSError: the file cannot be opened.
    DataError: it holds anything but such an object.
  """
  with open(path, "rb") as file:
    content = file.read(limit + 1)
  return parse_json(content, path, fields, limit)


def parse_json(
  text: bytes | str,
  where: str | os.PathLike,
  fields: dict[str, type] | None = None,
  limit: int = MAX_BYTES,
  finite: bool = True,
) -> dict:
  """Returns the object that a text holds.

  Args:
    where: names the text in messages: a path, or a path and a line.
    fields: keys that the object must have and their types; see `check_fields`.
    limit: bytes, or characters, that the text may have.
    finite: refuse NaN and infinities. Python writes them, JSON does not have them.
  Raises:
    DataError: the text is no JSON object, is too large or nested too deeply, repeats a
      key, or lacks one of `fields`.
  """
  if len(text) > limit:
    raise _unreadable(where, f"more than {limit:,} bytes")
  try:
    text = text.decode() if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > _MAX_CONTAINERS:
      raise ValueError(f"more than {_MAX_CONTAINERS:,} objects and arrays")
    hooks = {"parse_float": _parse_float, "parse_constant": _refuse} if finite else {}
    value = json.loads(
      text, object_pairs_hook=_make_object, parse_int=_parse_int, **hooks
    )
    if _SURROGATE.search(text):  # half of a pair: found when it is written
      json.dumps(value, ensure_ascii=False).encode()
    deep = isinstance(value, dict | list) and _depth_exceeds(value, MAX_DEPTH)
  except UnicodeDecodeError as error:
    raise _unreadable(where, f"no UTF-8 at byte {error.start}") from None
  except UnicodeEncodeError:
    raise _unreadable(where, "half of a surrogate pair in a text") from None
  except RecursionError:
    deep = True
  except ValueError as error:
    raise _unreadable(where, str(error)) from None
  if deep:
    raise _unreadable(where, f"values nested more than {MAX_DEPTH} deep")
  if not isinstance(value, dict):
    raise _unreadable(where, f"a JSON value that is {_KINDS[type(value)]}")
  check_fields(value, where, fields or {})
  return value


def check_fields(
  value: dict, where: str | os.PathLike, fields: dict[str, type]
) -> None:
  """Raises DataError unless an object has these fields, each of its type.

  Args:
    where: names the object in messages.
    fields: {key: type}. Dots in a key lead into objects. A whole number is a float
      too; true and false are no numbers.
  """
  for key, kind in fields.items():
    found = value
    for step in key.split("."):
      if not isinstance(found, dict) or step not in found:
        raise _wrong_field(where, key, "nothing", kind)
      found = found[step]
    known = (int, float) if kind is float else (kind,)
    if type(found) not in known:
      raise _wrong_field(where, key, f"{found!r}", kind)


def _wrong_field(where, key: str, given: str, kind: type) -> DataError:
  return DataError(f"{where}: {key} cannot be used", given, _KINDS[kind])


def _unreadable(where, reason: str) -> DataError:
  return DataError(f"{where} cannot be read", reason, "an undamaged JSON object")


def _make_object(pairs: list) -> dict:
  value = dict(pairs)
  if len(value) != len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    raise ValueError(f"the key {counts.most_common(1)[0][0]!r} occurs twice")
  return value


def _parse_int(text: str) -> int:
  if len(text) > _MAX_DIGITS:
    raise ValueError(f"a whole number of {len(text)} digits")
  return int(text)


def _parse_float(text: str) -> float:
  value = float(text)
  return value if math.isfinite(value) else _refuse(text[:40])


def _refuse(text: str) -> float:
  raise ValueError(f"the number {text}, which is not finite")


def _depth_exceeds(value: dict | list, most: int) -> bool:
  """Returns whether containers are nested more than `most` deep, without recursion."""
  level = [value]
  for _ in range(most):
    level = [
      item
      for outer in level
      for item in (outer.values() if isinstance(outer, dict) else outer)
      if isinstance(item, dict | list)
    ]
    if not level:
      return False
  return True
