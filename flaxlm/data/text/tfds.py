"""Reads TFDS data sets: by name, by directory, or as array_record files by glob.

TensorFlow is needed for TFRecord files only. Each split is one "file" of the corpus;
its examples come in the stored order, so a position is the number of an example.
"""

import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.lazy_tensorflow import import_tensorflow
from flaxlm.data.text import remote
from flaxlm.data.text.contents import (
  Seen,
  check_unchanged,
  hash_listing,
  see_files,
  size_of,
)
from flaxlm.data.text.documents import (
  Corpus,
  TextPiece,
  no_field,
  record_text,
  to_pieces,
)
from flaxlm.data.text.formats import CORRUPT, DocumentParts, find_files
from flaxlm.data.text.record_files import Part, count_records, read_records


def open_tfds_corpus(
  name: str,
  source: ConfigDict,
  on_corrupt: str = "stop",
  known: dict[str, Seen] | None = None,
  log: Callable[[str], None] = lambda line: None,
) -> Corpus:
  """Opens the source `name` of config.data.sources, of kind tfds.

  Args:
    on_corrupt: stop at a damaged record, or skip it; it is counted.
    known: files that need not be read to know their contents, unless they changed.

  Raises:
    ConfigError, MissingInputError, DataError: there is no such data set, split or
      field.
  """
  key = f"config.data.sources.{name}"
  splits = [split for split in (source.split, source.validation_split) if split]
  if "array_record" in os.path.basename(source.path):
    features, parts = open_array_records(key, source, splits)
    kind, old = "array_record", None
  else:
    builder = open_builder(key, source.path)
    for knob, split in zip(("split", "validation_split"), splits, strict=False):
      check_tfds_split(builder, f"{key}.{knob}", split, source.path)
    features, kind = builder.info.features, builder.info.file_format.value
    parts = [split_parts(builder, split) for split in splits]
    counts = [builder.info.splits[split].num_examples for split in splits]
    old = hash_listing([builder.info.full_name, splits, counts])
  if source.field not in features:
    raise no_field(source.path, source.field, features)

  def read(split: int, skip: int) -> DocumentParts:
    names = [source.field]
    for example in read_examples(features, names, parts[split], kind, skip, on_corrupt):
      if example is None:
        yield "", True, (CORRUPT,)
      else:
        yield record_text(example[source.field])

  paths = needed_paths(parts, source.max_documents)
  seen = dict(zip(paths, see_files(paths, known or {}, log), strict=True))
  return make_corpus(source.path, splits, parts, seen, old, read)


def open_array_records(
  key: str, source: ConfigDict, splits: list[str]
) -> tuple[object, list[list[Part]]]:
  """Opens array_record files by glob, in which `{split}` stands for the split.

  This reads directories without a dataset_info.json, or whose file names other files.

  Returns:
    the features of the records, and the files of each split.
  """
  from tensorflow_datasets.core.features import FeaturesDict

  if len(splits) > 1 and "{split}" not in source.path:
    raise errors.ConfigError(
      f"{key}.path", source.path, "'{split}' where the name of the split is",
      "DIRECTORY/NAME-{split}.array_record*",
    )  # fmt: skip
  parts = []
  for split in splits:
    files = find_files(f"{key}.path", source.path.replace("{split}", split))
    counts = map(count_records, files)
    parts.append([Part(f, 0, n, n) for f, n in zip(files, counts, strict=True)])
  folder = os.path.dirname(parts[0][0].path)
  try:
    return FeaturesDict.from_config(folder), parts
  except Exception as error:  # whatever TFDS raises for JSON that is none of its own
    raise errors.MissingInputError(
      f"{key}.path: nothing says what the records hold",
      f"{folder}/features.json: {type(error).__name__}", "the features.json of TFDS",
    ) from error  # fmt: skip


def split_parts(builder, split: str) -> list[Part]:
  """Returns the files of a TFDS split, or of a slice of one, in the stored order."""
  found = builder.info.splits[split].file_instructions
  return [
    Part(os.fspath(i.filename), i.skip, i.take, i.examples_in_shard) for i in found
  ]


