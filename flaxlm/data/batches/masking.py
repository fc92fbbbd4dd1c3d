"""Chooses what to predict: turns the documents of a row into inputs and targets.

Pure functions make a row from its documents and a generator that is keyed by the row's
number alone. So masks are dynamic (Liu et al. 2019), yet batch t is always the same. A
row masks a fixed number of units, not each one with a fixed probability: rows then
weigh the same, and the loss varies less. The number is rounded at random, so short rows
are masked at the same rate.

Rows are dicts of int32 arrays without padding; `stack` adds it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flaxlm.data.batches import spans
from flaxlm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Objective:
  """What to predict: the fields of config.objective, which explains them."""

  kind: str = "causal"
  mask_rate: float = 0.15
  mask_unit: str = "token"
  mean_span: float = 3.0
  mask_token_rate: float = 0.8
  random_token_rate: float = 0.1
  pairs: str = "none"
  num_sentinels: int = 100
  fim_rate: float = 0.5
  spm_rate: float = 0.5


CAUSAL = Objective()


class SpecialIds(NamedTuple):
  """The ids of special tokens; -1 for those that the tokenizer does not have."""

  bos: int = -1
  eos: int = -1
  mask: int = -1
  cls: int = -1
  sep: int = -1
  fim_prefix: int = -1
  fim_middle: int = -1
  fim_suffix: int = -1


def special_ids(store) -> tuple[SpecialIds, list[int]]:
  """Returns the special ids of a token store, and the list of ids that are not text."""
  named = store.special_tokens

  def fim(part: str) -> int:  # as Qwen and as StarCoder spell it
    return named.get(f"<|fim_{part}|>", named.get(f"<fim_{part}>", -1))

  special = SpecialIds(
    store.bos_id, store.eos_id, store.mask_id, store.cls_id, store.sep_id,
    fim("prefix"), fim("middle"), fim("suffix"),
  )  # fmt: skip
  return special, [store.pad_id, store.unk_id, *named.values()]


class Vocabulary(NamedTuple):
  """What an objective knows about the ids of the model, V of them."""

  special: SpecialIds
  is_text: np.ndarray  # bool V: may be masked, hidden, or drawn at random
  text_ids: np.ndarray  # int32: the ids for which `is_text` is true
  continues_word: np.ndarray | None  # bool V: not the first token of a word
  sentinels: np.ndarray  # int32: counts down from the last id, as in T5


NEEDED = {
  "masked": (("mask", "<mask>"), ("cls", "<cls>"), ("sep", "<sep>")),
  "fim": (
    ("fim_prefix", "<|fim_prefix|>"),
    ("fim_middle", "<|fim_middle|>"),
    ("fim_suffix", "<|fim_suffix|>"),
  ),
}


def make_vocabulary(
  objective: Objective,
  vocab_size: int,
  text_size: int,
  special: SpecialIds,
  control_ids: Sequence[int] = (),
  continues_word: np.ndarray | None = None,
) -> Vocabulary:
  """Returns what `objective` needs to know about the vocabulary.

  Args:
    vocab_size: the size of the model's vocabulary.
    text_size: the size of the tokenizer's vocabulary; text has only ids below it.
    control_ids: further ids that are not text, such as pad and unk.
    continues_word: bool, for each id of the tokenizer.

  Raises:
    ConfigError: a special token is missing, or there is no room for the sentinels.
  """
  needed = NEEDED.get(objective.kind, ())
  for name, symbol in needed:
    if special._asdict()[name] < 0:
      trained = "a tokenizer that flaxlm.prepare trains"
      symbols = ",".join(symbol for _, symbol in needed)
      if objective.kind == "fim":
        trained += f" with --config.tokenizer.user_symbols='{symbols}'"
      raise ConfigError(
        "config.objective.kind",
        f"{objective.kind}, with a tokenizer that has no {symbol}",
        "a store whose tokenizer has this control symbol",
        trained,
      )
  in_words = objective.kind == "masked" and objective.mask_unit == "word"
  if in_words and continues_word is None:
    raise ConfigError(
      "config.objective.mask_unit",
      "word, with a store that does not say where words begin",
      "a store that this version of flaxlm.prepare wrote",
      "token",
    )
  is_text = np.zeros(vocab_size, bool)
  is_text[:text_size] = True
  is_text[[i for i in (*special, *control_ids) if i >= 0]] = False
  if not is_text.any():
    raise ConfigError("config.model.vocab_size", vocab_size, "room for ids of text")
  if continues_word is not None:
    missing = np.zeros(vocab_size - len(continues_word), bool)
    continues_word = np.concatenate([continues_word.astype(bool), missing])
  num_sentinels = objective.num_sentinels if objective.kind == "span" else 0
  if num_sentinels > vocab_size - text_size:
    raise ConfigError(
      "config.model.vocab_size",
      vocab_size,
      f"at least {text_size + num_sentinels}: {text_size} of the tokenizer and "
      f"config.objective.num_sentinels={num_sentinels} above them",
      f"{-(-(text_size + num_sentinels) // 64) * 64}",
    )
  sentinels = vocab_size - 1 - np.arange(num_sentinels, dtype=np.int32)
  text_ids = np.flatnonzero(is_text).astype(np.int32)
  return Vocabulary(special, is_text, text_ids, continues_word, sentinels)


def synthetic_vocabulary(objective: Objective, vocab_size: int) -> Vocabulary:
  """Returns a vocabulary for random tokens: special ids, then text, then sentinels."""
  special = SpecialIds(*range(1, 1 + len(SpecialIds._fields)))
  text_size = vocab_size
  if objective.kind == "span":
    text_size = max(vocab_size - objective.num_sentinels, 0)
  continues_word = np.arange(text_size) % 3 == 0
  return make_vocabulary(
    objective, vocab_size, text_size, special, (0,), continues_word
  )


def fills(objective: Objective, pad_id: int) -> dict[str, int]:
  """Returns the names of a batch's arrays, and the values that pad them."""
  names = {"tokens": max(pad_id, 0), "targets": -1, "segment_ids": 0, "positions": 0}
  if objective.pairs != "none":
    names |= {"token_types": 0, "pair_labels": -1}
  if objective.kind in ("span", "prefix"):
    names |= {"prefix": 0}
  return names


