"""Reads the records of TFRecord and array_record files, and names what is damaged.

Both formats have checksums. A damaged record is an error that names file and record, or
is lost and counted, as config.data.on_corrupt says. TensorFlow is needed for TFRecord.
"""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flaxlm import errors
from flaxlm.data.lazy_tensorflow import import_tensorflow
from flaxlm.data.text.formats import (
  ARRAY_RECORD,
  TFRECORD_HEADER,
  DamagedFile,
  describe_bytes,
  open_binary,
  tfrecord_length,
)

FOOTER_BYTES = 4  # of a TFRecord, after its data: their checksum


class Part(NamedTuple):
  """Some of the records of a file."""

  path: str
  skip: int  # records before these
  take: int  # records
  total: int  # records that the file should have


def read_records(
  parts: Iterable[Part], kind: str, start: int, on_corrupt: str
) -> Iterator[tuple[Part, int, bytes | None]]:
  """Yields (part, number in its file, record); None for a record that is lost.

  Args:
    kind: of the files: tfrecord or array_record.
    start: the number, over all parts, of the first record to yield.
    on_corrupt: stop or skip.

  Raises:
    DataError: a record or file is damaged, or a file has another number of records.
  """
  if kind == "tfrecord":
    reader = _tfrecords
  elif kind == "array_record":
    reader = _array_records
  else:
    raise ValueError(f"no reader for records in {kind} files")
  for part in parts:
    if start >= part.take:
      start -= part.take
      continue
    number, stop = part.skip + start, part.skip + part.take
    start = 0
    for record in reader(part.path, number):
      if number == stop:
        if stop == part.total:
          raise _miscounted(part, f"more than {part.total} records")
        break
      if isinstance(record, str):
        record = _lost(f"{part.path} record {number + 1}", record, on_corrupt)
      yield part, number, record
      number += 1
    for missing in range(number, stop):
      given = f"it ends after {number} of {part.total} records"
      yield part, missing, _lost(part.path, given, on_corrupt)


def _miscounted(part: Part, given: str) -> errors.DataError:
  return errors.DataError(
    f"{part.path} is another file than its data set describes", given,
    f"the {part.total} records of dataset_info.json",
  )  # fmt: skip


def _lost(where: str, given: str, on_corrupt: str) -> None:
  """Returns None, the record that is lost; DamagedFile if none may be."""
  if on_corrupt == "stop":
    raise DamagedFile(
      f"{where} is damaged", given, "the bytes that were written",
      "copy or prepare the file again, or lose these records, counted: "
      "--config.data.on_corrupt=skip",
    )  # fmt: skip
  elif on_corrupt != "skip":
    raise ValueError(f"damaged records cannot be treated by {on_corrupt}")


def _tfrecords(path: str, first: int) -> Iterator[bytes | str]:
  """Yields the records of a file from number `first` on, or what is wrong with one.

  Nothing follows a record whose end nobody knows.
  """
  tf = import_tensorflow()
  from tensorflow.python.lib.io import tf_record

  with open_binary(path) as file:
    size = file.seek(0, os.SEEK_END)
    offset = 0
    for _ in range(first):
      if offset is not None:
        offset, _ = _next_record(file, offset, size)
    if not size:
      yield "an empty file"
    reader = tf_record.tf_record_random_reader(path)
    while offset is not None and offset < size:
      try:
        record, offset = reader.read(offset)
      except (tf.errors.DataLossError, tf.errors.OutOfRangeError, IndexError):
        offset, record = _next_record(file, offset, size)
      except tf.errors.OpError as error:
        reason = " ".join(str(error).split())[:300]
        raise errors.StorageError(f"{path} cannot be read", reason) from error
      yield record


def _next_record(file, offset: int, size: int) -> tuple[int | None, str]:
  """Returns where the record after that at `offset` begins, and how that is damaged.

  There is no such place (None) if the length of the record is damaged.
  """
  file.seek(offset)
  header = file.read(TFRECORD_HEADER.size)
  if len(header) < TFRECORD_HEADER.size:
    return None, f"the file ends inside its header, at byte {size}"
  length = tfrecord_length(header)
  if length < 0 and not offset:
    return None, f"no TFRecord file: {describe_bytes(header)}"
  if length < 0:
    return None, f"the length of the record, at byte {offset}, fails its checksum"
  end = offset + TFRECORD_HEADER.size + length + FOOTER_BYTES
  if end > size:
    return None, f"the file ends inside it, at byte {size}"
  return end, f"its checksum is wrong, in bytes {offset} to {end}"


def _array_records(path: str, first: int) -> Iterator[bytes | str]:
  """Yields the records of a file from number `first` on, or what is wrong with one."""
  from array_record.python import array_record_data_source

  try:
    source = array_record_data_source.ArrayRecordDataSource([path])
  except (RuntimeError, ValueError) as error:
    if not first:
      yield _plain_reason(path, error)
    return
  for number in range(first, len(source)):
    try:
      yield source[number]
    except (RuntimeError, ValueError, IndexError):
      yield "its bytes fail their checksum"


def count_records(path: str) -> int:
  """Returns how many records an array_record file has; 1 if it cannot be opened."""
  from array_record.python import array_record_data_source

  try:
    return len(array_record_data_source.ArrayRecordDataSource([path]))
  except (RuntimeError, ValueError):
    return 1  # which `read_records` finds damaged


def _plain_reason(path: str, error: Exception) -> str:
  """Returns why an array_record file cannot be opened."""
  with open_binary(path) as file:
    start, size = file.read(64), file.seek(0, os.SEEK_END)
  if not size:
    return "an empty file"
  if not start.startswith(ARRAY_RECORD):
    return f"no array_record file: {describe_bytes(start)}"
  return f"its {size} bytes end too early, or its index is damaged"
