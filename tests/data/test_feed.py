"""A run gets the rows of its data, on its devices, from any step on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from flaxlm.config import base
from flaxlm.config.load import config_to_json
from flaxlm.data.feed import Feed
from flaxlm.data.store.build import build_store
from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.ring import zigzag
from flaxlm.parallel.mesh import make_mesh
from flaxlm.tokenizer.files import file_name


def open_feed(config, mesh=None, **options) -> Feed:
  groups = (config.data, config.objective, config.task, config.model, config.mesh)
  mesh = mesh or make_mesh(data=-1, fsdp=1, tensor=1)
  return Feed(*groups, mesh, seed=config.seed, **options)


def assert_equal(batch: dict, rows: dict) -> None:
  assert batch.keys() == rows.keys()
  for name, array in batch.items():
    np.testing.assert_array_equal(array, rows[name])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, make_tiny):
  """The directory of a store of 300 lines, in characters."""
  root, config = tmp_path_factory.mktemp("feed"), make_tiny()
  (root / "text.txt").write_text("".join(f"line {n} of {n % 7}\n" for n in range(300)))
  config.data.store = str(root / "store")
  config.data.sources.main.update(
    kind="text", path=str(root / "text.txt"), document="line"
  )
  config.data.validation_fraction = 0.25
  config.tokenizer.kind, config.tokenizer.vocab_size = "char", 400
  build_store(config.data, config.tokenizer, lambda line: None)
  return root


@pytest.fixture
def config(tiny, prepared):
  tiny.data.store, tiny.data.loader = str(prepared / "store"), "numpy"
  tiny.tokenizer.vocab_size = 400
  return tiny


def test_batches_follow_from_the_step_and_lie_on_all_devices(tiny):
  feed = open_feed(tiny)
  batches = list(feed.read_train(2, 5))
  assert len(batches) == 3
  for step, batch in enumerate(batches, 2):
    assert_equal(batch, feed.train[step])
    tokens = batch["tokens"]
    assert isinstance(tokens, jax.Array) and len(tokens.sharding.device_set) == 8
    assert tokens.addressable_shards[0].data.shape == (1, 32)
  assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])
  (again,) = open_feed(tiny).read_train(4, 5)
  assert_equal(again, batches[2])
  tiny.seed = 1
  (other,) = open_feed(tiny).read_train(4, 5)
  assert not np.array_equal(other["tokens"], again["tokens"])


def test_random_tokens_have_no_validation_and_no_tokenizer(tiny):
  feed = open_feed(tiny)
  assert feed.validation is None and feed.num_eval_batches == 0
  assert (feed.fingerprint, feed.tokenizer) == ("synthetic", b"")
  assert feed.describe(10) == ("synthetic tokens", None)


def test_a_ring_gets_its_columns_in_its_order(tiny):
  tiny.model.attention = "ring"
  mesh = make_mesh(data=4, fsdp=1, tensor=1, context=2)
  tiny.mesh.data, tiny.mesh.context = 4, 2
  feed = open_feed(tiny, mesh)
  order = zigzag(32, 2)
  assert list(order) != list(range(32))
  (batch,) = feed.read_train(0, 1)
  assert_equal(batch, {name: x[:, order] for name, x in feed.train[0].items()})
  assert batch["tokens"].addressable_shards[0].data.shape == (2, 16)
  tiny.model.attention = "xla"  # whole rows, in the order of the text
  (batch,) = open_feed(tiny, mesh).read_train(0, 1)
  assert_equal(batch, feed.train[0])


def test_a_store_gives_its_splits_and_validation_is_always_the_same(config):
  feed = open_feed(config)
  assert feed.fingerprint == feed.store.fingerprint != "synthetic"
  assert feed.tokenizer == feed.store.tokenizer
  (batch,) = feed.read_train(3, 4)
  assert_equal(batch, feed.train[3])
  first, again = list(feed.read_validation()), list(feed.read_validation())
  assert len(first) == feed.num_eval_batches == len(feed.validation) > 2
  for one, other in zip(first, again, strict=True):
    assert_equal(one, other)
  assert open_feed(config, eval_batches=2).num_eval_batches == 2
  assert open_feed(config, eval_batches=10**6).num_eval_batches == len(first)
  text, epochs = feed.describe(100)
  rows = sum(feed.train.rows_per_source)
  assert "main" in text and epochs == pytest.approx(800 / rows)
  assert 0.9 < feed.bytes_per_token() < 1  # one byte per character, and the end tokens


def test_a_source_without_held_out_text_has_no_validation(config, prepared):
  config.data.store = str(prepared / "all")
  config.data.sources.main = base.source(
    "text", str(prepared / "text.txt"), document="line"
  )
  config.data.validation_fraction, config.tokenizer.kind = 0.0, "char"
  build_store(config.data, config.tokenizer, lambda line: None)
  feed = open_feed(config)
  assert feed.validation is None and feed.num_eval_batches == 0


@pytest.fixture
def labelled(config, prepared, tmp_path):
  """The config of a classifier and its tokenizer file."""
  tokenizer = tmp_path / file_name(open_feed(config).tokenizer)
  tokenizer.write_bytes(open_feed(config).tokenizer)
  records = [
    {"text": f"line {n}", "label": "odd" if n % 2 else "even"} for n in range(40)
  ]
  path = tmp_path / "records.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  config.task.update(kind="classify", path=str(path))
  config.model.update(head="sequence", num_labels=2)
  config.data.validation_fraction = 0.25
  return config, tokenizer


def test_labelled_examples_bring_their_names_and_take_the_models_tokenizer(labelled):
  config, tokenizer = labelled
  before = config_to_json(config)
  feed = open_feed(config, tokenizer_path=tokenizer)
  assert feed.examples.label_names == ("even", "odd")
  assert feed.tokenizer == tokenizer.read_bytes() and feed.store is None
  (batch,) = feed.read_train(0, 1)
  assert set(np.unique(batch["labels"])) <= {-1, 0, 1} and batch["labels"].shape == (
    8,
    1,
  )
  assert feed.bytes_per_token() is None
  assert config_to_json(config) == before  # the names are for runs/resolve.py to set


def test_a_named_chat_template_is_read_unless_the_model_has_one(config):
  config.task.chat_template = "asked.jinja"
  assert open_feed(config).template_path == "asked.jinja"
  feed = open_feed(config, template_path="of_the_model.jinja")
  assert feed.template_path == "of_the_model.jinja"


def test_what_does_not_fit_is_refused(config, labelled):
  config.task.kind = "none"
  config.model.vocab_size = 8
  with pytest.raises(ConfigError, match=r"vocab_size.*\n.*8\n.*at least the .* of the"):
    open_feed(config)
  config.model.vocab_size, config.data.loader = 400, "torch"
  with pytest.raises(ConfigError, match=r"loader.*\n.*torch"):
    open_feed(config)
  config.data.loader, config.data.batch_size = "numpy", 12
  with pytest.raises(ConfigError, match="a multiple of 8"):
    open_feed(config)
  config.data.batch_size, config.task.kind = 8, "classify"
  with pytest.raises(ConfigError, match=r"tokenizer\.path"):
    open_feed(config)
  config.model.num_labels = 3
  with pytest.raises(ConfigError, match="2, the classes of"):
    open_feed(config, tokenizer_path=labelled[1])


def read_rows(config, *, first_step, num_steps, rows_read=None, **options):
  """Returns the rows of these batches, one after the other, by name."""
  feed = open_feed(config, **options)
  batches = [*feed.read_train(first_step, num_steps, rows_read)]
  names = batches[0] if batches else ()
  return {n: np.concatenate([np.asarray(b[n]) for b in batches]) for n in names}


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_another_batch_size_goes_on_with_the_next_row(config, objective):
  if objective == "masked":
    config.objective.kind, config.model.head, config.model.causal = (
      "masked",
      "mlm",
      False,
    )
  whole = read_rows(config, first_step=0, num_steps=9)
  config.data.batch_size = 24  # 3 steps of 8 rows were read, then 2 of 24
  later = read_rows(config, first_step=3, num_steps=5, rows_read=24)
  config.data.batch_size = 16  # as many rows as in steps of 16, or more
  for first, rows in ((3, 24), (1, 24), (9, 32)):
    part = read_rows(config, first_step=first, num_steps=first + 1, rows_read=rows)
    assert_equal(part, {n: x[rows : rows + 16] for n, x in whole.items()})
  assert_equal(later, {n: x[24:] for n, x in whole.items()})


def test_labelled_rows_go_on_too_and_an_epoch_has_each_once(labelled):
  config, tokenizer = labelled
  size = len(open_feed(config, tokenizer_path=tokenizer).examples)
  parts, rows, step = [], 0, 0
  for batch_size in (8, 24, 16, 8, 16):
    config.data.batch_size = batch_size
    options = {"tokenizer_path": tokenizer, "rows_read": rows}
    parts.append(read_rows(config, first_step=step, num_steps=step + 1, **options))
    rows, step = rows + batch_size, step + 1
  texts = [tuple(x) for part in parts for x in part["tokens"].tolist()]
  assert size < rows == len(texts) and len({*texts[:size]}) == size


def test_positions_beyond_32_bits_are_exact(config):
  """10^13 rows: counters of 32 bits, or float64 at a later step, would repeat rows."""
  feed, rows = open_feed(config), 10**13 + 1
  size = sum(feed.train.rows_per_source)
  numbers = dataclasses.replace(feed.train, first_row=rows, num_rows=size)._numbers(0)
  assert numbers[0] == rows and numbers[-1] == rows + size - 1
  start = -(-rows // size) * size  # an epoch begins here
  epoch = dataclasses.replace(feed.train, first_row=start, num_rows=size).rows(0)
  assert len({*epoch}) == size
