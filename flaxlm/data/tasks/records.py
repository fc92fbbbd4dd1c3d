"""Reads labelled records for fine-tuning: csv, tsv, jsonl, SQuAD, CoNLL and TFDS.

A record keeps the fields of its file, and its place there for messages (tables.py in
text/). Unlike text for pretraining, records are never repaired: a bad one is an error.
"""

import glob
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.text.formats import find_files
from flaxlm.data.text.tables import (
  Record,
  no_column,
  numbered_lines,
  table_records,
  unusable,
  without_newline,
)
from flaxlm.data.text.tfds import (
  check_tfds_split,
  import_tfds,
  open_builder,
  tfds_examples,
)
from flaxlm.json_files import parse_json

FORMATS = {  # by the ending of the path; everything else is a TFDS name
  "csv": "csv",
  "tsv": "tsv",
  "jsonl": "jsonl",
  "json": "squad",
  "conll": "conll",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# The default columns of each kind: text, text_pair, label.
COLUMNS = {
  "classify": ("text", "", "label"),
  "tag": ("tokens", "", "tags"),
  "qa": ("question", "context", "answers"),
  "choice": ("query", "", "gold"),
  "chat": ("messages", "", ""),
}


class Records(NamedTuple):
  """An opened set of records."""

  path: str
  # Of the columns of a TFDS data set, in the order of their ids.
  class_names: dict[str, tuple[str, ...]]
  read: Callable[[], Iterator[Record]]


def columns(task: ConfigDict) -> tuple[str, str, str]:
  """Returns the names of the text, text_pair and label columns, or their defaults."""
  given = (task.text, task.text_pair, task.label)
  return tuple(a or b for a, b in zip(given, COLUMNS[task.kind], strict=True))


def choice_columns(task: ConfigDict) -> tuple[str, ...]:
  """Returns the column that lists the options of a choice, or one column per option."""
  return tuple(task.choices) or ("choices",)


def has_validation(task: ConfigDict) -> bool:
  """Returns whether the config names validation records, so none need be held out."""
  if task.validation_path:
    return True
  return find_format(task, "path") == "tfds" and bool(task.validation_split)


def open_records(task: ConfigDict, validation: bool = False) -> Records:
  """Opens config.task's training or validation records.

  Raises:
    ConfigError, MissingInputError: there is no such file, data set or split.
    DataError: while reading, for the first malformed record.
  """
  knob = "validation_path" if validation and task.validation_path else "path"
  path = task[knob]
  if not path:
    raise errors.ConfigError(
      f"config.task.{knob}", "''", f"where the records of task.kind={task.kind} are",
      "train.csv or a TFDS name such as glue/sst2",
    )  # fmt: skip
  kind = find_format(task, knob)
  if kind == "tfds":
    return open_tfds_records(task, path, "validation_split" if validation else "split")
  files = find_files(f"config.task.{knob}", path)
  names = task.columns

  def read() -> Iterator[Record]:
    for file in files:
      if kind in ("csv", "tsv"):
        yield from table_records(file, kind, names)
      elif kind == "jsonl":
        yield from json_records(file)
      elif kind == "squad":
        yield from squad_records(file)
      elif kind == "conll":
        yield from conll_records(file, names, columns(task))
      else:
        raise ValueError(f"no reader for records of format {kind}")

  return Records(path, {}, read)


def find_format(task: ConfigDict, knob: str) -> str:
  """Returns the format of the config, or else the one that the path's ending names."""
  if task.format != "auto":
    return task.format
  name = os.path.basename(task[knob]).lower()
  for ending in COMPRESSED:
    name = name.removesuffix(ending)
  if (ending := name.rpartition(".")[2]) in FORMATS:
    return FORMATS[ending]
  local = os.path.expanduser(task[knob])
  if glob.has_magic(local) or os.path.isfile(local):
    raise errors.ConfigError(
      "config.task.format", f"auto, with config.task.{knob}={task[knob]}",
      f"a path that ends in {' '.join(FORMATS)}, or the format", "csv",
    )  # fmt: skip
  return "tfds"


def json_records(file: str) -> Iterator[Record]:
  """Yields one record per line, skipping blank lines."""
  for number, line in numbered_lines(file):
    if line.strip():
      fields = parse_json(line, f"{file} line {number}", finite=False)
      yield Record(fields, file, "line", number)


def squad_records(file: str) -> Iterator[Record]:
  """Yields one record per question, with the fields of TFDS's squad."""
  needed = "SQuAD's form: data[].paragraphs[].{context, qas[].{question, answers}}"
  number = 0
  text = "".join(line for _, line in numbered_lines(file))
  try:
    for article in parse_json(text, file, limit=1 << 30)["data"]:
      for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
          number += 1
          fields = {"context": paragraph["context"], **question}
          if fields.get("is_impossible") is True:  # may leave out its empty answers
            fields.setdefault("answers", [])
          yield Record(fields, file, "question", number)
  except (KeyError, TypeError) as error:
    given = f"{type(error).__name__}: {error}"
    raise unusable(f"{file} after question {number}", given, needed) from None


def conll_records(
  file: str, names: tuple[str, ...], usual: tuple[str, str, str]
) -> Iterator[Record]:
  """Yields one record per sentence: the lists of its columns.

  Tabs or spaces separate columns, and empty lines separate sentences. Without `names`,
  the first column holds the words and the last one the tags.
  """
  rows, first = [], 0
  for number, line in numbered_lines(file):
    line = without_newline(line, f"{file} line {number}")
    # Other white space separates nothing: a no-break space is part of a word.
    spaced = [value for value in line.split(" ") if value]
    values = line.split("\t") if "\t" in line else spaced
    if not line.strip() or values[0] == "-DOCSTART-":
      if rows:
        yield Record(_sentence(rows, names, usual), file, "line", first)
      rows = []
      continue
    width = len(rows[0]) if rows else len(values)
    expected = len(names) or width
    if len(values) != expected or expected < 2:
      raise unusable(
        f"{file} line {number}", f"{len(values)} columns: {line[:60]!r}",
        f"{expected if expected > 1 else 'two or more'}, a word and its tags per line",
      )  # fmt: skip
    first = first if rows else number
    rows.append(values)
  if rows:
    yield Record(_sentence(rows, names, usual), file, "line", first)


def _sentence(rows: list, names: tuple[str, ...], usual: tuple[str, str, str]) -> dict:
  """Returns the fields of a CoNLL sentence from its rows."""
  by_column = [list(column) for column in zip(*rows, strict=True)]
  if names:
    return dict(zip(names, by_column, strict=True))
  return {usual[0]: by_column[0], usual[2]: by_column[-1]}


def open_tfds_records(task: ConfigDict, path: str, knob: str) -> Records:
  """Opens a split of a TFDS data set, by its name or directory."""
  tfds = import_tfds(f"config.task.path={path}")
  builder, split = open_builder("config.task", path), task[knob]
  check_tfds_split(builder, f"config.task.{knob}", split, path)
  features = builder.info.features
  wanted = [*columns(task), *(choice_columns(task) if task.kind == "choice" else ())]
  wanted = [name for name in wanted if name]
  if missing := [name for name in wanted if name not in features]:
    raise no_column(f"{path} {split}", missing[0], features)
  names = {name: class_names(tfds, features[name]) for name in wanted}

  def read() -> Iterator[Record]:
    for number, example in enumerate(tfds_examples(builder, split, wanted), 1):
      try:
        fields = {name: plain(example[name], names[name]) for name in wanted}
      except (UnicodeDecodeError, IndexError) as error:
        place, needed = (
          f"{path} {split} example {number}",
          "text in UTF-8, known classes",
        )
        raise unusable(place, error, needed) from None
      yield Record(fields, f"{path} {split}", "example", number)

  return Records(path, names, read)


def class_names(tfds, feature) -> tuple[str, ...]:
  """Returns the names of a ClassLabel or a sequence of them; () for other features."""
  if isinstance(feature, tfds.features.ClassLabel):
    return tuple(feature.names or ())
  if isinstance(feature, tfds.features.Sequence):
    return class_names(tfds, feature.feature)
  return ()


def plain(value, names: tuple[str, ...]) -> object:
  """Converts TFDS values to Python types: class names for numbers, None for -1.

  Raises:
    UnicodeDecodeError, IndexError: bytes are no UTF-8, or there is no such class.
  """
  if isinstance(value, dict):
    return {key: plain(item, names) for key, item in value.items()}
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, list | tuple):
    return [plain(item, names) for item in value]
  if hasattr(value, "tolist"):  # numpy's
    return plain(value.tolist(), names)
  if names:
    return names[value] if value >= 0 else None
  return value
