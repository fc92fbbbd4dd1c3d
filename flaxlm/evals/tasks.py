"""Tasks: what a model is asked, read from task files and the data that they name.

A task file is JSON: a shape, the data, and which columns hold what. Those for well
known data are in task_files/ and go by their names; a path that ends in .json is a
user's own. Items come in a fixed random order, so that the first ones are a sample of
all.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flaxlm.data.tasks.records import json_records, squad_records
from flaxlm.data.text.tables import Record, table_records
from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.json_files import parse_json, read_json

SHAPES = ("choice", "schema", "cloze", "pairs", "rolling", "generate")
_SHIPPED = pathlib.Path(__file__).parent / "task_files"
_ORDER_SEED = 1234


@dataclasses.dataclass(frozen=True)
class TaskFile:
  """The fields of a task file.

  `prompt` and `continuation` are format strings over the columns of a record, such as
  "Question: {query}". The other texts are names of columns.
  """

  shape: str  # choice | schema | cloze | pairs | rolling | generate
  data: str  # .jsonl | .csv | .tsv | .json (SQuAD) | .txt | .zip of jsonl files
  prompt: str = ""  # the context: choice, cloze, generate
  continuation: str = ""  # schema, cloze; without it, cloze asks for the last word
  options: str = ""  # choice: the continuations; schema: the contexts
  gold: str = ""  # choice, schema: the number of the right option, from 0
  good: str = ""  # pairs: the text that should be likelier
  bad: str = ""
  text: str = ""  # rolling
  answers: str = ""  # generate: a text, a list of texts, or SQuAD's answers
  group: str = ""  # a column; items that share its value get a result of their own
  delimiter: str = " "  # between a context and what follows it
  metric: str = "acc"  # the name of the share of right items
  stop: str = "\n"  # generate: a text that ends the answer
  max_tokens: int = 32  # generate


class Item(NamedTuple):
  """One question: its options as (context, continuation), and the right one.

  Texts that are scored whole (pairs, rolling) have no context. cloze, rolling and
  generate have one option; that of generate is the first of the right answers.
  """

  place: str  # where it was read, for messages
  options: tuple[tuple[str, str], ...]
  gold: int = 0
  group: str = ""
  answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
  """A task with its items; `sha256` is of the task file, the data and the limit."""

  name: str
  file: TaskFile
  sha256: str
  items: list[Item]


def shipped_tasks() -> list[str]:
  """Returns the names of the task files that come with the package."""
  return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def open_task(name: str, directory: str | os.PathLike = "", limit: int = 0) -> Task:
  """Reads a task.

  Args:
    name: of a task file that comes with the package, or the path of another one.
    directory: where its data is; "" is the current directory, or for a user's own task
      file the directory of that.
    limit: items to read at most; 0 = all.
  Raises:
    ConfigError: there is no such task.
    MissingInputError: the data is not there.
    DataError: the task file or the data is wrong.
  """
  path = pathlib.Path(name).expanduser()
  if path.suffix != ".json":
    path = _SHIPPED / f"{name}.json"
    if not path.is_file():
      needed = f"{' '.join(shipped_tasks())}, or the path of a .json file"
      raise ConfigError("config.eval.tasks", name, needed)
  elif not path.is_file():
    raise MissingInputError(f"the task file {path} does not exist", path.absolute())
  file = _read_task_file(path)
  folder = pathlib.Path(directory).expanduser()
  if not directory and path.parent != _SHIPPED:
    folder = path.parent
  data = folder / file.data
  if not data.is_file():
    raise MissingInputError(
      f"the data of the task {path.stem} is not there",
      data.absolute(),
      "the directory that holds it",
      "--config.eval.task_data=DIRECTORY",
    )
  with data.open("rb") as stream:
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
  identity = json.dumps([dataclasses.asdict(file), digest, limit])
  items = list(_read_items(file, data))
  if not items:
    raise DataError(f"the task {path.stem} has no items", data)
  order = np.random.default_rng(_ORDER_SEED).permutation(len(items)).tolist()
  items = [items[i] for i in order[: limit or None]]
  return Task(path.stem, file, hashlib.sha256(identity.encode()).hexdigest(), items)


def _read_task_file(path: pathlib.Path) -> TaskFile:
  fields = read_json(path, {"shape": str, "data": str})
  known = {field.name: field.type for field in dataclasses.fields(TaskFile)}
  for key, value in fields.items():
    if key not in known or not isinstance(value, known[key]):
      given = f"{key}: {json.dumps(value)[:60]}"
      needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
      raise DataError(f"the task file {path} cannot be used", given, needed)
  file = TaskFile(**fields)
  if file.shape not in SHAPES:
    raise DataError(
      f"the task file {path} cannot be used",
      f"shape: {file.shape}",
      " ".join(SHAPES),
    )
  needs = {
    "choice": ("options", "gold"),
    "schema": ("options", "gold", "continuation"),
    "cloze": ("prompt",),
    "pairs": ("good", "bad"),
    "rolling": ("text",),
    "generate": ("prompt", "answers"),
  }[file.shape]
  if missing := [name for name in needs if not getattr(file, name)]:
    needed = f"{' '.join(needs)}, for shape {file.shape}"
    raise DataError(f"the task file {path} cannot be used", f"no {missing[0]}", needed)
  return file


def item_hash(items: Sequence[Item]) -> str:
  """Returns a hash of items in their order: results with equal ones compare."""
  texts = [[item.options, item.gold, item.answers] for item in items]
  return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _read_items(file: TaskFile, data: pathlib.Path) -> Iterator[Item]:
  seen = set()
  for record in _read_records(data):
    item = _make_item(file, record)
    if file.group:
      item = item._replace(group=str(_value(record, file.group)))
    if file.shape == "rolling":  # SQuAD repeats a context for each question
      if item.options in seen:
        continue
      seen.add(item.options)
    yield item


def _read_records(data: pathlib.Path) -> Iterator[Record]:
  kind, path = data.suffix.removeprefix(".").lower(), str(data)
  if kind == "jsonl":
    yield from json_records(path)
  elif kind in ("csv", "tsv"):
    yield from table_records(path, kind)
  elif kind == "json":
    yield from squad_records(path)
  elif kind == "txt":
    yield Record({"text": data.read_text("utf-8")}, path, "file", 1)
  elif kind == "zip":
    yield from _zip_records(path)
  else:
    needed = "a name that ends in jsonl, csv, tsv, json, txt or zip"
    raise DataError(f"{data} cannot be read", f"the ending {data.suffix!r}", needed)


def _zip_records(path: str) -> Iterator[Record]:
  try:
    with zipfile.ZipFile(path) as archive:
      for name in sorted(archive.namelist()):
        # macOS adds hidden files with the same ending.
        if not name.endswith(".jsonl") or pathlib.PurePath(name).name.startswith("."):
          continue
        where = f"{path}:{name}"
        for number, line in enumerate(archive.read(name).splitlines(), 1):
          yield Record(parse_json(line, f"{where} {number}"), where, "line", number)
  except zipfile.BadZipFile as error:
    raise DataError(f"{path} cannot be read", error, "a zip archive") from None


def _make_item(file: TaskFile, record: Record) -> Item:
  """Returns the item of a record, by the shape of the task."""
  if file.shape == "choice":
    context = _fill(file.prompt, record)
    options = [
      (context, file.delimiter + text) for text in _texts(record, file.options)
    ]
    return _choose(file, record, options)
  elif file.shape == "schema":
    rest = file.delimiter + _fill(file.continuation, record)
    return _choose(
      file, record, [(text, rest) for text in _texts(record, file.options)]
    )
  elif file.shape == "cloze":
    return Item(record.place, (_cloze(file, record),))
  elif file.shape == "pairs":
    texts = _text(record, file.good), _text(record, file.bad)
    return Item(record.place, tuple(("", text) for text in texts))
  elif file.shape == "rolling":
    return Item(record.place, (("", _text(record, file.text)),))
  elif file.shape == "generate":
    answers = _answers(record, file.answers)
    option = _fill(file.prompt, record), file.delimiter + answers[0]
    return Item(record.place, (option,), answers=answers)
  raise ValueError(f"no items of shape {file.shape}")


def _choose(file: TaskFile, record: Record, options: list) -> Item:
  gold = _value(record, file.gold)
  if type(gold) is not int or not 0 <= gold < len(options):
    needed = f"the number of one of {len(options)} options, from 0"
    raise record.wrong(f"{file.gold}: {json.dumps(gold)[:60]}", needed)
  return Item(record.place, tuple(options), gold)


def _cloze(file: TaskFile, record: Record) -> tuple[str, str]:
  context = _fill(file.prompt, record)
  if file.continuation:
    return context, file.delimiter + _fill(file.continuation, record)
  before, space, word = context.rpartition(" ")
  if not before or not word:
    raise record.wrong(f"{context[-60:]!r}", "a text whose last word can be asked for")
  return before, space + word


def _value(record: Record, column: str) -> object:
  if column not in record.fields:
    given = f"columns {' '.join(map(str, record.fields))}"
    raise record.wrong(given, f"a column {column}", "the task file's names of columns")
  return record.fields[column]


def _text(record: Record, column: str) -> str:
  value = _value(record, column)
  if not isinstance(value, str) or not value:
    raise record.wrong(f"{column}: {json.dumps(value)[:60]}", "a text")
  return value


def _texts(record: Record, column: str) -> list[str]:
  value = _value(record, column)
  good = isinstance(value, list) and len(value) > 1
  if not good or not all(isinstance(text, str) and text for text in value):
    raise record.wrong(
      f"{column}: {json.dumps(value)[:60]}", "a list of two texts or more"
    )
  return value


def _answers(record: Record, column: str) -> tuple[str, ...]:
  value = _value(record, column)
  listed = value if isinstance(value, list) else [value]
  texts = [a["text"] if isinstance(a, dict) and "text" in a else a for a in listed]
  if not texts or not all(isinstance(text, str) and text for text in texts):
    raise record.wrong(f"{column}: {json.dumps(value)[:60]}", "texts of right answers")
  return tuple(dict.fromkeys(texts))


def _fill(form: str, record: Record) -> str:
  try:
    return form.format_map(record.fields)
  except (KeyError, IndexError, AttributeError, ValueError) as error:
    given = f"columns {' '.join(map(str, record.fields))}, and {form!r} ({error})"
    raise record.wrong(given, "the columns that the format names") from None
