"""What knowing only word frequencies reaches: the yardstick beside every loss."""

import math

import numpy as np

from flaxlm.data.batches import Batches
from flaxlm.data.store import TokenStream

CHUNK = 1 << 20  # tokens read at once
SAMPLE = 20_000_000  # training tokens that the frequencies are counted on, at most


def predicted_tokens(streams: dict[str, TokenStream]) -> int:
  """Every token but the first of each document."""
  return sum(s.num_tokens - s.num_documents for s in streams.values())


def bytes_per_token(batches: Batches) -> float:
  """Bytes of text per predicted token of a split."""
  num_bytes = sum(stream.num_bytes for stream in batches.streams.values())
  return num_bytes / max(predicted_tokens(batches.streams), 1)


def count_tokens(batches: Batches, limit: int) -> np.ndarray:
  """How often each id is a target, in up to `limit` tokens of each stream."""
  counts = np.zeros(batches.vocab_size, np.int64)
  for stream in batches.streams.values():
    for start in range(0, min(stream.num_tokens, limit), CHUNK):
      stop = min(start + CHUNK, stream.num_tokens)
      ids = stream.read(start, stop)
      counts += np.bincount(ids, minlength=batches.vocab_size)
      first = ids[stream.document_starts(start, stop) - start]
      counts -= np.bincount(first, minlength=batches.vocab_size)
  return counts


def unigram_bits_per_byte(train: Batches, validation: Batches) -> float:
  """Cross entropy of the validation tokens under add-one training frequencies."""
  counts = count_tokens(train, SAMPLE) + 1
  held_out = count_tokens(validation, 2**62)
  nats = -float(np.sum(held_out * np.log(counts / counts.sum())))
  tokens = max(int(held_out.sum()), 1)
  return nats / tokens / math.log(2) / bytes_per_token(validation)
