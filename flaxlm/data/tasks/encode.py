"""Encodes labelled records as rows of tokens and labels, one function per task kind.

Texts are laid out as in BERT: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP], where
the pair has token type 1. Causal models, and tokenizers without these tokens, use bos
for [CLS] and eos for [SEP], which they saw at the ends of documents.
"""

import bisect
import collections
import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.tasks.labels import Labels
from flaxlm.data.tasks.records import choice_columns, columns
from flaxlm.data.text.tables import Record, describe_value
from flaxlm.tokenizer.chat_template import ChatTemplate, encode_chat
from flaxlm.tokenizer.files import AnyTokenizer
from flaxlm.tokenizer.word_offsets import Located, WordEncoder

SHORTEST = 8  # tokens per row: special tokens, and a few of each text
CUT = "longer than a row, cut"
NO_TARGET = "nothing to predict in the row, dropped"
MISPLACED = "answer not where its offset says, not learnt"


class Rows:
  """The rows of a split while they are made, in flat arrays to save memory."""

  def __init__(self, vocab_size: int):
    self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    self.tokens, self.types, self.begins = bytearray(), bytearray(), bytearray()
    self.token_labels, self.labels = bytearray(), bytearray()  # int32
    self.lengths: list[int] = []
    self.problems: collections.Counter[str] = collections.Counter()
    # Of questions: the window of a context in each row, and the right answers.
    self.windows: list[tuple[int, int, int, int]] = []
    self.contexts: list[tuple[str, Located]] = []
    self.answers: list[list[str]] = []

  def add(self, ids, types, labels=(), token_labels=None, begins=None) -> None:
    """Adds a row; `begins` are the first columns of its segments, if it has several."""
    self.tokens += np.asarray(ids).astype(self.dtype).tobytes()
    self.types += np.asarray(types, np.uint8).tobytes()
    self.labels += np.asarray(labels, np.int32).tobytes()
    self.lengths.append(len(ids))
    if token_labels is not None:
      self.token_labels += np.asarray(token_labels, np.int32).tobytes()
    if begins is not None:
      marks = np.zeros(len(ids), np.uint8)
      marks[begins] = 1
      self.begins += marks.tobytes()


