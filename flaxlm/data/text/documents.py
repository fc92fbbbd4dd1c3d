"""Reads documents from the sources of a corpus, whatever their format.

A document is a run of `TextPiece`s, the last of which has `end` set, so a document of
any size passes through bounded memory. Each piece says where the next document begins,
and reading can start there: the order is fixed (sorted paths, stored order), and so are
the cuts between pieces. tfds.py opens TFDS data sets as a Corpus too.
"""

import codecs
import functools
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.text.contents import (
  Seen,
  check_unchanged,
  fingerprint_of_contents,
  hash_listing,
  see_files,
  size_of,
)
from flaxlm.data.text.formats import (
  BAD_JSON,
  BAD_SURROGATE,
  BAD_UTF8,
  BOM,
  CORRUPT,
  READ_ERRORS,
  DamagedFile,
  DocumentParts,
  clean,
  damaged_file,
  find_files,
  lines,
  open_binary,
  open_stream,
  text_chunks,
)
from flaxlm.data.text.tables import table_records
from flaxlm.tokenizer.pieces import CHUNK_CHARACTERS, cut

# Tests, examples and installed packages: they differ between installations of Python.
STDLIB_SKIPS = {
  "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
  "lib2to3", "turtledemo", "ensurepip", "lib-dynload",
}  # fmt: skip


class TextPiece(NamedTuple):
  """Part of a document, or all of it."""

  text: str  # at most CHUNK_CHARACTERS
  end: bool  # whether it is the last piece of its document
  position: tuple[int, int]  # of the next document: (file, documents before it in it)
  split: str  # "train" or "validation"; "" leaves it to a hash of the text
  problems: tuple[str, ...]


class Corpus(NamedTuple):
  """An opened source. `read` yields its pieces from a position on."""

  files: list[str]  # that a position counts: files, or splits of TFDS
  sizes: list[int]  # bytes on disk, to estimate the remaining time
  seen: dict[str, Seen]  # path -> contents, of all files that are read
  names: list[str]  # of these files, wherever their directory is
  # What older versions kept instead of contents: a hash of names and sizes.
  old_fingerprint: str
  read: Callable[[tuple[int, int]], Iterator[TextPiece]]

  @property
  def fingerprint(self) -> str:
    """The sha256 of the names, sizes and contents of the files."""
    return fingerprint_of_contents(self.names, list(self.seen.values()))


def open_source(
  name: str,
  source: ConfigDict,
  tail: float = 0.0,
  on_corrupt: str = "stop",
  known: dict[str, Seen] | None = None,
  log: Callable[[str], None] = lambda line: None,
) -> Corpus:
  """Opens the source `name` of config.data.sources, of any kind but tfds.

  Args:
    tail: the fraction of each file, at its end, that is its validation split, as in
      nanoGPT: of the characters of a text, of the records of a table. 0 leaves the
      split to `split_of`.
    on_corrupt: stop at a damaged file, or skip the rest of it, which is counted.
    known: files that need not be read to know their contents, unless they changed.

  Raises:
    ConfigError, MissingInputError: the source cannot be opened.
    DataError: while reading, if a file is damaged or changes.
  """
  key = f"config.data.sources.{name}"
  if source.validation_split:
    raise errors.ConfigError(
      f"{key}.validation_split", source.validation_split, "'' unless kind is tfds",
      "config.data.split chooses how other sources are split",
    )  # fmt: skip
  if source.kind == "stdlib":
    files, base = stdlib_files()
  else:
    files, base = find_files(f"{key}.path", source.path), ""
  names = [os.path.relpath(f, base) if base else os.path.basename(f) for f in files]
  old = hash_listing(zip(names, map(size_of, files), strict=True))
  if source.max_documents:
    files = files[: count_needed_files(files, source)]
  seen = dict(zip(files, see_files(files, known or {}, log), strict=True))
  sizes = [file.size for file in seen.values()]
  corpus = Corpus(files, sizes, seen, names[: len(files)], old, iter)
  return with_tail(corpus, source, tail, on_corrupt)


def count_needed_files(files: list[str], source: ConfigDict) -> int:
  """Returns how many files hold the first `source.max_documents` documents."""
  left = source.max_documents
  for number, file in enumerate(files):
    for _, parts in lose_rest(read_splits(file, source, 0.0)):
      for _, end, _ in parts:
        left -= end
        if not left:
          return number + 1
  return len(files)


def with_tail(
  corpus: Corpus, source: ConfigDict, tail: float, on_corrupt: str = "stop"
) -> Corpus:
  """Returns a corpus of `open_source` that is split as `tail` says there."""
  read = functools.partial(_read_files, corpus, source, tail, on_corrupt)
  return corpus._replace(read=read)


