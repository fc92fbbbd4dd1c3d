"""Makes batches of labelled examples, for fine-tuning and scoring.

A batch holds int32 arrays: tokens, segment_ids and positions BL as in packed.py, and
  classify  token_types BL, labels B1: the class, -1 in padding rows
  tag       token_types BL, labels BL: the class of a word at its first token, else -1
  qa        token_types BL, labels B2: first and last column of the answer; 0 0 if it
            is not in this window of the context
  choice    token_types BL, labels B1, starts BC: option c is the segment that begins at
            column starts[:, c]; -1 where a row has fewer options
  chat      targets BL: the next token where it is the assistant's, else -1

All records are tokenised once and kept in memory, 3 to 9 bytes per token. As in
packed.py, batch t is a function of (seed, t) alone.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.batches.order import derive_key, permute
from flaxlm.data.tasks.encode import Encoder, Rows, pack, split_key
from flaxlm.data.tasks.labels import Labels
from flaxlm.data.tasks.records import (
  Records,
  choice_columns,
  has_validation,
  open_records,
)
from flaxlm.data.text.documents import split_of
from flaxlm.data.text.tables import Record, unusable
from flaxlm.tokenizer.chat_template import ChatTemplate
from flaxlm.tokenizer.files import AnyTokenizer
from flaxlm.tokenizer.word_offsets import Located

IN_TRAINING_TOO = "validation records are training records too"  # a problem
RECORDS_TOGETHER = 1024  # records that are tokenised together
UNTAUGHT = "of the classes without a training example"


@dataclasses.dataclass
class Examples:
  """The rows of a split, without padding: row r is flat[offsets[r] : offsets[r + 1]].

  Flat arrays that a kind does not need are empty.
  """

  kind: str
  label_names: tuple[str, ...]
  offsets: np.ndarray  # int64, one more than rows
  tokens: np.ndarray  # flat, uint16 or int32
  token_types: np.ndarray  # flat, uint8
  begins: np.ndarray  # flat, uint8: 1 where a segment begins (choice, chat)
  token_labels: np.ndarray  # flat, int32 (tag: classes; chat: targets)
  labels: np.ndarray  # int32, rows x R (classify, choice, qa)
  problems: dict[str, int]  # how often each problem occurred
  # qa. Of each row: its question, context, first token of the context and its column.
  windows: np.ndarray  # int32, rows x 4
  contexts: list[tuple[str, Located]]
  answers: list[list[str]]  # the right answers to each question
  numbered: bool = True  # whether a number in a record may stand for a class

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def num_choices(self) -> int:
    """The largest number of options of a row."""
    return int(np.add.reduceat(self.begins, self.offsets[:-1], dtype=np.int64).max())

  @functools.cached_property
  def fingerprint(self) -> str:
    """The sha256 of everything that a model learns from."""
    whole = hashlib.sha256(repr((self.kind, self.label_names)).encode())
    for array in (self.offsets, self.tokens, self.token_types, self.begins,
                  self.token_labels, self.labels):  # fmt: skip
      whole.update(f"{array.dtype} {array.shape}".encode())
      whole.update(np.ascontiguousarray(array))
    return whole.hexdigest()

  @property
  def references(self) -> np.ndarray | list:
    """The true answers, which scores.py compares predictions with.

    classify, choice: int32 N. tag: an int32 array per sentence. qa: a list of right
    texts per question, empty if there is no answer.
    """
    if self.kind == "qa":
      return self.answers
    if self.kind == "tag":
      rows = np.split(self.token_labels, self.offsets[1:-1])
      return [row[row >= 0] for row in rows]
    return self.labels[:, 0]

  def scored(self, predicted_NR: np.ndarray, scores_N2: np.ndarray | None = None):
    """Returns (predictions, references), both in the form of `references`.

    Args:
      predicted_NR: predicted `labels` of the first N rows, in order; rows of padding
        may follow.
      scores_N2: qa: scores of the span and of "no answer here", as best_spans gives.
    """
    count = min(len(predicted_NR), len(self))
    if self.kind == "qa":
      return self._read_answers(predicted_NR[:count], scores_N2[:count])
    if self.kind == "tag":
      predictions = []
      for row in range(count):
        own = self.token_labels[self.offsets[row] : self.offsets[row + 1]]
        predictions.append(predicted_NR[row, : len(own)][own >= 0])
      return predictions, self.references[:count]
    return predicted_NR[:count, 0], self.references[:count]

  def _read_answers(self, spans_N2: np.ndarray, scores_N2: np.ndarray):
    """Returns the text of each question's best span in all its windows, and answers."""
    count, windows = len(spans_N2), self.windows[: len(spans_N2)]
    # The last question may have windows that were not scored.
    questions = self.windows[count][0] if count < len(self) else len(self.answers)
    may_be_empty = not all(self.answers)
    texts, best = [""] * questions, np.full(questions, -np.inf)
    none = np.full(questions, np.inf)
    for row, (question, context, first, column) in enumerate(windows.tolist()):
      if question >= questions:
        break
      none[question] = min(none[question], scores_N2[row, 1])
      text, located = self.contexts[context]
      start, stop = (spans_N2[row] - column + first).tolist()
      inside = first <= start <= stop < len(located.ids)
      if inside and scores_N2[row, 0] > best[question]:
        best[question] = scores_N2[row, 0]
        texts[question] = text[located.starts[start] : located.ends[stop]]
    if may_be_empty:
      texts = [text if best[i] > none[i] else "" for i, text in enumerate(texts)]
    return texts, self.answers[:questions]


