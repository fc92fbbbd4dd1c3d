"""Documents from TFDS: data sets by name, by directory, or array_record files by glob.

TensorFlow is needed for TFRecord files only. Each split is one "file" of the corpus;
its examples come in the stored order, so a position is an index.
"""

import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator

from ml_collections import ConfigDict

from flaxlm import errors, machine
from flaxlm.data import lazy_tensorflow
from flaxlm.data.text import documents, formats, remote


def open_tfds_corpus(name: str, source: ConfigDict) -> documents.Corpus:
  """Opens a TFDS data set: by name, by directory, or as array_record files by glob."""
  key = f"config.data.sources.{name}"
  splits = [split for split in (source.split, source.validation_split) if split]
  if "array_record" in os.path.basename(source.path):
    return open_array_records(key, source, splits)
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise errors.MissingInputError(
      f"{key}.kind=tfds needs TensorFlow Datasets\n  given:  {error}\n"
      "  needed: pip install tensorflow-datasets tensorflow-cpu"
    ) from error
  builder = find_builder(tfds, key, source.path)
  for knob, split in zip(("split", "validation_split"), splits, strict=False):
    if re.match(r"\w*", split)[0] not in {*builder.info.splits, "all"}:
      known = " ".join(builder.info.splits)
      raise errors.ConfigError(
        f"{key}.{knob}", split, f"a split of {source.path}", known
      )
  if source.field not in builder.info.features:
    raise documents.no_field(source.path, source.field, builder.info.features)
  random_access = builder.info.file_format.value == "array_record"
  records = data_source_records if random_access else dataset_records
  infos = [builder.info.splits[split] for split in splits]
  listing = [builder.info.full_name, splits, [info.num_examples for info in infos]]

  def read(split: str, skip: int) -> formats.Parts:
    return records(builder, split, source.field, skip)

  sizes = [info.num_bytes or 0 for info in infos]
  return tfds_corpus(source.path, splits, sizes, listing, read)


def tfds_corpus(
  path: str, splits: list, sizes: list, listing: list, read
) -> documents.Corpus:
  """A corpus with one `file` a split; with two splits, the second is for validation."""
  names = ("train", "validation") if len(splits) > 1 else ("",)

  def read_from(position=(0, 0)) -> Iterator[documents.TextPiece]:
    for number in range(position[0], len(splits)):
      skip = position[1] if number == position[0] else 0
      parts = [(names[number], read(splits[number], skip))]
      yield from documents.to_pieces(parts, number, skip, skip)

  fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
  return documents.Corpus(
    [f"{path} {split}" for split in splits], sizes, fingerprint, read_from
  )


def find_builder(tfds, key: str, path: str):
  """The prepared TFDS builder at `path`: a directory, NAME, or MODULE:NAME."""
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
      lazy_tensorflow.import_tensorflow()
      builder.download_and_prepare()
    return builder
  except Exception as error:  # whatever a builder, a download or TFDS itself may raise
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise errors.MissingInputError(
      f"{key}.path={path}: TFDS cannot provide it\n"
      f"  given:  {type(error).__name__}: {' '.join(lines[:3])[:300]}\n"
      "  needed: a prepared directory, a TFDS name, or MODULE:NAME of a builder\n"
      "  try:    TFDS_DATA_DIR=DIRECTORY, if it is prepared elsewhere"
    ) from error


def dataset_records(builder, split: str, field: str, skip: int) -> formats.Parts:
  """Texts through tf.data, one file after another: in the stored order."""
  import tensorflow_datasets as tfds

  tf = lazy_tensorflow.import_tensorflow()
  config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  decoders = tfds.decode.PartialDecoding({field: True})
  try:
    with machine.quiet_stderr():
      dataset = builder.as_dataset(split=split, read_config=config, decoders=decoders)
      records = dataset.skip(skip).batch(64).as_numpy_iterator()
    for batch in records:
      for value in batch[field]:
        yield documents.record_text(value)
  except tf.errors.OpError as error:
    path = f"{builder.data_path} {split}"
    raise formats.damaged_file(
      path, error, "the TFRecord files that TFDS wrote"
    ) from error


def data_source_records(builder, split: str, field: str, skip: int) -> formats.Parts:
  """Texts through random access to array_record files; needs no TensorFlow."""
  source = builder.as_data_source(split=split)
  for number in range(skip, len(source)):
    yield documents.record_text(source[number][field])


def open_array_records(
  key: str, source: ConfigDict, splits: list[str]
) -> documents.Corpus:
  """Opens array_record files by glob, `{split}` in it standing for the split.

  For directories whose dataset_info.json speaks of other files, or that have none.
  """
  from array_record.python import array_record_data_source
  from tensorflow_datasets.core.features import FeaturesDict

  if len(splits) > 1 and "{split}" not in source.path:
    raise errors.ConfigError(
      f"{key}.path", source.path, "'{split}' where the name of the split is",
      "DIRECTORY/NAME-{split}.array_record*",
    )  # fmt: skip
  paths = {
    s: formats.find_files(f"{key}.path", source.path.replace("{split}", s))
    for s in splits
  }
  features = FeaturesDict.from_config(os.path.dirname(paths[splits[0]][0]))
  if source.field not in features:
    raise documents.no_field(source.path, source.field, features)

  def read(split: str, skip: int) -> formats.Parts:
    try:
      records = array_record_data_source.ArrayRecordDataSource(paths[split])
      for number in range(skip, len(records)):
        example = features.deserialize_example_np(records[number])
        yield documents.record_text(example[source.field])
    except (RuntimeError, ValueError, IndexError) as error:
      raise formats.damaged_file(
        source.path, error, "whole array_record files"
      ) from error

  sizes = [sum(map(formats.file_size, paths[split])) for split in splits]
  files = [
    (os.path.basename(f), formats.file_size(f))
    for split in splits
    for f in paths[split]
  ]
  return tfds_corpus(source.path, splits, sizes, [splits, files], read)


def tfds_examples(builder, split: str, names: list[str]) -> Iterator[dict]:
  """Examples in the stored order, of the named features; TFRecord needs TensorFlow."""
  if builder.info.file_format.value == "array_record":
    source = builder.as_data_source(split=split)
    for number in range(len(source)):
      yield source[number]
    return
  import tensorflow_datasets as tfds

  tf = lazy_tensorflow.import_tensorflow()
  config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  decoders = tfds.decode.PartialDecoding(dict.fromkeys(names, True))
  try:
    with machine.quiet_stderr():
      dataset = builder.as_dataset(split=split, read_config=config, decoders=decoders)
      examples = dataset.as_numpy_iterator()
    yield from examples
  except tf.errors.OpError as error:
    path = f"{builder.data_path} {split}"
    raise formats.damaged_file(
      path, error, "the TFRecord files that TFDS wrote"
    ) from error
