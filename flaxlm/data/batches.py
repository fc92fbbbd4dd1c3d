"""Token store → batches. Batch t is a function of (seed, t) alone, however many hosts.

The position of a run in its data is therefore one integer, and resuming is exact and
instant. A row is `seq_len` consecutive tokens of the store; a permutation that needs no
memory orders the rows of each epoch. tf.data or threads only read ahead, in order.

A batch holds int32 arrays BL: tokens; targets (the next token, -1 where none is
predicted); segment_ids (documents of a row count from 1, 0 is padding); positions
(from 0 in each segment).
"""

import collections
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flaxlm.data.store import TokenStream
from flaxlm.errors import ConfigError, DataError

MIXTURE_BLOCK = 1024  # rows in which every source has exactly its share
_PHI = 0x9E3779B97F4A7C15


def mix(value: np.ndarray, key: int) -> np.ndarray:
  """Scrambles uint64s (the finaliser of SplitMix64, Steele et al. 2014)."""
  z = value.astype(np.uint64) + np.uint64(key % 2**64)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def derive_key(*parts: int) -> int:
  """One 64-bit key from several integers, such as (seed, source, epoch)."""
  key = np.zeros(1, np.uint64)
  for part in parts:
    key = mix(key * np.uint64(_PHI) + np.uint64(part), _PHI)
  return int(key[0])


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
  """Maps each index in [0, size) to its place in a permutation chosen by `key`.

  A Feistel network (Luby and Rackoff 1988) permutes the smallest power of 4 that holds
  `size`; an index that leaves [0, size) is permuted again until it comes back.
  """
  half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
  mask = np.uint64((1 << int(half)) - 1)
  value = index.astype(np.uint64)
  todo = np.ones(value.shape, bool)
  while todo.any():
    left, right = value[todo] >> half, value[todo] & mask
    for round_number in range(6):
      left, right = right, left ^ (mix(right, key + round_number * _PHI) & mask)
    value[todo] = (left << half) | right
    todo[todo] = value[todo] >= size
  return value.astype(np.int64)


def shares(weights: list[float]) -> np.ndarray:
  """How many of MIXTURE_BLOCK rows each weight gets: exact in sum, one at least."""
  exact = np.array(weights) / sum(weights) * MIXTURE_BLOCK
  counts = np.maximum(np.floor(exact).astype(np.int64), 1)
  while counts.sum() < MIXTURE_BLOCK:
    counts[np.argmax(exact - counts)] += 1
  while counts.sum() > MIXTURE_BLOCK:
    counts[np.argmax(counts - exact)] -= 1
  return counts


