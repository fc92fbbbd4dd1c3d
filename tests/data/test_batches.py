"""Batches: every token once an epoch, documents apart, however many the hosts."""

import numpy as np
import pytest

from flaxlm.data.batches import (
  MIXTURE_BLOCK,
  Batches,
  SyntheticBatches,
  permute,
  read_ahead,
  shares,
)
from flaxlm.errors import DataError

BOS, EOS = 1, 2


class Stream:
  """What a TokenStream offers, over arrays in memory; ids tell where they come from."""

  def __init__(self, lengths, seed=0):
    rng = np.random.default_rng(seed)
    documents = [
      np.concatenate([[BOS], rng.integers(3, 100, n), [EOS]]) for n in lengths
    ]
    self.ids = np.concatenate(documents).astype(np.uint16)
    self.starts = np.cumsum([0] + [len(d) for d in documents])[:-1]
    self.num_tokens, self.num_documents = len(self.ids), len(documents)

  def read(self, start, stop):
    return self.ids[start:stop]

  def document_starts(self, start, stop):
    first, last = np.searchsorted(self.starts, [start, stop])
    return self.starts[first:last]


def make(streams=None, weights=None, **changes):
  streams = streams or {"a": Stream(np.random.default_rng(1).integers(0, 40, 300))}
  settings = {"seq_len": 16, "batch_size": 8, "seed": 5, "vocab_size": 100, "pad_id": 0}
  return Batches(streams, weights or [1.0] * len(streams), **settings | changes)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 65537])
def test_permute_is_a_permutation_that_depends_on_its_key(size):
  index = np.arange(size)
  order = permute(index, size, 7)
  np.testing.assert_array_equal(np.sort(order), index)
  np.testing.assert_array_equal(permute(index[::-1], size, 7), order[::-1])
  if size > 3:
    assert not np.array_equal(order, permute(index, size, 8))
  if size >= 1000:  # neighbours are torn apart, and nobody stays at home
    assert np.corrcoef(index, order)[0, 1] == pytest.approx(0, abs=0.1)
    assert np.mean(index == order) < 0.01