def stack(
  rows: Sequence[dict[str, np.ndarray]],
  objective: Objective,
  seq_len: int,
  pad_id: int,
) -> dict[str, np.ndarray]:
  """Pads rows to arrays BL (pair_labels: B1); an empty dict is a row of padding."""
  batch = {}
  for name, fill in fills(objective, pad_id).items():
    width = 1 if name == "pair_labels" else seq_len
    batch[name] = np.full((len(rows), width), fill, np.int32)
    for i, row in enumerate(rows):
      if row:
        batch[name][i, : len(row[name])] = row[name]
  return batch


def stride(
  objective: Objective,
  vocabulary: Vocabulary,
  seq_len: int,
  tokens_per_document: float,
) -> int:
  """Returns how many tokens of the store fill a row, with room for what is added.

  Raises:
    ConfigError: `seq_len` is too short for any.
  """
  for size in range(seq_len, 1, -1):
    added = _added(objective, vocabulary, size, size / tokens_per_document)
    if size + added <= seq_len:
      return size
  raise ConfigError(
    "config.data.seq_len",
    seq_len,
    f"room for text beside the symbols of config.objective.kind={objective.kind}",
    "128",
  )


def _added(objective, vocabulary, size: int, documents: float) -> int:
  """Estimates how many tokens an objective adds to `size` tokens of `documents`."""
  documents += 1  # the edges of a row cut documents
  if objective.pairs != "none":
    return 3
  if objective.kind == "masked":
    special = vocabulary.special
    missing = (special.bos < 0) + (special.eos < 0)
    return 2 + int(missing * documents)
  if objective.kind == "span":
    num_spans = size * objective.mask_rate / objective.mean_span
    return 1 + int(2 * max(num_spans, documents) + documents)
  if objective.kind == "fim":
    rate = objective.fim_rate
    spread = (rate * (1 - rate) * documents) ** 0.5
    return 3 * int(np.ceil(rate * documents + spread))
  return 0


