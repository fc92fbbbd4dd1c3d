"""Batches: every token once per epoch, separate documents, any number of hosts."""

import math
import sys
import threading

import numpy as np
import pytest

from flaxlm.data.batches import masking, token_frequencies
from flaxlm.data.batches.masking import Objective, SpecialIds
from flaxlm.data.batches.order import MIXTURE_BLOCK, derive_key, permute, shares
from flaxlm.data.batches.packed import Batches
from flaxlm.data.batches.read_ahead import one_ahead, read_ahead
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.errors import ConfigError, DataError

BOS, EOS, MASK, CLS, SEP, PRE, MID, SUF = range(1, 9)
OBJECTIVES = {
  "causal": Objective(),
  "token": Objective("masked"),
  "word": Objective("masked", mask_unit="word"),
  "masked spans": Objective("masked", mask_unit="span"),
  "nsp": Objective("masked", pairs="nsp"),
  "sop": Objective("masked", pairs="sop", mask_unit="word"),
  "span": Objective("span", num_sentinels=20),
  "prefix": Objective("prefix"),
  "fim": Objective("fim"),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


class Stream:
  """A TokenStream over arrays in memory."""

  def __init__(self, lengths, seed=0, low=3, high=100):
    rng = np.random.default_rng(seed)
    documents = [
      np.concatenate([[BOS], rng.integers(low, high, n), [EOS]]) for n in lengths
    ]
    self.ids = np.concatenate(documents).astype(np.uint16)
    self.starts = np.cumsum([0] + [len(d) for d in documents])[:-1]
    self.num_tokens, self.num_documents = len(self.ids), len(documents)
    self.num_bytes = 4 * self.num_tokens

  def read(self, start, stop):
    return self.ids[start:stop]

  def document_starts(self, start, stop):
    first, last = np.searchsorted(self.starts, [start, stop])
    return self.starts[first:last]


def make(streams=None, weights=None, **changes):
  streams = streams or {"a": Stream(np.random.default_rng(1).integers(0, 40, 300))}
  settings = {"seq_len": 16, "batch_size": 8, "seed": 5, "vocab_size": 100, "pad_id": 0}
  return Batches(streams, weights or [1.0] * len(streams), **settings | changes)


def make_objective(name, lengths=None, vocab_size=130, **changes):
  """Returns batches with rows of 32 tokens, where ids from 10 to 100 are text."""
  if lengths is None:
    lengths = np.random.default_rng(1).integers(0, 90, 150)
  objective = OBJECTIVES[name]
  vocabulary = masking.make_vocabulary(
    objective,
    vocab_size,
    vocab_size - 20,
    SpecialIds(BOS, EOS, MASK, CLS, SEP, PRE, MID, SUF),
    control_ids=(0, 9),
    continues_word=np.random.default_rng(2).random(vocab_size - 20) < 0.4,
  )
  streams = changes.pop("streams", {"a": Stream(lengths, low=10)})
  settings = {"seq_len": 32, "vocab_size": vocab_size} | changes
  return make(streams, objective=objective, vocabulary=vocabulary, **settings)


def numbered(lengths, first=10):
  """Returns a stream where each text token's id is its position, so it is unique."""
  stream = Stream(lengths)
  is_text = stream.ids >= 3
  stream.ids = np.where(is_text, np.arange(len(is_text)) + first, stream.ids)
  return stream


def rows_of(batches, number):
  """Yields (row of the source, its arrays) of the first `number` rows."""
  for i in range(number):
    step, place = divmod(i, 8)
    if not place:
      batch, rows = batches[step], batches.rows(step)
    yield rows[place][1], {key: array[place] for key, array in batch.items()}


def restored(batch):
  """Returns the tokens of a batch before some of them were replaced."""
  return np.where(batch["targets"] >= 0, batch["targets"], batch["tokens"])


def assert_equal(batch, expected):
  assert list(batch) == list(expected)
  for name, array in expected.items():
    assert batch[name].dtype == array.dtype == np.int32
    np.testing.assert_array_equal(batch[name], array, err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 65537])
