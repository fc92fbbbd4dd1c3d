"""Feed: the data that a config names, on the devices that hold it."""

import jax
import numpy as np
import pytest

from flaxlm.data.feed import Feed
from flaxlm.data.store.build import build_store
from flaxlm.data.store.shards import Store
from flaxlm.errors import ConfigError, MissingInputError
from flaxlm.kernels.attention.ring import zigzag
from flaxlm.parallel.mesh import make_mesh


def open_feed(config, mesh=None, **options) -> Feed:
  mesh = mesh or make_mesh()
  groups = config.data, config.objective, config.task, config.model, config.mesh
  return Feed(*groups, mesh, seed=3, **options)


@pytest.fixture
def stored(text_config, tmp_path):
  """A config whose store is prepared: lines of text in rows of 32 tokens."""
  lines = [f"line {number} of some text" for number in range(200)]
  (tmp_path / "texts/a.txt").write_text("\n".join(lines))
  data = text_config.data
  data.seq_len, data.batch_size, data.loader = 32, 8, "numpy"
  build_store(data, text_config.tokenizer, lambda line: None)
  return text_config


@pytest.fixture
def labelled(tiny, bpe, tmp_path):
  """A config of sentences in two classes, and the path of its tokenizer."""
  rows = "".join(f"{i % 2},sentence {i}\n" for i in range(60))
  (tmp_path / "a.csv").write_text("label,text\n" + rows)
  (tmp_path / "tokenizer.model").write_bytes(bpe.model)
  tiny.task.kind, tiny.task.path = "classify", str(tmp_path / "a.csv")
  tiny.model.update(vocab_size=1024, num_labels=2, causal=False)
  tiny.data.validation_fraction = 0.3
  return tiny, tmp_path / "tokenizer.model"


def assert_equal(batches, expected):
  batches, expected = list(batches), list(expected)
  assert len(batches) == len(expected)
  for batch, rows in zip(batches, expected, strict=True):
    assert batch.keys() == rows.keys()
    for name in rows:
      np.testing.assert_array_equal(batch[name], rows[name])


def test_batches_are_spread_over_the_devices(tiny):
  feed = open_feed(tiny)
  batches = list(feed.read_train(0, 3))
  assert_equal(batches, [feed.train[step] for step in range(3)])
  tokens = batches[0]["tokens"]
  assert isinstance(tokens, jax.Array) and len(tokens.sharding.device_set) == 8
  assert tokens.addressable_shards[0].data.shape == (1, 32)


def test_reading_begins_at_any_step(tiny):
  feed = open_feed(tiny)
  assert_equal(feed.read_train(2, 5), list(feed.read_train(0, 5))[2:])
  assert list(feed.read_train(5, 5)) == []


def test_random_tokens_have_no_data_to_continue_with(tiny):
  feed = open_feed(tiny)
  assert feed.fingerprint == "synthetic" and feed.tokenizer == b""
  assert feed.validation is None and feed.num_eval_batches == 0
  assert feed.describe(10) == ("synthetic tokens", None)


@pytest.mark.parametrize("kind", ["masked", "span", "prefix", "fim"])
def test_random_tokens_of_each_objective(tiny, kind):
  tiny.objective.kind = kind
  tiny.objective.num_sentinels = 8
  (batch,) = open_feed(tiny).read_train(0, 1)
  assert (np.asarray(batch["targets"]) >= 0).any()


def test_a_store_gives_training_and_validation_rows(stored):
  store = Store(stored.data.store)
  feed = open_feed(stored)
  assert feed.fingerprint == store.fingerprint
  assert feed.tokenizer == store.tokenizer
  assert feed.tokenizer_sha256 == store.tokenizer_sha256
  train, validation = (store.stream("main", s) for s in ("train", "validation"))
  # Each token but the first of a document is predicted once in an evaluation.
  targets = [np.asarray(batch["targets"]) for batch in feed.read_validation()]
  count = sum((target >= 0).sum() for target in targets)
  assert count == validation.num_tokens - validation.num_documents
  assert feed.bytes_per_token() == pytest.approx(validation.num_bytes / count)
  text, epochs = feed.describe(2 * len(feed.train))
  assert f"{train.num_tokens:,} training tokens" in text and 1.9 < epochs < 2.5


def test_an_evaluation_has_the_same_batches_each_time(stored):
  every = list(open_feed(stored).read_validation())
  feed = open_feed(stored, eval_batches=2)
  assert len(every) > 2 == feed.num_eval_batches
  for _ in range(2):
    assert_equal(feed.read_validation(), every[:2])
  assert open_feed(stored, eval_batches=10**6).num_eval_batches == len(every)


def test_a_store_without_validation_text_is_only_trained_on(stored, tmp_path):
  stored.data.store, stored.data.validation_fraction = str(tmp_path / "other"), 0.0
  build_store(stored.data, stored.tokenizer, lambda line: None)
  feed = open_feed(stored)
  assert feed.validation is None and feed.num_eval_batches == 0
  assert len(list(feed.read_train(0, 2))) == 2


def test_ring_attention_gets_its_order_of_columns(tiny):
  plain = open_feed(tiny)
  tiny.model.attention, tiny.mesh.context = "ring", 2
  mesh = make_mesh(context=2)
  (batch,), rows = open_feed(tiny, mesh).read_train(0, 1), plain.train[0]
  order = zigzag(32, 2)
  assert_equal([batch], [{name: row[:, order] for name, row in rows.items()}])


def test_labelled_examples_and_their_tokenizer(labelled, bpe):
  config, path = labelled
  feed = open_feed(config, tokenizer_path=path)
  assert feed.tokenizer == bpe.model and feed.store is None
  assert feed.fingerprint == feed.examples.fingerprint
  assert len(feed.train.examples) + len(feed.validation.examples) == 60
  rows = len(feed.train.examples)
  assert feed.describe(1)[0].endswith(f": {rows} rows to classify, 2 classes")
  assert feed.bytes_per_token() is None
  (batch,) = feed.read_train(0, 1)
  assert batch["labels"].shape == (8, 1)
  only = open_feed(config, tokenizer_path=path, training=False)
  assert only.train is None and only.examples is only.validation.examples


def test_what_does_not_fit_together_is_named(stored, labelled, tmp_path):
  config, path = labelled
  with pytest.raises(ConfigError, match=r"config\.tokenizer\.path"):
    open_feed(config)
  config.model.num_labels = 3
  with pytest.raises(ConfigError, match=r"num_labels(?s:.*)2, the classes"):
    open_feed(config, tokenizer_path=path)
  config.model.vocab_size = 512
  with pytest.raises(ConfigError, match=r"vocab_size(?s:.*)at least the 1000"):
    open_feed(config, tokenizer_path=path)
  stored.model.vocab_size = 8
  with pytest.raises(ConfigError, match=r"vocab_size(?s:.*)try:    320"):
    open_feed(stored)
  stored.data.store = str(tmp_path / "nothing")
  with pytest.raises(MissingInputError, match=r"flaxlm\.prepare"):
    open_feed(stored)
  stored.data.loader = "torch"
  with pytest.raises(ConfigError, match="tfdata, numpy or synthetic"):
    open_feed(stored)
