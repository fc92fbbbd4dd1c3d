"""Makes batches of random tokens, for tests, plans and benchmarks."""

import dataclasses

import numpy as np

from flaxlm.data.batches import masking
from flaxlm.data.batches.masking import CAUSAL, Objective, Vocabulary
from flaxlm.data.batches.order import MASKING_KEY, derive_key, row_generators


@dataclasses.dataclass
class SyntheticBatches:
  """Random tokens with the interface of `Batches`, also a function of (seed, step).

  Objectives other than causal need a `vocabulary` (`masking.synthetic_vocabulary`).
  """

  seq_len: int
  batch_size: int
  seed: int
  vocab_size: int
  first_row: int = 0
  num_rows: int = 0
  objective: Objective = CAUSAL
  vocabulary: Vocabulary | None = None

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    if self.objective.kind != "causal":
      return self._make(step)
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

  def _make(self, step: int) -> dict[str, np.ndarray]:
    """Returns the batch of an objective; a row is one document without bos and eos."""
    objective, vocabulary = self.objective, self.vocabulary
    size = masking.stride(objective, vocabulary, self.seq_len, self.seq_len)
    first = step * self.batch_size + self.first_row
    numbers = np.arange(first, first + (self.num_rows or self.batch_size))
    rows = []
    for generator in row_generators(numbers, derive_key(self.seed, MASKING_KEY)):

      def draw(generator=generator):
        ids = vocabulary.text_ids
        return ids[generator.integers(0, len(ids), size)]

      if objective.pairs != "none":
        row = masking.make_pair_row(objective, vocabulary, draw(), draw, generator)
      else:
        row = masking.make_row(
          objective, vocabulary, self.seq_len, [draw()], -1, generator
        )
      rows.append(row)
    return masking.stack(rows, objective, self.seq_len, 0)
