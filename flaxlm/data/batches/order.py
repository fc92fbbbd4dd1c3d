"""The order of rows, and all randomness in them, as functions of seed and position."""

import numpy as np

MIXTURE_BLOCK = 1024  # rows in which every source has exactly its share
_PHI = 0x9E3779B97F4A7C15
# Arguments of `derive_key`, larger than the number of any source.
MIXTURE_KEY, MASKING_KEY, EVALUATION_KEY = 2**32, 2**32 + 1, 2**32 + 2


def _scramble(value: np.ndarray, key: int) -> np.ndarray:
  """Scrambles uint64s (the finaliser of SplitMix64, Steele et al. 2014)."""
  z = value.astype(np.uint64) + np.uint64(key % 2**64)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def derive_key(*parts: int) -> int:
  """Returns a 64-bit key of several integers, such as (seed, source, epoch)."""
  key = np.zeros(1, np.uint64)
  for part in parts:
    key = _scramble(key * np.uint64(_PHI) + np.uint64(part), _PHI)
  return int(key[0])


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
  """Maps each index in [0, size) to its place in a permutation chosen by `key`.

  A Feistel network (Luby and Rackoff 1988) permutes [0, the next power of 4). An index
  that leaves [0, size) is permuted again until it is back. No table is kept.
  """
  half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
  mask = np.uint64((1 << int(half)) - 1)
  value = index.astype(np.uint64)
  todo = np.ones(value.shape, bool)
  while todo.any():
    left, right = value[todo] >> half, value[todo] & mask
    for round_number in range(6):
      left, right = right, left ^ (_scramble(right, key + round_number * _PHI) & mask)
    value[todo] = (left << half) | right
    todo[todo] = value[todo] >= size
  return value.astype(np.int64)


def row_generators(numbers: np.ndarray, key: int) -> list[np.random.Generator]:
  """Returns a generator for each row, which its number and `key` alone determine."""
  keys = _scramble(numbers, key).tolist()
  return [np.random.Generator(np.random.Philox(key=k)) for k in keys]


def shares(weights: list[float]) -> np.ndarray:
  """Returns each weight's share of MIXTURE_BLOCK rows: at least 1, in sum exact."""
  exact = np.array(weights) / sum(weights) * MIXTURE_BLOCK
  counts = np.maximum(np.floor(exact).astype(np.int64), 1)
  while counts.sum() < MIXTURE_BLOCK:
    counts[np.argmax(exact - counts)] += 1
  while counts.sum() > MIXTURE_BLOCK:
    counts[np.argmax(counts - exact)] -= 1
  return counts
