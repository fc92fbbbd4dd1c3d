"""Makes batches from a token store: a function of (seed, rows before) alone.

That holds for any number of hosts and any batch size. The position of a run in its data
is therefore one integer, and resuming is exact and instant. A row holds consecutive
tokens of the store: `seq_len` of them, or fewer to leave room for what the objective
adds. A permutation that needs no memory orders the rows of each epoch.

A batch holds int32 arrays BL: tokens; targets (the token to predict, or -1);
segment_ids (the documents of a row, numbered from 1; 0 is padding); positions (from 0
in each segment). Some objectives add prefix or token_types BL and pair_labels B1
(flaxlm/data/batches/masking.py).
"""

import dataclasses

import numpy as np

from flaxlm.data.batches import masking
from flaxlm.data.batches.masking import CAUSAL, Objective, Vocabulary
from flaxlm.data.batches.order import (
  EVALUATION_KEY,
  MASKING_KEY,
  MIXTURE_BLOCK,
  MIXTURE_KEY,
  derive_key,
  permute,
  row_generators,
  shares,
)
from flaxlm.data.store.shards import TokenStream
from flaxlm.errors import DataError

TRIES = 8  # rows that are tried to find text of another document


@dataclasses.dataclass
class Batches:
  """`batches[t]` is batch t: its rows [first_row, first_row + num_rows), for one host.

  Batches before t had t * batch_size rows. Where they had another size, first_row is
  larger or smaller by the difference (`Feed.read_train`).

  With `in_order`, for evaluation, the batches hold each row of the sources once, one
  source after another, and the last batch ends with padding. The masks of a row are
  then independent of seed, step and batch size.

  Every token is in one row of each epoch. Sentence pairs are the exception: a row takes
  one of its documents, longer ones more often, so all are seen over many epochs.
  `vocabulary` is what `masking.make_vocabulary` returns; None for causal.
  """

  streams: dict[str, TokenStream]
  weights: list[float]
  seq_len: int
  batch_size: int
  seed: int
  vocab_size: int
  pad_id: int
  in_order: bool = False
  first_row: int = 0
  num_rows: int = 0
  objective: Objective = CAUSAL
  vocabulary: Vocabulary | None = None

  def __post_init__(self):
    assert self.vocabulary is not None or self.objective.kind == "causal"
    self.num_rows = self.num_rows or self.batch_size
    self._streams = list(self.streams.values())
    for name, stream in self.streams.items():
      if stream.num_tokens < 2:
        raise DataError(
          f"source '{name}' has too few tokens to make a row",
          stream.num_tokens,
          "2 or more in this split",
          "more text, or a larger config.data.validation_fraction",
        )
      if self.objective.pairs == "nsp" and stream.num_documents < 2:
        raise DataError(
          f"source '{name}' has no second document to draw sentences from",
          f"config.objective.pairs=nsp, {stream.num_documents} document",
          "2 or more in this split",
          "--config.objective.pairs=sop",
        )
    self.strides = [
      masking.stride(
        self.objective,
        self.vocabulary,
        self.seq_len,
        stream.num_tokens / max(stream.num_documents, 1),
      )
      for stream in self._streams
    ]
    # Where the next token is predicted, the last token of a stream is only a target.
    last = 1 if self.objective.kind in ("causal", "prefix") else 0
    self.rows_per_source = [
      -(-(stream.num_tokens - last) // stride)
      for stream, stride in zip(self._streams, self.strides, strict=True)
    ]
    self._shares = shares(self.weights)
    numbers = (EVALUATION_KEY,) if self.in_order else (self.seed, MASKING_KEY)
    self._masking_key = derive_key(*numbers)

  def __len__(self) -> int:
    """Returns how many batches hold every row once."""
    return -(-sum(self.rows_per_source) // self.batch_size)

  def _numbers(self, step: int) -> np.ndarray:
    """Returns the numbers of this host's rows of batch `step`, counted from step 0."""
    first = step * self.batch_size + self.first_row
    return np.arange(first, first + self.num_rows)

  def rows(self, step: int) -> list[tuple[int, int]]:
    """Returns (source, its row) for each row of this host in batch `step`.

    Source -1 is padding.
    """
    number = self._numbers(step)
    if self.in_order:
      ends = np.cumsum(self.rows_per_source)
      source = np.searchsorted(ends, number, side="right")
      row = number - np.concatenate([[0], ends])[source]
      source[number >= ends[-1]] = -1
      return list(zip(source.tolist(), row.tolist(), strict=True))
    source, count = self._choose_sources(number)
    row = np.empty_like(count)
    for s, size in enumerate(self.rows_per_source):
      for epoch in np.unique(count[source == s] // size):
        here = (source == s) & (count // size == epoch)
        row[here] = permute(count[here] % size, size, derive_key(self.seed, s, epoch))
    return list(zip(source.tolist(), row.tolist(), strict=True))

  def _choose_sources(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of each row, and how many rows of that source came before."""
    if len(self._streams) == 1:
      return np.zeros_like(number), number
    source, count = np.empty_like(number), np.empty_like(number)
    for block in np.unique(number // MIXTURE_BLOCK):
      here = number // MIXTURE_BLOCK == block
      place = number[here] % MIXTURE_BLOCK
      key = derive_key(self.seed, MIXTURE_KEY, int(block))
      slots = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, key)
      chosen = np.searchsorted(np.cumsum(self._shares), slots, side="right")
      source[here] = chosen[place]
      for s, share in enumerate(self._shares):
        before = np.cumsum(chosen == s) - 1 + int(block) * share
        count[here] = np.where(chosen[place] == s, before[place], count[here])
    return source, count

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    if self.objective.kind == "causal":
      return self._causal(step)
    rows = []
    generators = row_generators(self._numbers(step), self._masking_key)
    for (source, row), generator in zip(self.rows(step), generators, strict=True):
      if source < 0:
        rows.append({})
      elif self.objective.pairs != "none":
        rows.append(self._pair(source, row, generator))
      else:
        documents, following = self._documents(source, row)
        rows.append(
          masking.make_row(
            self.objective,
            self.vocabulary,
            self.seq_len,
            documents,
            following,
            generator,
          )
        )
    return masking.stack(rows, self.objective, self.seq_len, self.pad_id)

  def _documents(self, source: int, row: int) -> tuple[list[np.ndarray], int]:
    """Returns the documents of a row (int32), and the token after them.

    A document at the edge of a row may be a piece of one. The token after them is -1
    unless it continues the last document.
    """
    stream, size = self._streams[source], self.strides[source]
    start = row * size
    stop = min(start + size + 1, stream.num_tokens)
    ids = stream.read(start, stop).astype(np.int32)
    self._check_ids(ids, source, start)
    starts = stream.document_starts(start, stop) - start
    goes_on = len(ids) > size and size not in starts
    inside = starts[(starts > 0) & (starts < size)]
    return np.split(ids[:size], inside), int(ids[size]) if goes_on else -1

  def _pair(self, source: int, row: int, generator) -> dict[str, np.ndarray]:
    text, start = self._draw_text(source, row, generator)

    def elsewhere():
      for _ in range(TRIES):
        other_row = int(generator.integers(self.rows_per_source[source]))
        other, other_start = self._draw_text(source, other_row, generator)
        if len(other) and self._are_apart(source, start, other_start):
          return other
      return None

    return masking.make_pair_row(
      self.objective, self.vocabulary, text, elsewhere, generator
    )

  def _draw_text(self, source: int, row: int, generator) -> tuple[np.ndarray, int]:
    """Returns the text of one document of a row, and its position in the stream."""
    documents, _ = self._documents(source, row)
    ends = np.cumsum([len(document) for document in documents])
    number = np.searchsorted(ends, generator.integers(ends[-1]), side="right")
    document = documents[number]
    text = document[self.vocabulary.is_text[document]]
    start = row * self.strides[source] + int(ends[number]) - len(document)
    return text, start

  def _are_apart(self, source: int, a: int, b: int) -> bool:
    """Returns whether positions `a` and `b` of a source are in different documents."""
    a, b = min(a, b), max(a, b)
    reach = self.seq_len  # the first start is near, or else it takes few doublings
    while a < b:
      stop = min(a + reach, b)
      if len(self._streams[source].document_starts(a + 1, stop + 1)):
        return True
      a, reach = stop, 2 * reach
    return False

  def _causal(self, step: int) -> dict[str, np.ndarray]:
    shape = (self.num_rows, self.seq_len)
    tokens = np.full(shape, max(self.pad_id, 0), np.int32)
    targets = np.full(shape, -1, np.int32)
    begins = np.zeros(shape, bool)
    lengths = np.zeros((self.num_rows, 1), np.int64)
    for i, (source, row) in enumerate(self.rows(step)):
      if source < 0:
        continue
      stream, start = self._streams[source], row * self.seq_len
      stop = min(start + self.seq_len + 1, stream.num_tokens)
      ids = stream.read(start, stop)
      self._check_ids(ids, source, start)
      length = min(self.seq_len, len(ids))
      tokens[i, :length], targets[i, : len(ids) - 1] = ids[:length], ids[1:]
      starts = stream.document_starts(start, stop) - start
      begins[i, starts[starts < self.seq_len]] = True
      # The end of one document does not predict the beginning of the next.
      targets[i, starts[starts > 0] - 1] = -1
      lengths[i] = length
    column = np.arange(self.seq_len)[None, :]
    begins[:, 0] = True
    segment_ids = np.cumsum(begins, axis=1)
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    padding = column >= lengths
    segment_ids[padding] = positions[padding] = 0
    return {
      "tokens": tokens,
      "targets": targets,
      "segment_ids": segment_ids.astype(np.int32),
      "positions": positions.astype(np.int32),
    }

  def _check_ids(self, ids: np.ndarray, source: int, start: int) -> None:
    if ids.max(initial=0) >= self.vocab_size:
      raise DataError(
        f"token id {ids.max()} is outside the model's vocabulary",
        f"source '{list(self.streams)[source]}', tokens from {start}",
        f"ids below config.model.vocab_size={self.vocab_size}",
        "the vocabulary size of the tokenizer that prepared the store",
      )