@dataclasses.dataclass
class Encoder:
  """Turns the records of a task into rows.

  Raises:
    ConfigError: no token can end a text, or rows are too short.
  """

  task: ConfigDict
  tokenizer: AnyTokenizer
  seq_len: int
  causal: bool
  num_threads: int = 1
  chat_template: ChatTemplate | None = None

  def __post_init__(self):
    tok, self.kind, self.columns = self.tokenizer, self.task.kind, columns(self.task)
    self.start, self.stop = text_frame(tok, self.causal)
    if not self.stop and self.kind != "chat":
      raise errors.ConfigError(
        "config.tokenizer.path", "a model with neither sep nor eos",
        "a token that ends a text, for config.task.kind=" + self.kind,
      )  # fmt: skip
    if self.seq_len < SHORTEST:
      needed = f"{SHORTEST} tokens or more for config.task.kind={self.kind}"
      raise errors.ConfigError("config.data.seq_len", self.seq_len, needed)
    self.words = None
    if self.kind in ("tag", "qa"):
      self.words = WordEncoder(tok, self.num_threads)

  def encode(self, records: list[Record], labels: Labels, rows: Rows) -> None:
    """Adds the rows of some records."""
    kind = self.kind
    if kind == "classify":
      encode_classes(self, records, labels, rows)
    elif kind == "tag":
      encode_tags(self, records, labels, rows)
    elif kind == "qa":
      encode_questions(self, records, rows)
    elif kind == "choice":
      encode_choices(self, records, labels, rows)
    elif kind == "chat":
      encode_chats(self, records, rows)
    else:
      raise ValueError(f"no rows for a task of kind {kind}")

  def encode_all(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the ids of each distinct text."""
    texts = list(dict.fromkeys(texts))
    ids = self.tokenizer.encode_batch(texts, self.num_threads)
    return dict(zip(texts, ids, strict=True))

  def lay_out(self, first, second=None) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids, token types) of one text, or of two, with the special tokens."""
    return lay_out_texts((self.start, self.stop), first, second)

  def lay_out_pair(self, first, second, limit: int):
    """Lays out two texts in at most `limit` tokens; the longer one is cut first."""
    a, b = fit_pair(len(first), len(second), limit - len(self.start) - 2)
    return self.lay_out(first[:a], second[:b])


def text_frame(tokenizer: AnyTokenizer, causal: bool) -> tuple[list[int], list[int]]:
  """Returns the special tokens (before, after) a text of a task, if there are any."""
  starts = [tokenizer.cls_id, tokenizer.bos_id]
  stops = [tokenizer.sep_id, tokenizer.eos_id]
  if causal:
    starts, stops = starts[::-1], stops[::-1]
  return [i for i in starts if i >= 0][:1], [i for i in stops if i >= 0][:1]


def lay_out_texts(
  frame: tuple[list[int], list[int]], first, second=None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (ids, token types) of one text, or of two, inside a `text_frame`."""
  start, stop = frame
  pieces = [start, first, stop] + ([second, stop] if second is not None else [])
  ids = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
  types = np.zeros(len(ids), np.uint8)
  if second is not None:
    types[len(ids) - len(second) - len(stop) :] = 1
  return ids, types


def fit_pair(first: int, second: int, room: int) -> tuple[int, int]:
  """Returns two lengths that fit into `room`; the longer text is cut first."""
  if first + second <= room:
    return first, second
  short = min(first, second, room // 2)
  long = room - short
  return (short, long) if first <= second else (long, short)


def split_key(record: Record, encoder: Encoder) -> str:
  """Returns the text whose hash decides the split: equal texts stay together."""
  text, pair, _ = encoder.columns
  if encoder.kind == "classify":
    return record.text(text) + ("\n" + record.text(pair) if pair else "")
  column = pair if encoder.kind == "qa" else text
  value = record.value(column)
  return value if isinstance(value, str) else json.dumps(value, default=str)


def encode_classes(
  encoder: Encoder, records: list[Record], labels: Labels, rows: Rows
) -> None:
  """Adds rows of one text, or two, with a class each."""
  text, pair, label = encoder.columns
  firsts = [record.text(text) for record in records]
  seconds = [record.text(pair) for record in records] if pair else []
  ids = encoder.encode_all(firsts + seconds)
  room = encoder.seq_len - len(encoder.start) - 1
  for i, record in enumerate(records):
    number = labels.number(record.value(label), record, label)
    first = ids[firsts[i]]
    if pair:
      second = ids[seconds[i]]
      row = encoder.lay_out_pair(first, second, encoder.seq_len)
      rows.problems[CUT] += len(first) + len(second) > room - 1
    else:
      row = encoder.lay_out(first[:room])
      rows.problems[CUT] += len(first) > room
    rows.add(*row, [number])


def encode_tags(
  encoder: Encoder, records: list[Record], labels: Labels, rows: Rows
) -> None:
  """Adds rows of tagged words; the label is at the first token of each word."""
  text, _, label = encoder.columns
  sentences = [record.texts(text) for record in records]
  space, unknown = encoder.words.space, max(encoder.tokenizer.unk_id, 0)
  firsts = [sentence[0] for sentence in sentences]
  encoder.words.learn(firsts + [space + w for s in sentences for w in s[1:]])
  for record, sentence in zip(records, sentences, strict=True):
    tags = record.value(label)
    if not isinstance(tags, list) or len(tags) != len(sentence):
      given = f"{len(tags)} tags" if isinstance(tags, list) else describe_value(tags)
      raise record.wrong(
        f"{label}: {given}", f"a list of {len(sentence)}, as many as in {text}"
      )
    words = encoder.words.encode(sentence)
    # A word without tokens (of control characters) still needs a place for its tag.
    words = [ids if len(ids) else np.array([unknown], np.int32) for ids in words]
    heads = np.cumsum([0, *map(len, words)])
    own = np.full(heads[-1], -1, np.int32)
    own[heads[:-1]] = [labels.number(tag, record, label) for tag in tags]
    room = encoder.seq_len - len(encoder.start) - 1
    ids, types = encoder.lay_out(np.concatenate(words)[:room])
    marks = np.full(len(ids), -1, np.int32)
    marks[len(encoder.start) : -1] = own[:room]
    rows.problems[CUT] += len(own) > room
    rows.add(ids, types, token_labels=marks)


def encode_choices(
  encoder: Encoder, records: list[Record], labels: Labels, rows: Rows
) -> None:
  """Adds rows whose segments are a query with each of its options."""
  label = encoder.columns[2]
  pairs = [read_options(record, encoder) for record in records]
  ids = encoder.encode_all(
    [text for options in pairs for pair in options for text in pair]
  )
  extra, seq_len = len(encoder.start) + 2, encoder.seq_len
  for record, options in zip(records, pairs, strict=True):
    number = option_number(record, label, labels, len(options))
    lengths = [len(ids[a]) + len(ids[b]) + extra for a, b in options]
    limit = fit_all(lengths, seq_len)
    if limit < min(extra + 2, max(lengths)):
      raise record.wrong(
        f"{len(options)} options in a row of {seq_len} tokens",
        f"{extra + 2} tokens or more for each", f"--config.data.seq_len={2 * seq_len}",
      )  # fmt: skip
    rows.problems[CUT] += limit < max(lengths)
    laid = [encoder.lay_out_pair(ids[a], ids[b], limit) for a, b in options]
    begins = np.cumsum([0, *(len(segment) for segment, _ in laid[:-1])])
    all_ids, all_types = map(np.concatenate, zip(*laid, strict=True))
    rows.add(all_ids, all_types, [number], begins=begins)


def read_options(record: Record, encoder: Encoder) -> list[tuple[str, str]]:
  """Returns the (query, option) pairs of a record; either may be shared by all."""
  query, names = encoder.columns[0], choice_columns(encoder.task)
  texts = record.value(query)
  texts = record.texts(query) if isinstance(texts, list) else [record.text(query)]
  if len(names) == 1:
    listed = isinstance(record.value(names[0]), list)
    options = record.texts(names[0]) if listed else [record.text(names[0])]
  else:
    options = [record.text(name) for name in names]
  count = max(len(texts), len(options))
  if count < 2 or {len(texts), len(options)} - {1, count}:
    raise record.wrong(
      f"{len(texts)} texts in {query}, {len(options)} in {' '.join(names)}",
      "two or more options, and one query or as many",
      "--config.task.choices with the columns that hold the options",
    )  # fmt: skip
  texts, options = (x * count if len(x) == 1 else x for x in (texts, options))
  return list(zip(texts, options, strict=True))


def option_number(record: Record, label: str, labels: Labels, count: int) -> int:
  """Returns the number of the right option, from 0; `labels` may name options."""
  value = record.value(label)
  if labels.names:
    number = labels.number(value, record, label)
  else:
    whole = isinstance(value, int) and not isinstance(value, bool)
    decimal = isinstance(value, str) and value.isdecimal()
    number = int(value) if whole or decimal else -1
  if not 0 <= number < count:
    raise record.wrong(
      f"{label}: {describe_value(value)}", f"the number of an option, 0 to {count - 1}",
      "--config.task.labels=A,B,C,D if they have names",
    )  # fmt: skip
  return number


def fit_all(lengths: Sequence[int], room: int) -> int:
  """Returns the largest limit for each length so that all fit into `room`."""
  limit, rest = max(lengths), room
  if sum(lengths) <= room:
    return limit
  for done, length in enumerate(sorted(lengths)):
    limit = rest // (len(lengths) - done)
    if limit < length:
      return limit
    rest -= length
  return limit


def encode_questions(encoder: Encoder, records: list[Record], rows: Rows) -> None:
  """Adds rows of a question and its context; a long context becomes several rows."""
  question, context, _ = encoder.columns
  ids = encoder.encode_all([record.text(question) for record in records])
  texts = {record.text(context): -1 for record in records}
  encoder.words.learn([word for text in texts for word in encoder.words.surfaces(text)])
  for record in records:
    text = record.text(context)
    if texts[text] < 0:
      texts[text] = len(rows.contexts)
      rows.contexts.append((text, encoder.words.locate(text)))
    number = texts[text]
    located = rows.contexts[number][1]
    answers = read_answers(record, encoder.columns[2])
    span = find_span(text, located, answers)
    rows.problems[MISPLACED] += span == (-1, -1)
    space = encoder.seq_len - len(encoder.start) - 2
    asked = ids[record.text(question)][: space // 2]
    room = space - len(asked)
    column = len(encoder.start) + len(asked) + 1
    for first in windows(len(located.ids), room, encoder.task.doc_stride):
      shown = located.ids[first : first + room]
      row = encoder.lay_out(asked, shown)
      rows.windows.append((len(rows.answers), number, first, column))
      rows.add(*row, place_span(span, first, len(shown), column))
    rows.answers.append([answer for answer, _ in answers])


def windows(count: int, room: int, stride: int) -> range:
  """Returns where the windows begin, `stride` apart, that cover `count` tokens."""
  stride = min(stride, room)
  return range(0, max(count - room, 0) + stride, stride)


def place_span(
  span: tuple[int, int], first: int, count: int, column: int
) -> tuple[int, int]:
  """Returns the first and last column of a span in a window; (0, 0) if not in it."""
  if span is None or span == (-1, -1):
    return span or (0, 0)
  if first <= span[0] and span[1] < first + count:
    return span[0] - first + column, span[1] - first + column
  return 0, 0


def find_span(
  text: str, located: Located, answers: list[tuple[str, int]]
) -> tuple[int, int] | None:
  """Returns the (first, last) token of the first answer; None if there is no answer.

  (-1, -1) if the answer is not at its offset: such a row teaches nothing.
  """
  if not answers:
    return None
  answer, start = answers[0]
  inside = np.flatnonzero(
    (located.starts < start + len(answer)) & (located.ends > start)
  )
  if not len(inside) or text[start : start + len(answer)] != answer:
    return -1, -1
  return int(inside[0]), int(inside[-1])


def read_answers(record: Record, column: str) -> list[tuple[str, int]]:
  """Returns (text, offset in characters) of each right answer; [] if there is none."""
  value = record.value(column)
  try:
    if isinstance(value, dict):
      pairs = list(zip(value["text"], value["answer_start"], strict=True))
    else:
      pairs = [(answer["text"], answer["answer_start"]) for answer in value]
  except (KeyError, TypeError, ValueError):
    pairs = [(None, None)]  # refused below
  for text, start in pairs:
    if not isinstance(text, str) or not isinstance(start, int):
      raise record.wrong(
        f"{column}: {describe_value(value)}", "answers, each with text and answer_start"
      )
  return pairs


def encode_chats(encoder: Encoder, records: list[Record], rows: Rows) -> None:
  """Adds rows of conversations; targets are the tokens that encode_chat marks."""
  column = encoder.columns[0]
  for record in records:
    messages = record.value(column)
    try:
      ids, learnt = encode_chat(messages, encoder.tokenizer, encoder.chat_template)
    except errors.DataError as error:
      raise errors.DataError(f"{record.place}: {error}") from error
    ids = np.asarray(ids, np.int32)
    targets = np.where(np.asarray(learnt, bool), ids, -1)[1:]
    targets = targets[: encoder.seq_len]
    if not (targets >= 0).any():
      rows.problems[NO_TARGET] += 1
      continue
    rows.problems[CUT] += len(ids) - 1 > encoder.seq_len
    tokens = ids[: len(targets)]
    types = np.zeros(len(tokens), np.uint8)
    rows.add(tokens, types, token_labels=targets, begins=[0])


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
  """Returns groups of rows that fit into `size`: longest first, each in the best fit.

  This best-fit decreasing fills rows almost fully (Ding et al. 2024, arXiv 2404.10830).
  """
  packed: list[list[int]] = []
  with_room: dict[int, list[int]] = {}  # room left -> packed rows that have it
  rooms: list[int] = []  # the keys of `with_room`, sorted
  for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
    at = bisect.bisect_left(rooms, lengths[row])
    if at < len(rooms):
      room = rooms[at]
      chosen = with_room[room].pop()
      if not with_room[room]:
        del with_room[room], rooms[at]
    else:
      room, chosen = size, len(packed)
      packed.append([])
    packed[chosen].append(row)
    left = room - lengths[row]
    if left not in with_room:
      with_room[left] = []
      bisect.insort(rooms, left)
    with_room[left].append(chosen)
  return packed
