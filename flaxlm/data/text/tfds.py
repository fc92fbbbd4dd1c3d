"""Reads TFDS data sets: by name, by directory, or as array_record files by glob.

TensorFlow is needed for TFRecord files only. Each split is one "file" of the corpus;
its examples come in the stored order, so a position is the number of an example.
"""

import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.lazy_tensorflow import import_tensorflow
from flaxlm.data.text import remote
from flaxlm.data.text.documents import (
  Corpus,
  TextPiece,
  no_field,
  record_text,
  to_pieces,
)
from flaxlm.data.text.formats import DocumentParts, damaged_file, file_size, find_files
from flaxlm.machine import quiet_stderr


def open_tfds_corpus(name: str, source: ConfigDict) -> Corpus:
  """Opens the source `name` of config.data.sources, of kind tfds.

  Raises:
    ConfigError, MissingInputError, DataError: there is no such data set, split or
      field.
  """
  key = f"config.data.sources.{name}"
  splits = [split for split in (source.split, source.validation_split) if split]
  if "array_record" in os.path.basename(source.path):
    return open_array_records(key, source, splits)
  builder = open_builder(key, source.path)
  for knob, split in zip(("split", "validation_split"), splits, strict=False):
    check_tfds_split(builder, f"{key}.{knob}", split, source.path)
  if source.field not in builder.info.features:
    raise no_field(source.path, source.field, builder.info.features)
  infos = [builder.info.splits[split] for split in splits]
  listing = [builder.info.full_name, splits, [info.num_examples for info in infos]]

  def read(split: str, skip: int) -> DocumentParts:
    for value in field_values(builder, split, source.field, skip):
      yield record_text(value)

  sizes = [info.num_bytes or 0 for info in infos]
  return make_corpus(source.path, splits, sizes, listing, read)


def open_array_records(key: str, source: ConfigDict, splits: list[str]) -> Corpus:
  """Opens array_record files by glob, in which `{split}` stands for the split.

  This reads directories without a dataset_info.json, or whose file names other files.
  """
  from array_record.python import array_record_data_source
  from tensorflow_datasets.core.features import FeaturesDict

  if len(splits) > 1 and "{split}" not in source.path:
    raise errors.ConfigError(
      f"{key}.path", source.path, "'{split}' where the name of the split is",
      "DIRECTORY/NAME-{split}.array_record*",
    )  # fmt: skip
  paths = {
    split: find_files(f"{key}.path", source.path.replace("{split}", split))
    for split in splits
  }
  features = FeaturesDict.from_config(os.path.dirname(paths[splits[0]][0]))
  if source.field not in features:
    raise no_field(source.path, source.field, features)

  def read(split: str, skip: int) -> DocumentParts:
    try:
      records = array_record_data_source.ArrayRecordDataSource(paths[split])
      for number in range(skip, len(records)):
        example = features.deserialize_example_np(records[number])
        yield record_text(example[source.field])
    except (RuntimeError, ValueError, IndexError) as error:
      raise damaged_file(source.path, error, "whole array_record files") from error

  sizes = [sum(map(file_size, paths[split])) for split in splits]
  files = [
    (os.path.basename(file), file_size(file))
    for split in splits
    for file in paths[split]
  ]
  return make_corpus(source.path, splits, sizes, [splits, files], read)


def make_corpus(
  path: str,
  splits: list[str],
  sizes: list[int],
  listing: list,
  read: Callable[[str, int], DocumentParts],
) -> Corpus:
  """Returns a corpus with one "file" per split; of two, the second is for validation.

  Args:
    listing: the contents of the fingerprint.
    read: returns the examples of (split, number of the first one).
  """
  names = ("train", "validation") if len(splits) > 1 else ("",)

  def read_from(position=(0, 0)) -> Iterator[TextPiece]:
    for number in range(position[0], len(splits)):
      skip = position[1] if number == position[0] else 0
      split = (names[number], read(splits[number], skip))
      yield from to_pieces([split], number, skip, skip)

  fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
  return Corpus([f"{path} {split}" for split in splits], sizes, fingerprint, read_from)


def import_tfds(key: str):
  """Imports TensorFlow Datasets; MissingInputError names `key`, which needs it."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise errors.MissingInputError(
      f"{key} needs TensorFlow Datasets",
      error,
      "pip install tensorflow-datasets tensorflow-cpu",
    ) from error
  return tfds


def open_builder(key: str, path: str):
  """Returns the TFDS builder at `path` (directory, NAME, MODULE:NAME), prepared."""
  tfds = import_tfds(f"{key}.path={path}")
  directory = os.path.expanduser(path)
  try:
    if remote.is_remote(path) or os.path.isdir(directory):
      return tfds.builder_from_directory(directory)
    module, colon, rest = path.partition(":")
    if colon and module not in ("huggingface", "kubric", "robotics"):
      sys.path.insert(0, os.getcwd())
      importlib.import_module(module)  # which registers its builders
      path = rest
    builder = tfds.builder(path)
    if not builder.is_prepared():
      import_tensorflow()
      builder.download_and_prepare()
    return builder
  except Exception as error:  # whatever a builder, a download or TFDS itself may raise
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise errors.MissingInputError(
      f"{key}.path={path}: TFDS cannot provide it",
      f"{type(error).__name__}: {' '.join(lines[:3])[:300]}",
      "a prepared directory, a TFDS name, or MODULE:NAME of a builder",
      "TFDS_DATA_DIR=DIRECTORY, if it is prepared elsewhere",
    ) from error


def check_tfds_split(builder, key: str, split: str, path: str) -> None:
  """Raises ConfigError if the data set has no such split; slices of one are splits."""
  if re.match(r"\w*", split)[0] not in {*builder.info.splits, "all"}:
    known = " ".join(builder.info.splits)
    raise errors.ConfigError(key, repr(split), f"a split of {path}", known)


def field_values(builder, split: str, field: str, skip: int) -> Iterator:
  """Yields a field of each example from number `skip` on, in the stored order."""
  if is_random_access(builder):
    source = builder.as_data_source(split=split)
    for number in range(skip, len(source)):
      yield source[number][field]
  else:
    for batch in read_tfrecords(
      builder, split, [field], lambda d: d.skip(skip).batch(64)
    ):
      yield from batch[field]


def tfds_examples(builder, split: str, names: list[str]) -> Iterator[dict]:
  """Yields the named features of the examples, in the stored order."""
  if is_random_access(builder):
    source = builder.as_data_source(split=split)
    for number in range(len(source)):
      yield source[number]
  else:
    yield from read_tfrecords(builder, split, names)


def is_random_access(builder) -> bool:
  """Returns whether the files are array_records, which need no TensorFlow."""
  return builder.info.file_format.value == "array_record"


def read_tfrecords(
  builder, split: str, names: list[str], change: Callable = lambda dataset: dataset
) -> Iterable[dict]:
  """Yields the examples of a split, one file after another.

  Args:
    change: is applied to the tf.data.Dataset first.
  """
  import tensorflow_datasets as tfds

  tf = import_tensorflow()
  config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  decoders = tfds.decode.PartialDecoding(dict.fromkeys(names, True))
  try:
    with quiet_stderr():
      dataset = builder.as_dataset(split=split, read_config=config, decoders=decoders)
      examples = change(dataset).as_numpy_iterator()
    yield from examples
  except tf.errors.OpError as error:
    path = f"{builder.data_path} {split}"
    raise damaged_file(path, error, "the TFRecord files that TFDS wrote") from error
