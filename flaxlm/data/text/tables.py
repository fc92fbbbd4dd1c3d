"""Records with named fields, and the tables (csv, tsv) that hold them.

A record knows the file and line that it came from, so an error can name them. Unlike
text for pretraining, records are not repaired: people make tables and can mend them.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flaxlm import errors
from flaxlm.data.text.formats import READ_ERRORS, clean, damaged_file, open_stream


class Record(NamedTuple):
  """The unchecked fields of one row or example, and where it was read."""

  fields: dict[str, object]
  file: str
  unit: str  # what `number` counts: line | question | example
  number: int  # from 1

  @property
  def place(self) -> str:
    """The file and the number of the record, for messages."""
    return f"{self.file} {self.unit} {self.number}"

  def wrong(self, given: str, needed: str, hint: str = "") -> errors.DataError:
    """Returns the error that says what is wrong with this record."""
    return unusable(self.place, given, needed, hint)

  def value(self, column: str) -> object:
    """Returns the value of a column; DataError lists the columns if it is missing."""
    if column not in self.fields:
      raise no_column(self.place, column, self.fields)
    return self.fields[column]

  def text(self, column: str) -> str:
    """Returns the text in a column; DataError if it holds anything else."""
    value = self.value(column)
    if not isinstance(value, str):
      raise self.wrong(f"{column}: {describe_value(value)}", f"text in column {column}")
    return clean(value, "")[0]

  def texts(self, column: str) -> list[str]:
    """Returns the texts in a column that holds a list; DataError if it is empty."""
    value = self.value(column)
    if not isinstance(value, list) or not value:
      given = f"{column}: {describe_value(value)}"
      raise self.wrong(given, f"a list of texts in {column}")
    if others := [item for item in value if not isinstance(item, str)]:
      given = f"{column}: {describe_value(others[0])}"
      raise self.wrong(given, f"only texts in {column}")
    return [clean(item, "")[0] for item in value]


def unusable(where: str, given: str, needed: str, hint: str = "") -> errors.DataError:
  """Returns the error for a record or file that is not as its format asks."""
  return errors.DataError(f"{where} cannot be used", given, needed, hint)


def no_column(where: str, name: str, has: Iterable[str]) -> errors.DataError:
  """Returns the error for records without column `name`, listing those they have."""
  return unusable(
    where, f"columns {' '.join(map(str, has))}", f"a column {name}",
    "--config.task.text=, text_pair=, label= or choices= with the names here",
  )  # fmt: skip


def describe_value(value: object) -> str:
  """Returns a value as messages show it: its type and its first characters."""
  return f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"


def numbered_lines(file: str) -> Iterator[tuple[int, str]]:
  """Yields (number from 1, line) of a UTF-8 file; lines keep their newlines."""
  try:
    with open_stream(file) as stream:
      for number, line in enumerate(stream, 1):
        try:
          yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
          given = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
          raise unusable(f"{file} line {number}", given, "text in UTF-8") from None
  except READ_ERRORS as error:
    raise damaged_file(file, error, "a whole file of records") from error


def without_newline(line: str, place: str) -> str:
  """Returns a line without the LF or CR LF that ends it; DataError for another CR."""
  line = line.removesuffix("\n").removesuffix("\r")
  if "\r" in line:
    given = f"a CR after {line.partition(chr(13))[0][:40]!r}"
    raise unusable(place, given, "lines that end in LF or CR LF")
  return line


def csv_rows(file: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (first line, values) of each record (RFC 4180), without blank lines."""
  csv.field_size_limit(1 << 30)  # the default, 128 KB, is less than some contexts
  reader = csv.reader((line for _, line in numbered_lines(file)), strict=True)
  while True:
    line = reader.line_num + 1
    try:
      row = next(reader, None)
    except csv.Error as error:
      raise unusable(
        f"{file} line {line}", str(error),
        "csv: lines that end in LF or CR LF; values that hold quotes, in quotes",
        "--config.task.format=tsv for tabs without quoting",
      ) from None  # fmt: skip
    if row is None:
      return
    if row and not (len(row) == 1 and row[0].isspace()):
      yield line, row


def tsv_rows(file: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (line, values); quotes have no special meaning, as in GLUE."""
  for number, line in numbered_lines(file):
    line = without_newline(line, f"{file} line {number}")
    if line.strip() or "\t" in line:
      yield number, line.split("\t")


def table_rows(file: str, kind: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (line, values) of a table of kind csv or tsv."""
  if kind == "csv":
    return csv_rows(file)
  elif kind == "tsv":
    return tsv_rows(file)
  raise ValueError(f"no table has the format {kind}")


def table_records(
  file: str, kind: str, names: tuple[str, ...] = ()
) -> Iterator[Record]:
  """Yields the records of a table; its first row names the columns if `names` is ()."""
  for line, row in table_rows(file, kind):
    if not names:
      names = tuple(row)
      if len(set(names)) < len(names):
        raise unusable(
          f"{file} line {line}", f"columns {' '.join(names)}", "distinct names",
          "--config.task.columns=NAME,NAME, if the first line is a record",
        )  # fmt: skip
      continue
    if len(row) != len(names):
      raise unusable(
        f"{file} line {line}", f"{len(row)} values",
        f"{len(names)}, one for each of the columns {' '.join(names)}",
      )  # fmt: skip
    yield Record(dict(zip(names, row, strict=True)), file, "line", line)