@dataclasses.dataclass
class Batches:
  """`batches[t]` is batch t of training; `first_row` and `num_rows` cut out one host's.

  With `in_order`, batch t holds rows t*B.. of the sources one after another, each once,
  and the last batch is filled with padding: that is how models are evaluated.
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

  def __post_init__(self):
    self.num_rows = self.num_rows or self.batch_size
    self._streams = list(self.streams.values())
    for name, stream in self.streams.items():
      if stream.num_tokens < 2:
        raise DataError(
          f"source '{name}' has too few tokens to make a row\n"
          f"  given:  {stream.num_tokens}\n  needed: 2 or more in this split\n"
          "  try:    more text, or a larger config.data.validation_fraction"
        )
    # The last token of a stream is only ever a target.
    self.rows_per_source = [
      -(-(s.num_tokens - 1) // self.seq_len) for s in self._streams
    ]
    self._shares = shares(self.weights)

  def __len__(self) -> int:
    """Batches that hold every row once."""
    return -(-sum(self.rows_per_source) // self.batch_size)

  def rows(self, step: int) -> list[tuple[int, int]]:
    """The (source, row of it) that this host reads for batch `step`; -1 is padding."""
    first = step * self.batch_size + self.first_row
    number = np.arange(first, first + self.num_rows)
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
    """Which source each row comes from, and how many of its rows came before."""
    if len(self._streams) == 1:
      return np.zeros_like(number), number
    source, count = np.empty_like(number), np.empty_like(number)
    for block in np.unique(number // MIXTURE_BLOCK):
      here = number // MIXTURE_BLOCK == block
      place = number[here] % MIXTURE_BLOCK
      key = derive_key(self.seed, 2**32, int(block))
      slots = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, key)
      chosen = np.searchsorted(np.cumsum(self._shares), slots, side="right")
      source[here] = chosen[place]
      for s, share in enumerate(self._shares):
        before = np.cumsum(chosen == s) - 1 + int(block) * share
        count[here] = np.where(chosen[place] == s, before[place], count[here])
    return source, count

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
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
        f"token id {ids.max()} is outside the model's vocabulary\n"
        f"  given:  source '{list(self.streams)[source]}', tokens from {start}\n"
        f"  needed: ids below config.model.vocab_size={self.vocab_size}\n"
        "  try:    the vocabulary size of the tokenizer that prepared the store"
      )


@dataclasses.dataclass
class SyntheticBatches:
  """Random tokens, a function of (seed, step): for benchmarks, with no store at all."""

  seq_len: int
  batch_size: int
  seed: int
  vocab_size: int
  first_row: int = 0
  num_rows: int = 0

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    shape = (self.batch_size, self.seq_len + 1)
    generator = np.random.Generator(np.random.Philox(derive_key(self.seed, step)))
    ids = generator.integers(0, self.vocab_size, shape, np.int32)
    ids = ids[self.first_row : self.first_row + (self.num_rows or self.batch_size)]
    row = np.arange(self.seq_len, dtype=np.int32)[None, :]
    return {
      "tokens": ids[:, :-1],
      "targets": ids[:, 1:],
      "segment_ids": np.ones_like(ids[:, 1:]),
      "positions": np.broadcast_to(row, ids[:, 1:].shape),
    }


def read_ahead(
  batches, steps: range, loader: str, num_threads: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches[t] for t in `steps`, several prepared at once, in order.

  loader "tfdata" uses tf.data; "numpy" uses threads and needs no TensorFlow. Both yield
  the same bits.
  """
  if loader == "tfdata":
    return _read_with_tfdata(batches, steps, num_threads, prefetch)
  return _read_with_threads(batches, steps, num_threads, prefetch)


def _read_with_threads(batches, steps, num_threads, prefetch):
  with ThreadPoolExecutor(num_threads, "batches") as pool:
    ready = collections.deque()
    try:
      for step in steps:
        ready.append(pool.submit(batches.__getitem__, step))
        if len(ready) > prefetch:
          yield ready.popleft().result()
      while ready:
        yield ready.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _read_with_tfdata(batches, steps, num_threads, prefetch):
  from flaxlm.data import import_tensorflow

  try:
    tf = import_tensorflow()
  except ImportError as error:
    raise ConfigError(
      "config.data.loader",
      f"tfdata, but {error}",
      "tensorflow-cpu installed, or a loader without it",
      "numpy (the same batches)",
    ) from error
  names = ("tokens", "targets", "segment_ids", "positions")
  errors = []

  def read(step):
    try:
      batch = batches[int(step)]
    except Exception as error:  # tf.data would print it and turn it into text
      errors.append(error)
      return [np.empty((0, 0), np.int32)] * len(names)
    return [batch[name] for name in names]

  def load(step):
    arrays = tf.numpy_function(read, [step], [tf.int32] * 4, stateful=False)
    return dict(zip(names, arrays, strict=True))

  dataset = tf.data.Dataset.range(steps.start, steps.stop)
  dataset = dataset.map(load, num_parallel_calls=num_threads, deterministic=True)
  options = tf.data.Options()
  options.autotune.enabled = False
  options.threading.private_threadpool_size = num_threads
  dataset = dataset.prefetch(prefetch).with_options(options)
  for batch in dataset.as_numpy_iterator():
    if not batch["tokens"].size:
      raise errors[0]
    yield batch