def test_permute_is_a_permutation_that_depends_on_its_key(size):
  index = np.arange(size)
  order = permute(index, size, 7)
  np.testing.assert_array_equal(np.sort(order), index)
  np.testing.assert_array_equal(permute(index[::-1], size, 7), order[::-1])
  if size > 3:
    assert not np.array_equal(order, permute(index, size, 8))
  if size >= 1000:  # neighbours are separated, and few stay in place
    assert np.corrcoef(index, order)[0, 1] == pytest.approx(0, abs=0.1)
    assert np.mean(index == order) < 0.01


def test_the_order_of_rows_is_that_of_older_versions():
  """A run that goes on with a newer version must not read its rows in another order."""
  assert permute(np.arange(12), 12, 7).tolist() == [
    8,
    6,
    4,
    1,
    3,
    9,
    5,
    0,
    11,
    2,
    7,
    10,
  ]
  assert permute(np.array([0, 999]), 1000, 12345678901).tolist() == [963, 25]
  assert derive_key(3, 1, 2) == 13844653756248576476
  assert shares([1, 2, 4]).tolist() == [146, 293, 585]


@pytest.mark.faults
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
    # The very last token is only a target.
    assert (seen[:-1] == 1).all()
    assert orders != sorted(orders)


@pytest.mark.faults
@every_objective
def test_a_batch_does_not_depend_on_what_was_read_before(name):
  one, other = make_objective(name), make_objective(name)
  for step in (0, 3, 1_000_000):
    expected = one[step]
    other[step + 1], other[step // 2]
    assert_equal(other[step], expected)
  assert not np.array_equal(one[0]["tokens"], one[1]["tokens"])
  reseeded = make_objective(name, seed=6)
  assert not np.array_equal(one[0]["tokens"], reseeded[0]["tokens"])


@every_objective
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_divide_the_same_batch(name, hosts):
  whole, size = make_objective(name), 8 // hosts
  for step in (0, 11):
    parts = [
      make_objective(name, first_row=h * size, num_rows=size)[step]
      for h in range(hosts)
    ]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    assert_equal(joined, whole[step])


@every_objective
def test_every_objective_keeps_every_token_once_an_epoch(name):
  batches = make_objective(name)
  stream = batches.streams["a"]
  (num_rows,), (stride,) = batches.rows_per_source, batches.strides
  assert stride <= 32
  seen = np.zeros(stream.num_tokens, int)
  for row, batch in rows_of(batches, num_rows):
    seen[row * stride : (row + 1) * stride] += 1
    source = stream.ids[row * stride : (row + 1) * stride]
    in_place = OBJECTIVES[name].kind == "masked"
    tokens = restored(batch) if in_place else batch["tokens"]
    text = tokens[(tokens >= 10) & (tokens < 100)]
    wanted = source[source >= 10]
    if OBJECTIVES[name].pairs == "none":
      np.testing.assert_array_equal(np.sort(text), np.sort(wanted))
    elif batch["pair_labels"] != 1:  # one of the documents in the row
      assert " ".join(map(str, text)) in " ".join(map(str, wanted))
  last = OBJECTIVES[name].kind in ("causal", "prefix")
  assert (seen[: stream.num_tokens - last] == 1).all()


@pytest.mark.parametrize("name", ["causal", "span", "prefix", "fim"])
def test_decoders_never_predict_what_they_see_or_another_text(name):
  batches = make_objective(name)
  stream, (stride,) = batches.streams["a"], batches.strides
  asked = 0
  for row, batch in rows_of(batches, 160):
    tokens, targets, segments = (
      batch[key] for key in ("tokens", "targets", "segment_ids")
    )
    length = (segments > 0).sum()
    where = np.flatnonzero(targets >= 0)
    asked += len(where)
    if len(where) and where[-1] == length - 1:  # the row cuts a document
      follows = (row + 1) * stride
      assert targets[length - 1] == stream.ids[follows]
      assert follows not in stream.starts
      where = where[:-1]
    np.testing.assert_array_equal(tokens[where + 1], targets[where])
    np.testing.assert_array_equal(segments[where + 1], segments[where])
    if "prefix" in batch:
      assert not batch["prefix"][where + 1].any() and batch["prefix"].any()
  assert asked > 400


@every_objective
def test_what_is_hidden_changes_from_epoch_to_epoch_but_not_in_evaluation(name):
  training = make_objective(name)
  found = {}
  for row, batch in rows_of(training, 3 * training.rows_per_source[0]):
    version = batch["tokens"].tobytes(), batch["targets"].tobytes()
    found.setdefault(row, []).append(version)
  assert all(len(versions) == 3 for versions in found.values())
  changed = np.mean([len(set(versions)) == 3 for versions in found.values()])
  assert changed == 0 if name == "causal" else changed > 0.5
  evaluation = make_objective(name, in_order=True)
  # Runs with other seeds and batch sizes are measured on the same rows.
  other = make_objective(name, in_order=True, seed=9, batch_size=4)
  for step in (0, len(evaluation) - 1):
    a, b = other[2 * step], other[2 * step + 1]
    assert_equal({key: np.concatenate([a[key], b[key]]) for key in a}, evaluation[step])


def test_sentence_b_follows_a_or_comes_from_another_document():
  lengths = np.random.default_rng(3).integers(0, 200, 60)
  stream = numbered(lengths)
  batches = make_objective("nsp", vocab_size=9000, streams={"a": stream})
  labels = []
  for step in range(60):
    batch = batches[step]
    tokens = restored(batch)
    for i, (label,) in enumerate(batch["pair_labels"].tolist()):
      used = batch["segment_ids"][i] > 0
      types = batch["token_types"][i]
      text = tokens[i] >= 10
      a = tokens[i][used & text & (types == 0)] - 10  # positions in the stream
      b = tokens[i][used & text & (types == 1)] - 10
      assert tokens[i, 0] == CLS and (tokens[i][used] == SEP).sum() == 2
      labels.append(label)
      document = [np.searchsorted(stream.starts, x, side="right") for x in (a, b)]
      assert all(len(set(numbers)) <= 1 for numbers in document)
      assert all((np.diff(x) == 1).all() for x in (a, b))
      if label == 0:
        assert b[0] == a[-1] + 1 and document[0][0] == document[1][0]
      elif label == 1:
        assert document[0][0] != document[1][0]
  labels = np.array(labels)
  assert np.mean(labels[labels >= 0]) == pytest.approx(0.5, abs=0.07)
  assert np.mean(labels >= 0) > 0.9


def test_documents_are_told_apart_however_long_they_are():
  rng = np.random.default_rng(4)
  stream = Stream([500, 0, 3, 900, 20, 20, 700, *rng.integers(0, 30, 50)])
  batches = make_objective("nsp", streams={"a": stream})
  document = np.searchsorted(stream.starts, np.arange(stream.num_tokens), side="right")
  for a, b in rng.integers(0, stream.num_tokens, (500, 2)).tolist():
    assert batches._are_apart(0, a, b) == (document[a] != document[b])


def test_next_sentence_prediction_needs_a_second_document():
  with pytest.raises(DataError, match=r"no second document(.*\n)*.*pairs=sop"):
    make_objective("nsp", [500])
  assert len(make_objective("sop", [500])[0]["tokens"])


@pytest.mark.faults
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


@every_objective
@pytest.mark.parametrize("steps", [range(0, 12), range(995, 999), range(5, 5)])
def test_tfdata_and_threads_yield_the_same_bits(name, steps):
  batches = make_objective(name)
  with_tf = list(read_ahead(batches, steps, "tfdata", 2, 3))
  with_threads = list(read_ahead(batches, steps, "numpy", 2, 3))
  assert len(with_tf) == len(with_threads) == len(steps)
  for step, a, b in zip(steps, with_tf, with_threads, strict=True):
    assert_equal(a, batches[step])
    assert_equal(b, batches[step])


@pytest.mark.faults
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


@every_objective
def test_synthetic_batches_are_a_function_of_seed_and_step(name):
  objective = OBJECTIVES[name]
  settings = {"objective": objective}
  if name != "causal":
    settings["vocabulary"] = masking.synthetic_vocabulary(objective, 50)
  batches = SyntheticBatches(16, 8, 3, 50, **settings)
  part = SyntheticBatches(16, 8, 3, 50, first_row=4, num_rows=4, **settings)
  assert_equal(part[7], {key: array[4:] for key, array in batches[7].items()})
  assert_equal(batches[7], SyntheticBatches(16, 8, 3, 50, **settings)[7])
  for other in (batches[8], SyntheticBatches(16, 8, 4, 50, **settings)[7]):
    assert not np.array_equal(batches[7]["tokens"], other["tokens"])
  # The arrays are those of a store.
  stored = make_objective(name, seq_len=16)[0]
  shapes = {key: array.shape for key, array in stored.items()}
  assert {key: array.shape for key, array in batches[7].items()} == shapes
  tokens = np.concatenate([batches[step]["tokens"] for step in range(9)])
  asked = np.concatenate([batches[step]["targets"] for step in range(9)])
  assert tokens.min() >= 0 and tokens.max() == 49 and asked.max() <= 49
  if objective.kind == "masked":
    assert (tokens == 3).any() and (tokens[:, 0] == 4).all()
    assert asked[asked >= 0].min() >= 9


def entropy_of(train, validation, vocab_size):
  """Returns nats per target of `validation` under add-one frequencies of `train`."""
  counts = np.bincount(train, minlength=vocab_size) + 1
  return -np.mean(np.log(counts / counts.sum())[validation])


@every_objective
def test_unigrams_are_counted_on_what_is_predicted(name):
  train = make_objective(name, [40] * 60)
  held_out = {"streams": {"a": Stream([25] * 30, seed=8, low=10, high=60)}}
  validation = make_objective(name, in_order=True, **held_out)
  part = make_objective(name, in_order=True, first_row=4, num_rows=4, **held_out)

  def targets(batches, steps):
    found = [batches[step]["targets"].reshape(-1) for step in range(steps)]
    found = np.concatenate(found)
    return found[found >= 0]

  seen = targets(train, len(train))
  if name == "causal":  # an epoch of rows does not fill its last batch
    ids = train.streams["a"].ids
    seen = ids[ids != BOS]
  expected = entropy_of(seen, targets(validation, len(validation)), 130)
  assert token_frequencies.unigram_nats(train, validation) == pytest.approx(expected)
  assert token_frequencies.unigram_nats(train, part) == pytest.approx(expected)
  first = entropy_of(seen, targets(validation, 1), 130)
  assert token_frequencies.unigram_nats(train, validation, 1) == pytest.approx(first)
  if name == "causal":
    bits = expected / math.log(2) / (4 * 27 / 26)
    assert token_frequencies.unigram_bits_per_byte(train, validation) == pytest.approx(
      bits
    )
  else:
    assert token_frequencies.bytes_per_token(validation) is None


def test_tensorflow_sees_no_accelerator():
  from flaxlm.data.lazy_tensorflow import import_tensorflow

  tf = import_tensorflow()
  assert tf.config.get_visible_devices("GPU") == []
  # The devices were fixed before the first operation; requesting a GPU now fails.
  assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}


def test_without_tensorflow_the_other_loader_is_named(monkeypatch):
  monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
  monkeypatch.setattr(sys, "path", [])
  batches = SyntheticBatches(16, 8, 3, 50)
  with pytest.raises(ConfigError, match=r"(?s)tensorflow.*numpy"):
    next(read_ahead(batches, range(3), "tfdata", 1, 1))


def test_one_ahead_makes_the_next_while_one_is_used_and_passes_errors_on():
  made, failed = threading.Event(), ValueError("third")

  def items():
    yield 1
    made.set()
    yield 2
    raise failed

  ahead = one_ahead(items())
  assert next(ahead) == 1
  assert made.wait(10)  # without being asked for
  assert next(ahead) == 2
  with pytest.raises(ValueError) as caught:
    next(ahead)
  assert caught.value is failed
  assert list(one_ahead(iter([]))) == []
