"""The classes of a task: their names, their numbers, and what a record says for one.

A class number means nothing without its name, so classes are matched by name. A number
stands for a class only where the config or a model has said which class is which; never
by the sorted order of names that were found in records.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from flaxlm.data.text.formats import clean
from flaxlm.data.text.tables import Record, describe_value
from flaxlm.errors import ConfigError

_FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+)|nan", re.IGNORECASE)


class Labels:
  """The classes of a task, numbered in a given order, or sorted when all are known.

  `open` means that new names may still come; `close` ends it.
  """

  def __init__(
    self, names: Sequence[str] = (), *, numbered: bool = True, owner: str = ""
  ):
    """Makes the classes that are known before any record is read.

    White space around a name means nothing and is dropped, here and in records.

    Args:
      names: in the order of their numbers; () = those that occur, sorted.
      numbered: whether a number in a record may stand for a name.
      owner: the model whose classes these are. Then `close` compares all that occur
        with them; otherwise the first unknown name is refused where it stands.
    Raises:
      ConfigError: a name is empty, or is there twice.
    """
    self.names = tuple(name.strip() for name in names)
    if "" in self.names or len(set(self.names)) < len(self.names):
      needed = "distinct names, none of them empty"
      raise ConfigError(owner or "config.task.labels", _listed(self.names), needed)
    self.numbered, self.owner = numbered, owner
    self.open = not self.names or bool(owner)
    known = () if self.open else self.names
    self._numbers = {name: number for number, name in enumerate(known)}
    self._first: dict[str, tuple[Record, str]] = {}  # while open: where names occurred

  def number(self, value: object, record: Record, column: str) -> int:
    """Returns the number of the class that a record names, or gives as a number.

    While `open`, it is the one that `close` maps to the final number.

    Raises:
      DataError: there is no such class, or no label.
    """
    text = value.strip() if isinstance(value, str) else value
    if text in ("", None) or not isinstance(text, str | int):
      given = "no label" if text in ("", None) else describe_value(value)
      raise record.wrong(f"{column}: {given}", "the name or number of a class")
    name = str(text).lower() if isinstance(text, bool) else clean(str(text), "")[0]
    if name in self._numbers:
      return self._numbers[name]
    if self.open:
      self._first[name] = record, column
      self._numbers[name] = len(self._numbers)
      return self._numbers[name]
    if (number := self._position(name)) is not None:
      return number
    hint = "--config.task.labels with all names, or other records"
    if name.isdecimal() and not self.numbered and not self._are_numbers():
      hint = f"--config.task.labels={','.join(self.names)}, if these are 0, 1 and so on"
    raise record.wrong(
      f"{column}: unknown label {name!r}",
      f"one of the {len(self.names)}: {_listed(self.names)}", hint,
    )  # fmt: skip

  def _position(self, name: str) -> int | None:
    """Returns the class that a number stands for; None if it stands for none."""
    if not self.numbered or self._are_numbers():  # such names are not positions
      return None
    whole = name.isascii() and name.isdecimal() and _is_number(name)
    return int(name) if whole and int(name) < len(self.names) else None

  def _are_numbers(self) -> bool:
    return all(map(_is_number, self.names))

  def close(self) -> np.ndarray:
    """Fixes the order; returns the final number of each number given out so far.

    Raises:
      ConfigError: the names are not those of the model that owns the classes.
      DataError: what occurs may be no class, or one class spelt in two ways.
    """
    found = list(self._numbers)
    if self.open and not self.names:
      self._check(found)
      numbers = all(map(_is_number, found))
      self.names = tuple(sorted(found, key=int if numbers else str))
      self.numbered = False  # by sorting: nobody has said which class is 0
    self._numbers = {name: number for number, name in enumerate(self.names)}
    final = [self._numbers.get(name, self._position(name)) for name in found]
    if None in final:
      self._check(
        [name for name, number in zip(found, final, strict=True) if number is None]
      )
      self._refuse(found)
    self.open, self._first = False, {}
    return np.array(final, np.int32)

  def _refuse(self, found: list[str]) -> None:
    """Raises ConfigError with the names that occur and those of the owner."""
    record, column = self._first[found[0]]
    found = sorted(found)
    raise ConfigError(
      "config.task.labels",
      f"{_listed(found)}, in column {column} of {record.file}",
      f"{_listed(self.names)}, the classes of {self.owner}",
      f"--config.task.labels={','.join(found)[:80]}, in the order of the model's, to "
      "rename its classes",
    )

  def _check(self, names: list[str]) -> None:
    """Raises DataError for names that may be no class, or a second spelling of one."""
    declared = f"--config.task.labels={','.join(sorted(names))[:80]} if all are classes"
    numbers = {int(name) for name in names if _is_number(name)}
    spelt: dict[str, str] = {}
    for name in names:
      record, column = self._first[name]
      if _FRACTION.fullmatch(name):
        given, needed = f"{column}: {name!r}", "a class; a measure is none"
        raise record.wrong(given, needed, declared)
      if _is_number(name) and int(name) < 0 and numbers != {-1, 1}:
        needed = "a class: a negative number often means that there is no label"
        raise record.wrong(f"{column}: {name}", needed, declared)
      other = spelt.setdefault(_spelling(name), name)
      if other != name:
        given = f"{column}: {name!r}, and {other!r} before it"
        raise record.wrong(given, "one spelling of each class", declared)


def same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
  """Returns whether no class that is in both lists has another number in each.

  Names are compared without case, as two lists may spell them differently.
  """
  numbers = {_spelling(name): number for number, name in enumerate(names)}
  return all(
    numbers.get(_spelling(name), number) == number for number, name in enumerate(others)
  )


def _spelling(name: str) -> str:
  """Returns what two spellings of one name share: case, white space, Unicode's form."""
  if _is_number(name):
    return str(int(name))
  folded = unicodedata.normalize("NFKC", name).casefold()
  shown = "".join(c for c in folded if unicodedata.category(c) != "Cf")
  return " ".join(shown.split())


def _is_number(name: str) -> bool:
  return len(name) < 20 and name.removeprefix("-").isdecimal()


def _listed(names: Sequence[str]) -> str:
  return " ".join(names[:10]) + " ..." * (len(names) > 10)