def make_row(
  objective: Objective,
  vocabulary: Vocabulary,
  seq_len: int,
  documents: Sequence[np.ndarray],
  following: int,
  generator: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Returns the arrays of a row, made from documents or pieces of documents.

  No token is ever dropped. If a row has so many documents that the added tokens find no
  room, the last documents stay as they are.

  Args:
    documents: int32 arrays, with at most `stride` tokens together.
    following: the next token of the last document; -1 if the document ends here.
  """
  if objective.kind == "masked":
    framed = frame_documents(documents, vocabulary.special, seq_len)
    row = join_segments(framed)
    row["tokens"], row["targets"] = mask_tokens(
      row["tokens"], row["segment_ids"], objective, vocabulary, generator
    )
    return row
  room = seq_len - sum(map(len, documents))
  segments = []
  for i, document in enumerate(documents):
    after = following if i == len(documents) - 1 else -1
    segment = _make_segment(objective, vocabulary, document, after, room, generator)
    room -= len(segment.tokens) - len(document)
    segments.append(segment)
  row = join_segments([segment.tokens for segment in segments])
  row["targets"] = np.concatenate([segment.targets for segment in segments])
  row["prefix"] = np.concatenate([segment.prefix for segment in segments])
  return row


def _make_segment(
  objective, vocabulary, document, following: int, room: int, generator
) -> spans.Segment:
  is_text = vocabulary.is_text[document]
  if objective.kind == "span":
    return spans.corrupt_spans(
      document,
      is_text,
      vocabulary.sentinels,
      objective.mask_rate,
      objective.mean_span,
      room,
      generator,
    )
  elif objective.kind == "prefix":
    return spans.split_prefix(document, following, generator)
  elif objective.kind != "fim":
    raise ValueError(f"no rows of documents for the objective {objective.kind}")
  chosen = generator.random() < objective.fim_rate
  suffix_first = bool(generator.random() < objective.spm_rate)
  if not chosen or room < 3 or is_text.sum() < 2:
    return spans.keep_whole(document, following)
  ids = vocabulary.special
  return spans.fill_in_middle(
    document,
    is_text,
    ids.fim_prefix,
    ids.fim_middle,
    ids.fim_suffix,
    suffix_first,
    generator,
  )


def join_segments(segments: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
  """Concatenates segments; segment_ids begin at 1, positions at 0 in each segment."""
  lengths = [len(segment) for segment in segments]
  begins = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
  return {
    "tokens": np.concatenate(segments).astype(np.int32),
    "segment_ids": np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32),
    "positions": (np.arange(sum(lengths)) - begins).astype(np.int32),
  }


def frame_documents(
  documents: Sequence[np.ndarray], special: SpecialIds, seq_len: int
) -> list[np.ndarray]:
  """Puts each document between [CLS] and [SEP], which replace bos and eos.

  A piece of a document gets them too, because fine-tuning reads [CLS]. If there is no
  room left, the last documents stay as they are.
  """
  room = seq_len - sum(map(len, documents))
  framed = []
  for document in documents:
    has_bos, has_eos = document[0] == special.bos, document[-1] == special.eos
    inner = document[int(has_bos) : len(document) - int(has_eos)]
    added = 2 - int(has_bos) - int(has_eos)
    if added <= room:
      room -= added
      document = np.concatenate([[special.cls], inner, [special.sep]])
    framed.append(document)
  return framed


def mask_tokens(
  tokens: np.ndarray,
  segment_ids: np.ndarray,
  objective: Objective,
  vocabulary: Vocabulary,
  generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Hides tokens of a row for masked language modelling (Devlin et al. 2018, 3.1).

  `mask_rate` of the units are chosen: tokens, whole words, or spans of whole words
  (Joshi et al. 2019). Of the chosen tokens, `mask_token_rate` become [MASK],
  `random_token_rate` become random tokens of text, and the rest stay. All tokens of a
  span meet the same fate, but each random token is drawn by itself.

  Args:
    tokens, segment_ids: int32 L; padding and special tokens are never chosen.

  Returns:
    (tokens, targets), int32 L; targets are the original tokens where chosen, else -1.
  """
  is_text = vocabulary.is_text[tokens] & (segment_ids > 0)
  begins = is_text
  if objective.mask_unit != "token" and vocabulary.continues_word is not None:
    begins = word_begins(tokens, segment_ids, is_text, vocabulary.continues_word)
  unit = np.cumsum(begins) - 1  # the unit of each token of text
  num_units = int(begins.sum())
  budget = spans.round_randomly(objective.mask_rate * num_units, generator)
  dice = generator.random(len(tokens))
  picked = np.zeros(num_units, bool)
  if objective.mask_unit == "span" and budget:
    mean_span = objective.mean_span
    num_spans = spans.count_spans(num_units, budget, mean_span, budget, generator)
    picked = spans.random_spans(num_units, budget, num_spans, generator)
    span = np.cumsum(picked & ~np.append(False, picked[:-1]))
    dice = dice[span][unit]  # one number per span
  elif budget:
    picked[generator.permutation(num_units)[:budget]] = True
  chosen = is_text.copy()
  chosen[is_text] = picked[unit[is_text]]
  hide_rate, random_rate = objective.mask_token_rate, objective.random_token_rate
  is_random = chosen & (dice >= hide_rate) & (dice < hide_rate + random_rate)
  drawn = generator.integers(0, len(vocabulary.text_ids), int(is_random.sum()))
  shown = np.where(chosen & (dice < hide_rate), vocabulary.special.mask, tokens)
  shown[is_random] = vocabulary.text_ids[drawn]
  return shown.astype(np.int32), np.where(chosen, tokens, -1).astype(np.int32)


def word_begins(tokens, segment_ids, is_text, continues_word) -> np.ndarray:
  """Returns where words begin, bool L; special tokens and segments end a word."""
  continues = is_text & continues_word[tokens]
  same_segment = is_text[:-1] & (segment_ids[:-1] == segment_ids[1:])
  return is_text & ~(continues & np.append(False, same_segment))


def make_pair_row(
  objective: Objective,
  vocabulary: Vocabulary,
  text: np.ndarray,
  elsewhere: Callable[[], np.ndarray | None],
  generator: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Returns a masked row [CLS] A [SEP] B [SEP] that also asks whether B follows A.

  `text` is cut at random into A and B. In half of the rows, B is then replaced by text
  of another document (nsp: next sentence prediction, Devlin et al. 2018), or A and B
  are swapped (sop: sentence order prediction, Lan et al. 2019).

  Args:
    text: int32, the text of one document, at most seq_len - 3 tokens.
    elsewhere: returns text of another document, or None if it found none.

  Returns:
    the arrays of `make_row`; token_types: 0 up to the first [SEP], then 1; pair_labels:
    0 if B follows A, 1 if not, -1 if `text` is too short to cut.
  """
  size = int(generator.integers(1, max(len(text), 2)))
  a, b, label = text[:size], text[size:], 0
  if len(text) < 2:
    label = -1
  elif generator.random() < 0.5:
    if objective.pairs == "sop":
      a, b, label = b, a, 1
    elif objective.pairs != "nsp":
      raise ValueError(f"no sentence pairs of the kind {objective.pairs}")
    elif (other := elsewhere()) is not None:
      # From a random place: a B that follows A does not begin a document either.
      start = int(generator.integers(0, max(len(other) - len(b), 0) + 1))
      b, label = other[start : start + len(b)], 1
  ids = vocabulary.special
  row = join_segments([np.concatenate([[ids.cls], a, [ids.sep], b, [ids.sep]])])
  row["token_types"] = (row["positions"] >= len(a) + 2).astype(np.int32)
  row["pair_labels"] = np.array([label], np.int32)
  row["tokens"], row["targets"] = mask_tokens(
    row["tokens"], row["segment_ids"], objective, vocabulary, generator
  )
  return row
