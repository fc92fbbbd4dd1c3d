"""The loss of a model that knows only token frequencies, to compare every loss with."""

import dataclasses
import math

import numpy as np

from flaxlm.data.batches.packed import Batches
from flaxlm.data.store.shards import TokenStream

TOKENS_AT_ONCE = 1 << 20  # tokens read at once
SAMPLE = 20_000_000  # training tokens to count, at most
TARGETS = 2_000_000  # targets to count, at most, where batches must be made to see them


def predicted_tokens(streams: dict[str, TokenStream]) -> int:
  """Returns how many tokens are predicted: all but the first of each document."""
  return sum(s.num_tokens - s.num_documents for s in streams.values())


def bytes_per_token(batches: Batches) -> float | None:
  """Returns the bytes of text per predicted token of a split.

  None unless the objective predicts each token once: otherwise the sum of the losses
  does not encode the text, and bits per byte have no meaning.
  """
  if batches.objective.kind != "causal":
    return None
  num_bytes = sum(stream.num_bytes for stream in batches.streams.values())
  return num_bytes / max(predicted_tokens(batches.streams), 1)


def count_tokens(batches: Batches, limit: int) -> np.ndarray:
  """Returns how often each id is a target, in up to `limit` tokens of each stream."""
  counts = np.zeros(batches.vocab_size, np.int64)
  for stream in batches.streams.values():
    for start in range(0, min(stream.num_tokens, limit), TOKENS_AT_ONCE):
      stop = min(start + TOKENS_AT_ONCE, stream.num_tokens)
      ids = stream.read(start, stop)
      counts += np.bincount(ids, minlength=batches.vocab_size)
      first = ids[stream.document_starts(start, stop) - start]
      counts -= np.bincount(first, minlength=batches.vocab_size)
  return counts


def count_targets(batches: Batches, steps: range, limit: int = 2**62) -> np.ndarray:
  """Returns how often each id is a target in batches of all hosts, up to `limit`."""
  whole = dataclasses.replace(batches, first_row=0, num_rows=0)
  counts = np.zeros(batches.vocab_size, np.int64)
  for step in steps:
    targets = whole[step]["targets"]
    counts += np.bincount(targets[targets >= 0], minlength=batches.vocab_size)
    if counts.sum() >= limit:
      break
  return counts


def unigram_nats(train: Batches, validation: Batches, num_batches: int = 0) -> float:
  """Returns the cross entropy, in nats per target, of a model of token frequencies.

  The frequencies are those of the training targets, plus one. The model predicts the
  targets of the validation batches, so it compares with the loss of any objective.
  Every host counts all rows.

  Args:
    num_batches: the batches of `validation` that are evaluated; 0 = all.
  """
  if train.objective.kind == "causal":
    counts = count_tokens(train, SAMPLE) + 1
  else:
    counts = count_targets(train, range(len(train)), TARGETS) + 1
  held_out = count_targets(validation, range(num_batches or len(validation)))
  nats = -float(np.sum(held_out * np.log(counts / counts.sum())))
  return nats / max(int(held_out.sum()), 1)


def unigram_bits_per_byte(train: Batches, validation: Batches) -> float:
  """Returns the same in bits per byte of text, for the causal objective."""
  return unigram_nats(train, validation) / math.log(2) / bytes_per_token(validation)