def load_examples(
  task: ConfigDict,
  tokenizer: AnyTokenizer,
  seq_len: int,
  *,
  causal: bool,
  validation_fraction: float,
  num_threads: int = 1,
  chat_template: ChatTemplate | None = None,
  training: bool = True,
  labels: Labels | None = None,
) -> tuple[Examples | None, Examples | None]:
  """Reads, checks and tokenises config.task's records; returns (train, validation).

  If there are no separate validation records, `validation_fraction` of all records is
  held out by a hash of their text; validation is None if the fraction is 0.

  Args:
    causal: put bos and eos around texts, rather than [CLS] and [SEP].
    training: False reads only validation records, and train is None. The other records
      are read too if the names of the classes are not known.
    labels: the classes; None = those of task.labels.

  Raises:
    ConfigError, MissingInputError, DataError: with file and line where they are known.
  """
  encoder = Encoder(task, tokenizer, seq_len, causal, num_threads, chat_template)
  separate, classes = has_validation(task), task.kind in ("classify", "tag")
  held_out = open_records(task, validation=True) if separate else None
  labels = labels or Labels(task.labels, numbered=classes)
  labels = with_names(labels, held_out, encoder)
  known = not classes or bool(labels.names)
  main = open_records(task) if training or not separate or not known else None
  check_same_columns(main, held_out, encoder)
  labels = with_names(labels, main, encoder)
  splits = {name: Rows(tokenizer.vocab_size) for name in ("train", "validation")}
  trained, validated = {}, {}  # how often each text occurs
  if main:
    fraction = 0.0 if separate else validation_fraction
    records = split_records(main, encoder, fraction)
    if not training and known:
      records = (pair for pair in records if pair[0] == "validation")
    encode_splits(encoder, count_known(records, trained, encoder), labels, splits)
  renumber = close_labels(labels, task) if classes else None
  train = None
  if training:
    if not splits["train"].lengths:
      raise no_examples(main, splits["train"])
    train = to_examples(splits["train"], task, seq_len, labels, renumber)
    train.problems.update(find_untaught(train))
  if held_out:
    records = (("validation", record) for record in held_out.read())
    encode_splits(encoder, count_known(records, validated, encoder), labels, splits)
    note_overlap(train, trained, validated)
    renumber = None  # the labels were closed before: these have their final numbers
  elif not validation_fraction:
    return train, None
  if not splits["validation"].lengths:
    raise no_examples(held_out or main, splits["validation"], by_hash=not separate)
  return train, to_examples(splits["validation"], task, seq_len, labels, renumber)


def with_names(labels: Labels, records: Records | None, encoder: Encoder) -> Labels:
  """Returns the labels, named as in the data set if it names its classes, as in TFDS.

  It gives names for its numbers itself: numbers elsewhere may mean other classes.
  """
  if labels.names or not records:
    return labels
  return Labels(records.class_names.get(encoder.columns[2], ()), numbered=False)


def close_labels(labels: Labels, task: ConfigDict) -> np.ndarray:
  """Returns what `labels.close` does. Raises DataError for less than two classes."""
  renumber = labels.close()
  if len(labels.names) < 2:
    given = f"labels: {' '.join(labels.names) or 'none'}"
    raise unusable(f"config.task.path={task.path}", given, "two classes or more")
  return renumber


