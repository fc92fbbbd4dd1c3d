"""Labelled records to fine-tune on: csv, tsv, jsonl, SQuAD's json, CoNLL and TFDS.

A record is a dict of named fields, as the file has them, with the place it was read
from: what is wrong with one is said with its file and line. Nothing is repaired here,
unlike in texts for pretraining: people make labelled files, and can mend them.
"""

import csv
import glob
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from flaxlm import data, errors
from flaxlm.data import catalogue, sources

FORMATS = {  # by the ending of the path; all else is TFDS's
  "csv": "csv",
  "tsv": "tsv",
  "jsonl": "jsonl",
  "json": "squad",
  "conll": "conll",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Where the columns of a kind are if the config does not say: text, text_pair, label.
COLUMNS = {
  "classify": ("text", "", "label"),
  "tag": ("tokens", "", "tags"),
  "qa": ("question", "context", "answers"),
  "choice": ("query", "", "gold"),
  "chat": ("messages", "", ""),
}


class Record(NamedTuple):
  """One labelled example, unchecked."""

  fields: dict[str, object]
  file: str
  unit: str  # what `number` counts: line | question | example
  number: int  # from 1

  @property
  def place(self) -> str:
    return f"{self.file} {self.unit} {self.number}"

  def wrong(self, given: str, needed: str, hint: str = "") -> errors.DataError:
    return wrong(self.place, given, needed, hint)

  def value(self, column: str) -> object:
    """What is in a column; DataError lists the columns if there is none of the name."""
    if column not in self.fields:
      raise no_column(self.place, column, self.fields)
    return self.fields[column]

  def text(self, column: str) -> str:
    value = self.value(column)
    if not isinstance(value, str):
      raise self.wrong(f"{column}: {kind_of(value)}", f"text in column {column}")
    return sources.clean(value, "")[0]

  def texts(self, column: str) -> list[str]:
    """A list of texts, not empty."""
    value = self.value(column)
    if not isinstance(value, list) or not value:
      raise self.wrong(f"{column}: {kind_of(value)}", f"a list of texts in {column}")
    if strange := [item for item in value if not isinstance(item, str)]:
      raise self.wrong(f"{column}: {kind_of(strange[0])}", f"only texts in {column}")
    return [sources.clean(item, "")[0] for item in value]


def no_column(where: str, name: str, has: Iterable[str]) -> errors.DataError:
  return wrong(
    where, f"columns {' '.join(map(str, has))}", f"a column {name}",
    "--config.task.text=, text_pair=, label= or choices= with the names here",
  )  # fmt: skip


class Records(NamedTuple):
  """An opened set of records."""

  path: str
  class_names: dict[
    str, tuple[str, ...]
  ]  # of TFDS's columns, in the order of their ids
  read: Callable[[], Iterator[Record]]


def kind_of(value: object) -> str:
  """A value as errors show it: its type and how it begins."""
  return f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"


def wrong(where: str, given: str, needed: str, hint: str = "") -> errors.DataError:
  lines = [f"{where} cannot be used", f"given:  {given}", f"needed: {needed}"]
  return errors.DataError("\n  ".join(lines + [f"try:    {hint}"] * bool(hint)))


def columns(task: ConfigDict) -> tuple[str, str, str]:
  """The names of the text, text_pair and label columns: the config's, or the usual."""
  given = (task.text, task.text_pair, task.label)
  return tuple(a or b for a, b in zip(given, COLUMNS[task.kind], strict=True))


def choice_columns(task: ConfigDict) -> tuple[str, ...]:
  """The column that lists the options of a choice, or a column for each of them."""
  return tuple(task.choices) or ("choices",)


def has_validation(task: ConfigDict) -> bool:
  """Whether validation records are named, or must be held out of the others."""
  if task.validation_path:
    return True
  return find_format(task, "path") == "tfds" and bool(task.validation_split)


def open_records(task: ConfigDict, validation: bool = False) -> Records:
  """Opens config.task's training or validation records.

  Raises:
    ConfigError, MissingInputError: there is no such file, data set or split.
    DataError: while reading, for the first record that is not as its format asks.
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
    return open_tfds(task, path, "validation_split" if validation else "split")
  files = sources.find_files(f"config.task.{knob}", path)
  names = task.columns

  def read() -> Iterator[Record]:
    for file in files:
      if kind in ("csv", "tsv"):
        rows = csv_rows(file) if kind == "csv" else tsv_rows(file)
        yield from table_records(file, rows, names)
      elif kind == "jsonl":
        yield from json_records(file)
      elif kind == "squad":
        yield from squad_records(file)
      else:
        yield from conll_records(file, names, columns(task))

  return Records(path, {}, read)


def find_format(task: ConfigDict, knob: str) -> str:
  """The format of the records at a path: the config's, or by the ending."""
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


def text_lines(file: str) -> Iterator[tuple[int, str]]:
  """Yields (number, line) of a UTF-8 file; lines keep their ends."""
  try:
    with sources.open_stream(file) as stream:
      for number, line in enumerate(stream, 1):
        try:
          yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
          given = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
          raise wrong(f"{file} line {number}", given, "text in UTF-8") from None
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise sources.damaged(file, error, "a whole file of records") from error


def csv_rows(file: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (first line, values) of RFC 4180's records; empty lines are none."""
  csv.field_size_limit(1 << 30)  # the module's own 128 KB is less than some contexts
  reader = csv.reader((line for _, line in text_lines(file)), strict=True)
  while True:
    line = reader.line_num + 1
    try:
      row = next(reader, None)
    except csv.Error as error:
      raise wrong(
        f"{file} line {line}", str(error), "csv: values with quotes in them in quotes",
        "--config.task.format=tsv for tabs without quoting",
      ) from None  # fmt: skip
    if row is None:
      return
    if row:
      yield line, row


def tsv_rows(file: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (line, values); a quote is a character like any other, as in GLUE."""
  for number, line in text_lines(file):
    line = line.rstrip("\r\n")
    if line:
      yield number, line.split("\t")


def table_records(file: str, rows: Iterable, names: tuple[str, ...]) -> Iterator:
  """Records from rows, the first of which names the columns unless `names` does."""
  for line, row in rows:
    if not names:
      names = tuple(row)
      if len(set(names)) < len(names):
        raise wrong(
          f"{file} line {line}", f"columns {' '.join(names)}", "distinct names",
          "--config.task.columns=NAME,NAME, if the first line is a record",
        )  # fmt: skip
      continue
    if len(row) != len(names):
      raise wrong(
        f"{file} line {line}", f"{len(row)} values",
        f"{len(names)}, one for each of the columns {' '.join(names)}",
      )  # fmt: skip
    yield Record(dict(zip(names, row, strict=True)), file, "line", line)


def json_records(file: str) -> Iterator[Record]:
  for number, line in text_lines(file):
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
    except ValueError as error:
      given = " ".join(str(error).split())
      raise wrong(f"{file} line {number}", given, "one JSON object a line") from None
    if not isinstance(fields, dict):
      given = f"a JSON {type(fields).__name__}"
      raise wrong(f"{file} line {number}", given, "one JSON object a line")
    yield Record(fields, file, "line", number)


def squad_records(file: str) -> Iterator[Record]:
  """One record a question, with the fields that TFDS's squad has."""
  needed = "SQuAD's form: data[].paragraphs[].{context, qas[].{question, answers}}"
  number = 0
  try:
    text = "".join(line for _, line in text_lines(file))
    for article in json.loads(text)["data"]:
      for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
          number += 1
          fields = {"context": paragraph["context"], "answers": [], **question}
          yield Record(fields, file, "question", number)
  except (KeyError, TypeError) as error:
    given = f"{type(error).__name__}: {error}"
    raise wrong(f"{file} after question {number}", given, needed) from None
  except json.JSONDecodeError as error:
    raise wrong(file, f"no JSON: {error}", needed) from None


def conll_records(
  file: str, names: tuple[str, ...], usual: tuple[str, str, str]
) -> Iterator[Record]:
  """One record a sentence: lists of the columns, which tabs or spaces part.

  Without names, the first column holds the words and the last one the tags.
  """
  rows, first = [], 0
  for number, line in text_lines(file):
    line = line.rstrip("\r\n")
    values = line.split("\t") if "\t" in line else line.split()
    if not values or values[0] == "-DOCSTART-":
      if rows:
        yield Record(sentence(rows, names, usual), file, "line", first)
      rows = []
      continue
    width = len(rows[0]) if rows else len(values)
    expected = len(names) or width
    if len(values) != expected or expected < 2:
      raise wrong(
        f"{file} line {number}", f"{len(values)} columns: {line[:60]!r}",
        f"{expected if expected > 1 else 'two or more'}, a word and its tags a line",
      )  # fmt: skip
    first = first if rows else number
    rows.append(values)
  if rows:
    yield Record(sentence(rows, names, usual), file, "line", first)


def sentence(rows: list, names: tuple[str, ...], usual: tuple[str, str, str]) -> dict:
  by_column = [list(column) for column in zip(*rows, strict=True)]
  if names:
    return dict(zip(names, by_column, strict=True))
  return {usual[0]: by_column[0], usual[2]: by_column[-1]}


def open_tfds(task: ConfigDict, path: str, knob: str) -> Records:
  """Opens a split of a TFDS data set, by its name or directory."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise errors.MissingInputError(
      f"config.task.path={path} needs TensorFlow Datasets\n  given:  {error}\n"
      "  needed: pip install tensorflow-datasets tensorflow-cpu"
    ) from error
  builder, split = catalogue.find_builder(tfds, "config.task", path), task[knob]
  if re.match(r"\w*", split)[0] not in {*builder.info.splits, "all"}:
    known = " ".join(builder.info.splits)
    raise errors.ConfigError(
      f"config.task.{knob}", repr(split), f"a split of {path}", known
    )
  features = builder.info.features
  wanted = [*columns(task), *(choice_columns(task) if task.kind == "choice" else ())]
  wanted = [name for name in wanted if name]
  if missing := [name for name in wanted if name not in features]:
    raise no_column(f"{path} {split}", missing[0], features)
  names = {name: class_names(tfds, features[name]) for name in wanted}

  def read() -> Iterator[Record]:
    for number, example in enumerate(tfds_examples(builder, split, wanted), 1):
      fields = {name: plain(example[name], names[name]) for name in wanted}
      yield Record(fields, f"{path} {split}", "example", number)

  return Records(path, names, read)


def tfds_examples(builder, split: str, names: list[str]) -> Iterator[dict]:
  """Examples in the stored order, of the named features; TFRecord needs TensorFlow."""
  if builder.info.file_format.value == "array_record":
    source = builder.as_data_source(split=split)
    for number in range(len(source)):
      yield source[number]
    return
  import tensorflow_datasets as tfds

  tf = data.import_tensorflow()
  config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  decoders = tfds.decode.PartialDecoding(dict.fromkeys(names, True))
  try:
    with data.quiet_stderr():
      dataset = builder.as_dataset(split=split, read_config=config, decoders=decoders)
      examples = dataset.as_numpy_iterator()
    yield from examples
  except tf.errors.OpError as error:
    path = f"{builder.data_path} {split}"
    raise sources.damaged(path, error, "the TFRecord files that TFDS wrote") from error


def class_names(tfds, feature) -> tuple[str, ...]:
  """The names of a ClassLabel, or of a sequence of them; of all else none."""
  if isinstance(feature, tfds.features.ClassLabel):
    return tuple(feature.names or ())
  if isinstance(feature, tfds.features.Sequence):
    return class_names(tfds, feature.feature)
  return ()


def plain(value, names: tuple[str, ...]) -> object:
  """What TFDS yields as Python's own types; classes by their name, -1 as None."""
  if isinstance(value, dict):
    return {key: plain(item, names) for key, item in value.items()}
  if isinstance(value, bytes):
    return value.decode(errors="replace")
  if isinstance(value, list | tuple):
    return [plain(item, names) for item in value]
  if hasattr(value, "tolist"):  # numpy's
    return plain(value.tolist(), names)
  if names:
    return names[value] if value >= 0 else None
  return value