def needed_paths(parts: list[list[Part]], most: int) -> list[str]:
  """Returns the files of all splits, or those of the first `most` examples."""
  paths, left = {}, most or float("inf")
  for part in itertools.chain.from_iterable(parts):
    if left > 0:
      paths[part.path] = None
    left -= part.take
  return list(paths)


def make_corpus(
  path: str,
  splits: list[str],
  parts: list[list[Part]],
  seen: dict[str, Seen],
  old: str | None,
  read: Callable[[int, int], DocumentParts],
) -> Corpus:
  """Returns a corpus with one "file" per split; of two, the second is for validation.

  Args:
    old: the fingerprint that older versions kept; None is that of array_record files.
    read: returns the examples of (number of a split, number of the first one).
  """
  split_names = ("train", "validation") if len(splits) > 1 else ("",)

  def read_from(position=(0, 0)) -> Iterator[TextPiece]:
    for number in range(position[0], len(splits)):
      skip = position[1] if number == position[0] else 0
      split = (split_names[number], read(number, skip))
      yield from to_pieces([split], number, skip, skip)
      for part in parts[number]:
        if part.path in seen:
          check_unchanged(part.path, seen[part.path])

  if old is None:
    files = [(os.path.basename(p), size_of(p)) for own in parts for p, *_ in own]
    old = hash_listing([splits, files])
  return Corpus(
    files=[f"{path} {split}" for split in splits],
    sizes=[sum(seen[p.path].size for p in own if p.path in seen) for own in parts],
    seen=seen,
    names=[os.path.basename(path) for path in seen],
    old_fingerprint=old,
    read=read_from,
  )


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
  known = builder.info.splits
  if re.match(r"\w*", split)[0] not in {*known, "all"}:
    raise errors.ConfigError(key, repr(split), f"a split of {path}", " ".join(known))
  try:
    _ = known[split].file_instructions
  except Exception as error:  # whatever TFDS raises for a slice that it cannot take
    reason = " ".join(str(error).split())[:200]
    raise errors.ConfigError(
      key,
      f"{split!r}: {reason}",
      f"a split of {path}, or a slice of one",
      "train[:90%]",
    ) from error


def tfds_examples(builder, split: str, names: list[str]) -> Iterator[dict]:
  """Yields the named features of the examples, in the stored order."""
  kind, parts = builder.info.file_format.value, split_parts(builder, split)
  return read_examples(builder.info.features, names, parts, kind, 0, "stop")


def read_examples(
  features, names: list[str], parts: list[Part], kind: str, start: int, on_corrupt: str
) -> Iterator[dict | None]:
  """Yields the named features of each example from number `start` on; None if lost.

  Args:
    kind: the format of the files, as TFDS names it.
  """
  from tensorflow_datasets.core.features import FeaturesDict

  if kind not in ("tfrecord", "array_record"):
    raise errors.DataError(
      f"{parts[0].path} cannot be read", f"files of format {kind}",
      "TFDS data sets of format tfrecord or array_record",
    )  # fmt: skip
  features = FeaturesDict({name: features[name] for name in names})
  checked = None  # the file whose first record has the features
  for part, number, record in read_records(parts, kind, start, on_corrupt):
    if record is None:
      yield None
      continue
    try:
      if part.path != checked:
        check_features(record, names)
        checked = part.path
      example = features.deserialize_example_np(record)
    except Exception as error:  # whatever a decoder raises for bytes that it cannot use
      raise errors.DataError(
        f"{part.path} record {number + 1} does not hold what features.json says",
        " ".join(str(error).split())[:200], f"the features {' '.join(names)}",
      ) from error  # fmt: skip
    yield example


def check_features(record: bytes, names: list[str]) -> None:
  """Raises ValueError if an example lacks a feature: it would read as an empty one."""
  from tensorflow_datasets.proto import tf_example_pb2

  found = sorted(tf_example_pb2.Example.FromString(record).features.feature)
  tops = {name.partition("/")[0] for name in found}
  if set(names) - tops:
    raise ValueError(f"the features {' '.join(found)}")