def find_untaught(train: Examples) -> dict[str, int]:
  """Returns how many classes have no example (all may be held out), as a problem."""
  if train.kind not in ("classify", "tag"):
    return {}
  taught = train.token_labels if train.kind == "tag" else train.labels
  count = len(train.label_names) - len(np.unique(taught[taught >= 0]))
  return {UNTAUGHT: count} if count else {}


def check_same_columns(
  train: Records | None, held_out: Records | None, encoder: Encoder
) -> None:
  """Raises DataError if validation records lack a column that training records have.

  It reads the first record of each, before anything is encoded.
  """
  first = next(train.read(), None) if train else None
  other = next(held_out.read(), None) if held_out else None
  if first is None or other is None:
    return
  wanted = [*encoder.columns, *choice_columns(encoder.task)]
  lacking = [c for c in wanted if c in first.fields and c not in other.fields]
  if lacking:
    raise unusable(
      other.place, f"columns {' '.join(other.fields)}",
      f"a column {lacking[0]}, as in {first.file}: one config.task.text, text_pair, "
      "label and choices name the columns of both files", "rename its columns",
    )  # fmt: skip


def count_known(
  records: Iterator[tuple[str, Record]], known: dict[bytes, int], encoder: Encoder
) -> Iterator[tuple[str, Record]]:
  """Yields (split, record) and counts each record in `known`, by a hash of its text."""
  for split, record in records:
    texts = [record.fields.get(column) for column in encoder.columns[:2] if column]
    key = json.dumps(texts, default=str).encode()
    key = hashlib.blake2b(key, digest_size=8).digest()
    known[key] = known.get(key, 0) + 1
    yield split, record


def note_overlap(
  train: Examples | None, trained: dict[bytes, int], validated: dict[bytes, int]
) -> None:
  """Notes how many validation records are training records too, as a problem."""
  overlap = sum(count for key, count in validated.items() if key in trained)
  if train and overlap:
    train.problems[IN_TRAINING_TOO] = overlap


def split_records(
  records: Records, encoder: Encoder, fraction: float
) -> Iterator[tuple[str, Record]]:
  """Yields (split, record); `fraction` of the records are for validation."""
  for record in records.read():
    split = "train"
    if fraction:
      split = split_of(split_key(record, encoder).encode(), fraction)
    yield split, record


def encode_splits(
  encoder: Encoder, records, labels: Labels, splits: dict[str, Rows]
) -> None:
  """Adds the rows of (split, record) pairs to their splits, many records at a time."""
  waiting: dict[str, list[Record]] = {name: [] for name in splits}
  for split, record in records:
    waiting[split].append(record)
    if len(waiting[split]) == RECORDS_TOGETHER:
      encoder.encode(waiting[split], labels, splits[split])
      waiting[split] = []
  for split, rest in waiting.items():
    if rest:
      encoder.encode(rest, labels, splits[split])


def no_examples(
  records: Records, rows: Rows, by_hash: bool = False
) -> errors.DataError:
  """Returns the error for a split without rows; `by_hash`: it should be held out."""
  if by_hash:
    return unusable(
      f"{records.path} as validation records", "none were held out",
      "at least one", "config.task.validation_path, or more of "
      "config.data.validation_fraction, or 0 for no validation",
    )  # fmt: skip
  found = "; ".join(f"{what}: {n}" for what, n in rows.problems.items() if n)
  return unusable(
    records.path, f"no examples in it ({found or 'empty'})", "at least one"
  )


def to_examples(
  rows: Rows,
  task: ConfigDict,
  seq_len: int,
  labels: Labels,
  renumber: np.ndarray | None,
) -> Examples:
  """Returns the rows as arrays; `renumber` is what `labels.close` returned."""
  kind, count = task.kind, len(rows.lengths)
  offsets = np.concatenate([[0], np.cumsum(rows.lengths, dtype=np.int64)])
  flat = {
    "tokens": np.frombuffer(rows.tokens, rows.dtype),
    "token_types": np.frombuffer(rows.types, np.uint8),
    "begins": np.frombuffer(rows.begins, np.uint8),
    "token_labels": np.frombuffer(rows.token_labels, np.int32),
  }
  own = np.frombuffer(rows.labels, np.int32).reshape(count, -1)
  if renumber is not None and kind == "tag":
    known = flat["token_labels"]
    flat["token_labels"] = np.where(known >= 0, renumber[known], -1).astype(np.int32)
  elif renumber is not None:
    own = renumber[own]
  if kind == "chat" and task.pack:
    groups = pack(rows.lengths, seq_len)
    order = [row for group in groups for row in group]
    flat = {name: reorder(array, offsets, order) for name, array in flat.items()}
    sizes = [sum(rows.lengths[row] for row in group) for group in groups]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    own = own.reshape(len(groups), 0)
  return Examples(
    kind=kind,
    label_names=labels.names,
    offsets=offsets,
    labels=own,
    problems={what: n for what, n in sorted(rows.problems.items()) if n},
    windows=np.array(rows.windows, np.int32).reshape(-1, 4),
    contexts=rows.contexts,
    answers=rows.answers,
    numbered=labels.numbered,
    **flat,
  )