def _read_files(
  corpus: Corpus,
  source: ConfigDict,
  tail: float,
  on_corrupt: str,
  position: tuple[int, int] = (0, 0),
) -> Iterator[TextPiece]:
  """Yields the pieces of a corpus; DataError if a file is not what it was when seen."""
  for number in range(position[0], len(corpus.files)):
    path = corpus.files[number]
    skip = position[1] if number == position[0] else 0
    check_unchanged(path, corpus.seen[path])
    splits = read_splits(path, source, tail)
    if on_corrupt == "skip":
      splits = lose_rest(splits)
    elif on_corrupt != "stop":
      raise ValueError(f"damaged files cannot be treated by {on_corrupt}")
    yield from to_pieces(splits, number, skip)
    check_unchanged(path, corpus.seen[path])


def stdlib_files() -> tuple[list[str], str]:
  """Returns the .py files of this Python's library, about 12 MB, and their root."""
  root = sysconfig.get_path("stdlib")
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = [f for f in folders if f not in STDLIB_SKIPS and "config-" not in f]
    found += [os.path.join(folder, f) for f in files if f.endswith(".py")]
  if not found:
    raise errors.MissingInputError(
      "kind=stdlib matches nothing", root, "a Python that has its library"
    )
  return sorted(found), root


def read_splits(
  file: str, source: ConfigDict, tail: float
) -> Iterator[tuple[str, DocumentParts]]:
  """Yields (split, documents) of a file: with split "", or its head and its tail."""
  if source.kind == "jsonl":
    read = functools.partial(json_documents, file, source.field)
  elif source.kind == "parquet":
    read = functools.partial(parquet_documents, file, source.field)
  elif source.kind in ("csv", "tsv"):
    read = functools.partial(table_documents, file, source.kind, source.field)
  elif source.kind in ("text", "stdlib"):
    yield from split_text(file, source.document, tail)
    return
  else:
    raise ValueError(f"no reader for a source of kind {source.kind}")
  if not tail:
    yield "", read()
    return
  # A damaged file ends here: nobody knows where its tail begins.
  total = sum(1 for _ in read())
  held_out = max(0, min(max(1, round(total * tail)), total - 1))
  records = iter(read())  # a record is a whole document
  yield "train", itertools.islice(records, total - held_out)
  yield "validation", records


def split_text(
  file: str, unit: str, tail: float
) -> Iterator[tuple[str, DocumentParts]]:
  """Yields the splits of a text file; a fraction `tail` of its characters is a tail."""
  if not tail:
    yield "", text_documents(text_chunks(file), unit)
    return
  total = sum(len(text) for text, _ in text_chunks(file))
  middle = int(total * (1 - tail))
  for split, start, stop in (("train", 0, middle), ("validation", middle, total)):
    chunks = slice_chunks(text_chunks(file), start, stop)
    yield split, text_documents(chunks, unit)


def lose_rest(
  splits: Iterable[tuple[str, DocumentParts]],
) -> Iterator[tuple[str, DocumentParts]]:
  """Yields the splits of a file up to its damage, which ends a document."""

  def until_damage(parts: DocumentParts) -> DocumentParts:
    try:
      yield from parts
    except DamagedFile:
      yield "", True, (CORRUPT,)

  try:
    for split, parts in splits:
      yield split, until_damage(parts)
  except DamagedFile:
    yield "", [("", True, (CORRUPT,))]


def to_pieces(
  splits: Iterable[tuple[str, DocumentParts]], file: int, skip: int, number: int = 0
) -> Iterator[TextPiece]:
  """Cuts documents into pieces.

  Args:
    splits: (split, documents), as `read_splits` yields them.
    file: the number of the file that they come from.
    skip: the number of the first document to yield.
    number: the number of the first document in `splits`.
  """
  for split, parts in splits:
    buffer, problems = "", ()
    for text, end, found in parts:
      if number < skip:
        number += end
        continue
      buffer += text
      problems += found
      if end or len(buffer) > CHUNK_CHARACTERS:
        *whole, buffer = cut(buffer, CHUNK_CHARACTERS)
        for text in whole:
          yield TextPiece(text, False, (file, number), split, problems)
          problems = ()
      if end:
        number += 1
        yield TextPiece(buffer, True, (file, number), split, problems)
        buffer, problems = "", ()


def slice_chunks(chunks: Iterable, start: int, stop: int) -> Iterator:
  """Yields characters [start, stop) of chunks of (text, problems)."""
  offset = 0
  for text, problems in chunks:
    part = text[max(start - offset, 0) : max(stop - offset, 0)]
    offset += len(text)
    if part:
      yield part, problems