def test_every_token_is_read_once_an_epoch():
  batches = make()
  stream = batches.streams["a"]
  num_rows = batches.rows_per_source[0]
  for epoch in range(3):
    seen = np.zeros(stream.num_tokens, int)
    orders = []
    for i in range(epoch * num_rows, (epoch + 1) * num_rows):
      (_, row) = batches.rows(i // 8)[i % 8]
      length = batches[i // 8]["segment_ids"][i % 8].astype(bool).sum()
      seen[row * 16 : row * 16 + length] += 1
      orders.append(row)
    # The last token of all is only ever a target.
    assert (seen[:-1] == 1).all()
    assert orders != sorted(orders)


def test_a_batch_does_not_depend_on_what_was_read_before():
  one, other = make(), make()
  for step in (0, 3, 1_000_000):
    expected = one[step]
    other[step + 1], other[step // 2]
    for name, array in other[step].items():
      np.testing.assert_array_equal(array, expected[name])
  assert not np.array_equal(one[0]["tokens"], one[1]["tokens"])
  assert not np.array_equal(one[0]["tokens"], make(seed=6)[0]["tokens"])


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_divide_the_same_batch(hosts):
  whole, size = make(), 8 // hosts
  for step in (0, 11):
    parts = [make(first_row=h * size, num_rows=size)[step] for h in range(hosts)]
    for name, array in whole[step].items():
      np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


def test_rows_keep_documents_apart():
  stream = Stream([3, 0, 20, 4])
  batches = make({"a": stream}, in_order=True, seq_len=8)
  batch = batches[0]
  tokens = batch["tokens"].reshape(-1)
  used = batch["segment_ids"].reshape(-1) > 0
  # In order, the rows are the stream itself; what follows is padding.
  np.testing.assert_array_equal(tokens[used], stream.ids[: used.sum()])
  assert (
    used.sum() >= stream.num_tokens - 1
    and not batch["positions"].reshape(-1)[~used].any()
  )
  for row in range(8):
    for i in range(8):
      where, target = row * 8 + i, batch["targets"][row, i]
      segment, position = batch["segment_ids"][row, i], batch["positions"][row, i]
      if not segment:
        assert target == -1
        continue
      begins = where in stream.starts
      before = i > 0 and batch["segment_ids"][row, i - 1]
      assert position == (0 if begins or i == 0 else batch["positions"][row, i - 1] + 1)
      assert segment == (1 if i == 0 else before + begins)
      crosses = where + 1 in stream.starts or where + 1 >= stream.num_tokens
      assert target == (-1 if crosses else stream.ids[where + 1])
  predicted = (batch["targets"] >= 0).sum() + sum(
    (batches[i]["targets"] >= 0).sum() for i in range(1, len(batches))
  )
  assert predicted == stream.num_tokens - stream.num_documents


def test_evaluation_reads_each_row_once_and_pads_the_last_batch():
  streams = {"a": Stream([30] * 7), "b": Stream([9] * 5, seed=2)}
  batches = make(streams, in_order=True)
  rows = [row for step in range(len(batches)) for row in batches.rows(step)]
  real = [row for row in rows if row[0] >= 0]
  expected = [(s, r) for s, n in enumerate(batches.rows_per_source) for r in range(n)]
  assert real == expected == rows[: len(real)]
  assert [source for source, _ in rows[len(real) :]] == [-1] * (-len(real) % 8)


def test_mixtures_keep_their_shares_and_use_every_row():
  streams = {"big": Stream([50] * 400), "small": Stream([50] * 30, seed=3)}
  batches = make(streams, [3.0, 1.0])
  steps = 4 * MIXTURE_BLOCK // 8
  rows = [row for step in range(steps) for row in batches.rows(step)]
  sources = np.array([source for source, _ in rows])
  for block in sources.reshape(-1, MIXTURE_BLOCK):
    assert (block == 0).sum() == 768 and (block == 1).sum() == 256
  assert np.abs(np.diff(sources)).sum() > 0  # interleaved, not one after the other
  for source, size in enumerate(batches.rows_per_source):
    used = np.array([row for s, row in rows if s == source])
    counts = np.bincount(used, minlength=size)
    assert counts.max() - counts.min() <= 2 and counts.sum() == len(used)


def test_shares_are_exact():
  assert shares([1, 1, 1]).sum() == MIXTURE_BLOCK
  assert shares([1e-9, 1.0]).tolist() == [1, MIXTURE_BLOCK - 1]
  assert shares([5.0]).tolist() == [MIXTURE_BLOCK]


@pytest.mark.parametrize("steps", [range(0, 12), range(995, 1003)])
def test_tfdata_and_threads_yield_the_same_bits(steps):
  batches = make()
  with_tf = list(read_ahead(batches, steps, "tfdata", 2, 3))
  with_threads = list(read_ahead(batches, steps, "numpy", 2, 3))
  assert len(with_tf) == len(with_threads) == len(steps)
  for step, a, b in zip(steps, with_tf, with_threads, strict=True):
    for name, array in batches[step].items():
      np.testing.assert_array_equal(a[name], array)
      np.testing.assert_array_equal(b[name], array)
      assert a[name].dtype == b[name].dtype == np.int32


@pytest.mark.parametrize("loader", ["tfdata", "numpy"])
def test_ids_outside_the_vocabulary_are_caught_in_the_first_batch(loader):
  batches = make(vocab_size=99)
  with pytest.raises(DataError, match=r"token id 99 is outside.*\n.*source 'a'"):
    for _ in read_ahead(batches, range(20), loader, 2, 2):
      pass


def test_a_stream_without_a_row_is_refused():
  empty = Stream([3])
  empty.num_tokens = 1
  with pytest.raises(DataError, match="source 'a' has too few tokens"):
    make({"a": empty})


def test_synthetic_batches_are_a_function_of_seed_and_step():
  batches = SyntheticBatches(16, 8, 3, 50)
  part = SyntheticBatches(16, 8, 3, 50, first_row=4, num_rows=4)
  for name, array in batches[7].items():
    np.testing.assert_array_equal(array[4:], part[7][name])
    np.testing.assert_array_equal(array, batches[7][name])
  assert not np.array_equal(batches[7]["tokens"], batches[8]["tokens"])
  assert batches[7]["tokens"].min() >= 0 and batches[7]["tokens"].max() == 49


def test_tensorflow_sees_no_accelerator():
  from flaxlm.data import import_tensorflow

  tf = import_tensorflow()
  assert tf.config.get_visible_devices("GPU") == []
  # The list was fixed before the first operation: asking for a GPU now is refused.
  assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}
