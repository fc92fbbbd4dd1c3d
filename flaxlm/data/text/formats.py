"""Reads the files that hold texts and records: plain, compressed, tables."""

import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

from flaxlm import errors
from flaxlm.data.text import formats, remote
from flaxlm.machine import quiet_stderr

READ = 1 << 20  # bytes read at a time
SURROGATES = re.compile("[\ud800-\udfff]")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}
BAD_UTF8 = "invalid UTF-8, replaced"
BAD_SURROGATE = "lone surrogate, replaced"
BAD_JSON = "no text in the record, skipped"
NUL, BOM, EMPTY = "NUL character, kept", "byte order mark, dropped", "empty, skipped"
# What a reader yields: (text, last of its document?, problems). Cut anywhere.
Parts = Iterable[tuple[str, bool, tuple[str, ...]]]


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
    return formats.clean(value, "")[0]

  def texts(self, column: str) -> list[str]:
    """A list of texts, not empty."""
    value = self.value(column)
    if not isinstance(value, list) or not value:
      raise self.wrong(f"{column}: {kind_of(value)}", f"a list of texts in {column}")
    if strange := [item for item in value if not isinstance(item, str)]:
      raise self.wrong(f"{column}: {kind_of(strange[0])}", f"only texts in {column}")
    return [formats.clean(item, "")[0] for item in value]


def no_column(where: str, name: str, has: Iterable[str]) -> errors.DataError:
  return wrong(
    where, f"columns {' '.join(map(str, has))}", f"a column {name}",
    "--config.task.text=, text_pair=, label= or choices= with the names here",
  )  # fmt: skip


def kind_of(value: object) -> str:
  """A value as errors show it: its type and how it begins."""
  return f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"


def wrong(where: str, given: str, needed: str, hint: str = "") -> errors.DataError:
  lines = [f"{where} cannot be used", f"given:  {given}", f"needed: {needed}"]
  return errors.DataError("\n  ".join(lines + [f"try:    {hint}"] * bool(hint)))


def text_lines(file: str) -> Iterator[tuple[int, str]]:
  """Yields (number, line) of a UTF-8 file; lines keep their ends."""
  try:
    with formats.open_stream(file) as stream:
      for number, line in enumerate(stream, 1):
        try:
          yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
          given = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
          raise wrong(f"{file} line {number}", given, "text in UTF-8") from None
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise formats.damaged_file(file, error, "a whole file of records") from error


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


def find_files(key: str, pattern: str) -> list[str]:
  """The files that match `pattern`, sorted; never none."""
  if remote.is_remote(pattern):
    fixed = re.match(r"[a-z0-9]+://[^*?\[]*(?=/|$)", pattern)[0]
    rest = pattern[len(fixed) :].strip("/")
    with quiet_stderr(), remote.reaching(pattern):
      root = remote.path(fixed)
      matches = root.glob(rest) if rest else [root]
      files = [str(path) for path in matches if path.exists() and not path.is_dir()]
  else:
    pattern = os.path.expanduser(pattern)
    files = [f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)]
  if not files:
    folder = not remote.is_remote(pattern) and os.path.isdir(pattern)
    hint = f"{pattern.rstrip('/')}/**/*.txt" if folder else "check path and quotes"
    raise no_match(key, f"{pattern} ({os.getcwd()})", "a glob that matches files", hint)
  return sorted(files)


def no_match(key: str, given: str, needed: str, hint: str = "") -> errors.UserError:
  lines = [f"{key} matches nothing", f"given:  {given}", f"needed: {needed}"]
  return errors.MissingInputError("\n  ".join(lines + [f"try:    {hint}"] * bool(hint)))


def file_size(path: str) -> int:
  if remote.is_remote(path):
    with remote.reaching(path):
      return remote.path(path).stat().length
  return os.path.getsize(path)


def open_binary(path: str) -> IO[bytes]:
  if remote.is_remote(path):
    with remote.reaching(path):
      return remote.path(path).open("rb")
  return open(path, "rb")


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
  """Opens a file for reading, decompressed by what it begins with, not by its name."""
  with open_binary(path) as file:
    start = file.read(6)
    file.seek(0)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "")
    if kind == "zstd":
      import pyarrow

      stream = pyarrow.CompressedInputStream(file, "zstd")
      yield io.BufferedReader(stream, READ)
    elif kind:
      with {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind](file) as stream:
        yield stream
    else:
      yield file


def damaged_file(path: str, error: Exception, needed: str) -> errors.DataError:
  return errors.DataError(
    f"{path} cannot be read to its end\n"
    f"  given:  {type(error).__name__}: {' '.join(str(error).split())[:300]}\n"
    f"  needed: {needed}"
  )


def text_chunks(path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields (text, problems) of a UTF-8 file, a megabyte at a time."""
  decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
  first = True
  try:
    with open_stream(path) as stream:
      while True:
        chunk = stream.read(READ)
        text = decode(chunk, not chunk)
        problems = ()
        if first and text:
          first = False
          if text[0] == "\ufeff":
            text, problems = text[1:], (BOM,)
        if text:
          text, found = clean(text, BAD_UTF8)
          yield text, problems + found
        if not chunk:
          return
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise damaged_file(
      path, error, "a whole text file (plain, gz, bz2, xz, zst)"
    ) from error


def clean(text: str, what: str) -> tuple[str, tuple[str, ...]]:
  """Replaces surrogates, which no UTF-8 can hold, and notes what is odd."""
  problems = (NUL,) if "\0" in text else ()
  try:
    text.encode()
  except UnicodeEncodeError:
    return SURROGATES.sub("\ufffd", text), (*problems, what)
  return text, problems


def lines(chunks: Iterable) -> Parts:
  """Parts the text into lines, without their newlines."""
  open_line = False
  for text, problems in chunks:
    *whole, rest = text.split("\n")
    for line in whole:
      yield line, True, problems
      problems, open_line = (), False
    if rest:
      yield rest, False, problems
      open_line = True
  if open_line:
    yield "", True, ()