def text_documents(chunks: Iterable, unit: str) -> DocumentParts:
  """Splits the text of a file into documents: the file, its paragraphs or its lines."""
  if unit == "file":
    for text, problems in chunks:
      yield text, False, problems
    yield "", True, ()
  elif unit == "line":
    yield from lines(chunks)
  elif unit == "paragraph":
    yield from paragraphs(lines(chunks))
  else:
    raise ValueError(f"text files hold no documents of unit {unit}")


def paragraphs(lines: DocumentParts) -> DocumentParts:
  """Joins lines into documents that blank lines separate."""
  inside = False  # a paragraph has begun
  started = False  # the beginning of this line was yielded
  space, carried = "", ()  # the beginning of a line that may turn out to be blank
  for text, end, problems in lines:
    if not started:
      text, problems = space + text, carried + problems
      space, carried = "", ()
      if not text.strip() and len(text) < CHUNK_CHARACTERS:
        carried = problems
        if not end:
          space = text
        elif inside:
          inside = False
          yield "", True, ()
        continue
      text = "\n" + text if inside else text
      inside = True
    yield text, False, problems
    started = not end
  if inside:
    yield "", True, ()


def json_documents(path: str, field: str) -> DocumentParts:
  """Yields the texts in `field` of a file with one JSON object per line."""
  found = False
  try:
    with open_stream(path) as stream:
      for number, line in enumerate(stream):
        problems = ()
        if not number and line.startswith(codecs.BOM_UTF8):
          line, problems = line.removeprefix(codecs.BOM_UTF8), (BOM,)
        if not line.strip():
          continue
        try:
          record = parse_line(line.decode())
        except UnicodeDecodeError:
          record = parse_line(line.decode(errors="replace"))
          problems += (BAD_UTF8,)
        text = record.get(field) if isinstance(record, dict) else None
        if isinstance(record, dict) and field not in record and not found:
          raise no_field(path, field, record)
        if not isinstance(text, str):
          yield "", True, (*problems, BAD_JSON)
          continue
        found = True
        text, more = clean(text, BAD_SURROGATE)
        yield text, True, problems + more
  except READ_ERRORS as error:
    raise damaged_file(path, error, "a whole file of JSON lines") from error


def parse_line(text: str) -> object:
  """Returns the value of a line; None if it is not JSON, or nested too deeply."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None


def parquet_documents(path: str, field: str) -> DocumentParts:
  """Yields the texts in column `field` of a parquet file, a row group at a time."""
  import pyarrow
  from pyarrow import parquet

  try:
    with (
      open_binary(path) as file,
      parquet.ParquetFile(file, page_checksum_verification=True) as table,
    ):
      if field not in table.schema_arrow.names:
        raise no_field(path, field, table.schema_arrow.names)
      for batch in table.iter_batches(batch_size=256, columns=[field]):
        column = batch.column(0)
        if pyarrow.types.is_dictionary(column.type):
          column = column.dictionary_decode()
        if pyarrow.types.is_string(column.type):
          column = column.cast(pyarrow.binary())  # bytes that are no UTF-8 are repaired
        elif pyarrow.types.is_large_string(column.type):
          column = column.cast(pyarrow.large_binary())
        for value in column.to_pylist():
          yield record_text(value)
  except (pyarrow.ArrowException, OSError) as error:
    raise damaged_file(path, error, "a parquet file") from error


def table_documents(path: str, kind: str, field: str) -> DocumentParts:
  """Yields the texts in column `field` of a table (csv, tsv) with a header."""
  for record in table_records(path, kind):
    if field not in record.fields:
      raise no_field(path, field, record.fields)
    yield record_text(record.fields[field])


def no_field(where: str, field: str, has: Iterable[str]) -> errors.DataError:
  """Returns the error for a source without its text field; it lists the others."""
  return errors.DataError(
    f"there is no field {field!r} to take the text from",
    f"{where} with fields {' '.join(map(str, has))}",
    "the field that holds the text",
    "--config.data.sources.NAME.field=FIELD",
  )


def record_text(value: object) -> tuple[str, bool, tuple[str, ...]]:
  """Returns a whole document from the value of a record's text field."""
  if isinstance(value, bytes):
    text, problems = clean(value.decode(errors="surrogateescape"), BAD_UTF8)
  elif isinstance(value, str):
    text, problems = clean(value, BAD_SURROGATE)
  else:
    text, problems = "", (BAD_JSON,)
  return text, True, problems


def split_of(text: bytes, fraction: float) -> str:
  """Returns the split of a document, chosen by a hash of its first piece.

  Equal documents get the same split, so none is both trained on and validated on.
  """
  number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
  return "validation" if number < fraction * 2**64 else "train"