def reorder(flat: np.ndarray, offsets: np.ndarray, order: list[int]) -> np.ndarray:
  """Returns a flat array with its rows in another order."""
  if not len(flat):
    return flat
  return np.concatenate([flat[offsets[row] : offsets[row + 1]] for row in order])


@dataclasses.dataclass
class ExampleBatches:
  """`batches[t]` is batch t: its rows [first_row, first_row + num_rows), for one host.

  Every example is in one row of each epoch. With `in_order`, for scoring, the batches
  hold each row once, in order, and the last batch ends with padding.
  """

  examples: Examples
  seq_len: int
  batch_size: int
  seed: int
  vocab_size: int
  pad_id: int
  in_order: bool = False
  first_row: int = 0
  num_rows: int = 0

  def __post_init__(self):
    self.num_rows = self.num_rows or self.batch_size
    largest = int(self.examples.tokens.max(initial=0))
    if largest >= self.vocab_size:
      raise errors.ConfigError(
        "config.model.vocab_size",
        self.vocab_size,
        f"more than {largest}, a token of the examples",
        "the vocabulary size of the tokenizer",
      )
    kind = self.examples.kind
    self._num_choices = self.examples.num_choices if kind == "choice" else 0

  def __len__(self) -> int:
    """Returns how many batches hold every row once."""
    return -(-len(self.examples) // self.batch_size)

  def rows(self, step: int) -> np.ndarray:
    """Returns the examples' rows in this host's part of a batch; -1 is padding."""
    first, size = step * self.batch_size + self.first_row, len(self.examples)
    number = np.arange(first, first + self.num_rows)
    if self.in_order:
      return np.where(number < size, number, -1)
    row = np.empty_like(number)
    for epoch in np.unique(number // size):
      here = number // size == epoch
      row[here] = permute(number[here] % size, size, derive_key(self.seed, 0, epoch))
    return row

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    own, rows = self.examples, self.rows(step)
    shape = (self.num_rows, self.seq_len)
    arrays = {
      "tokens": np.full(shape, max(self.pad_id, 0), np.int32),
      "segment_ids": np.zeros(shape, np.int32),
      "positions": np.zeros(shape, np.int32),
    }
    chat = own.kind == "chat"
    if chat:
      arrays["targets"] = np.full(shape, -1, np.int32)
    else:
      arrays["token_types"] = np.zeros(shape, np.int32)
      width = self.seq_len if own.kind == "tag" else own.labels.shape[1]
      arrays["labels"] = np.full((self.num_rows, width), -1, np.int32)
    if own.kind == "choice":
      arrays["starts"] = np.full((self.num_rows, self._num_choices), -1, np.int32)
    for i, row in enumerate(rows.tolist()):
      if row >= 0:
        self._fill(arrays, i, row)
    return arrays

  def _fill(self, arrays: dict[str, np.ndarray], i: int, row: int) -> None:
    """Writes row `row` of the examples into row i of a batch."""
    own = self.examples
    at = slice(own.offsets[row], own.offsets[row + 1])
    length = at.stop - at.start
    arrays["tokens"][i, :length] = own.tokens[at]
    arrays["segment_ids"][i, :length] = 1
    arrays["positions"][i, :length] = np.arange(length)
    if len(own.begins):
      segments = np.cumsum(own.begins[at], dtype=np.int32)
      starts = np.flatnonzero(own.begins[at])
      arrays["segment_ids"][i, :length] = segments
      arrays["positions"][i, :length] -= starts[segments - 1].astype(np.int32)
    if own.kind == "chat":
      arrays["targets"][i, :length] = own.token_labels[at]
      return
    arrays["token_types"][i, :length] = own.token_types[at]
    if own.kind == "tag":
      arrays["labels"][i, :length] = own.token_labels[at]
    else:
      arrays["labels"][i] = own.labels[row]
    if own.kind == "choice":
      arrays["starts"][i, : len(starts)] = starts
