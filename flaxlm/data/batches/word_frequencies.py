"""What knowing only word frequencies reaches: the yardstick beside every loss."""

import dataclasses
import math

import numpy as np

from flaxlm.data.batches.packed import Batches
from flaxlm.data.store.shards import TokenStream

TOKENS_AT_ONCE = 1 << 20  # tokens read at once
SAMPLE = 20_000_000  # training tokens that the frequencies are counted on, at most
TARGETS = 2_000_000  # the same, where batches must be made to see what is predicted


def predicted_tokens(streams: dict[str, TokenStream]) -> int:
  """Every token but the first of each document."""
  return sum(s.num_tokens - s.num_documents for s in streams.values())


def bytes_per_token(batches: Batches) -> float | None:
  """Bytes of text per predicted token of a split.

  None where the objective does not predict each token once: a sum of such losses does
  not encode the text, so bits per byte have no meaning.
  """
  if batches.objective.kind != "causal":
    return None
  num_bytes = sum(stream.num_bytes for stream in batches.streams.values())
  return num_bytes / max(predicted_tokens(batches.streams), 1)


def count_tokens(batches: Batches, limit: int) -> np.ndarray:
  """How often each id is a target, in up to `limit` tokens of each stream."""
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
  """How often batches ask for each id, over all hosts; stops after `limit` of them."""
  whole = dataclasses.replace(batches, first_row=0, num_rows=0)
  counts = np.zeros(batches.vocab_size, np.int64)
  for step in steps:
    targets = whole[step]["targets"]
    counts += np.bincount(targets[targets >= 0], minlength=batches.vocab_size)
    if counts.sum() >= limit:
      break
  return counts


def unigram_nats(train: Batches, validation: Batches, num_batches: int = 0) -> float:
  """Cross entropy, in nats per prediction, of add-one frequencies of training targets.

  What it predicts are the targets of the validation batches themselves, so it stands
  beside the loss of any objective. Every host counts all of the rows.

  Args:
    num_batches: of `validation`, as many as are evaluated; 0 = all.
  """
  if train.objective.kind == "causal":
    counts = count_tokens(train, SAMPLE) + 1
  else:
    counts = count_targets(train, range(len(train)), TARGETS) + 1
  held_out = count_targets(validation, range(num_batches or len(validation)))
  nats = -float(np.sum(held_out * np.log(counts / counts.sum())))
  return nats / max(int(held_out.sum()), 1)


def unigram_bits_per_byte(train: Batches, validation: Batches) -> float:
  """The same in bits per byte of text, for the causal objective."""
  return unigram_nats(train, validation) / math.log(2) / bytes_per_token(validation)
