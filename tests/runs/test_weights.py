"""Starting from another run's weights, and training low-rank additions to them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.config.load import config_to_json
from flaxlm.errors import ConfigError
from flaxlm.models.trees import named_leaves
from flaxlm.parallel.mesh import make_mesh
from flaxlm.parallel.sharding import use_mesh
from flaxlm.runs import weights
from flaxlm.runs.describe import weight_table
from flaxlm.runs.directory import load_run_config
from flaxlm.runs.loop import train
from flaxlm.training import lora
from flaxlm.training.checkpoint import list_steps
from flaxlm.training.guards import StopSignal
from flaxlm.training.manifest import read_manifest, write_manifest


def run(config, workdir):
  """Trains; returns the logged records."""
  workdir.mkdir(exist_ok=True)
  with StopSignal() as stop:
    train(config, workdir, stop)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def restore(workdir, step=None):
  config = load_run_config(workdir)
  mesh, rules = make_mesh(data=-1, fsdp=1, tensor=1), config.mesh.rules.to_dict()
  with use_mesh(mesh, rules):
    return weights.restore_model(workdir, config, mesh, rules, step)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_tiny):
  """A trained run from which others start."""
  config, path = make_tiny(), tmp_path_factory.mktemp("base")
  config.num_steps, config.log.every = 4, 1
  run(config, path)
  return path


@pytest.fixture
def config(tiny, base):
  tiny.init_from, tiny.num_steps, tiny.log.every = str(base), 4, 1
  return tiny


def losses(records):
  return [record["loss"] for record in records if record["kind"] == "train"]


def test_a_run_starts_where_another_ended(config, base, tmp_path, tiny):
  config.optim.peak_learning_rate = 0.0
  config.optim.weight_decay = 0.0
  records = run(config, tmp_path / "more")
  before, after = named_leaves(restore(base)), named_leaves(restore(tmp_path / "more"))
  for name, leaf in before.items():
    np.testing.assert_array_equal(leaf, after[name])
  config.init_from = f"{base}/checkpoints/4"
  assert losses(run(config, tmp_path / "again")) == losses(records)
  config.init_from = ""
  assert losses(run(config, tmp_path / "alone")) != losses(records)


def test_weights_that_do_not_fit_are_named(config, tmp_path):
  config.model.mlp_dim = 96
  with pytest.raises(
    ConfigError, match=r"mlp/down \[2, 96, 32\].*there: \[2, 64, 32\]"
  ):
    run(config, tmp_path)
  config.model.mlp_dim, config.model.use_bias = 64, True
  with pytest.raises(ConfigError, match=r"key_bias \[2, 2, 8\] \(there: none\)"):
    run(config, tmp_path)


def test_a_new_head_is_initialised_and_said_so(config, base, capsys):
  config.model.head, config.model.num_labels = "sequence", 5
  mesh, rules = make_mesh(data=-1, fsdp=1, tensor=1), config.mesh.rules.to_dict()
  with use_mesh(mesh, rules):
    model, meta = weights.initial_model(config, mesh, rules)
  assert model.head.classifier[...].shape == (32, 5)
  assert "head/classifier" in meta["new"] and not meta["left"]
  np.testing.assert_array_equal(model.embed[...], restore(base).embed[...])


@pytest.mark.parametrize(
  "use_bias", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_a_classifier_starts_from_the_pooler(make_tiny, tmp_path, use_bias):
  """As in BERT, where the sentence-pair task trains the pooler."""
  config = make_tiny()
  model = config.model
  model.causal, model.head, model.pair_head = False, "mlm", True
  model.use_bias, model.num_segment_types = use_bias, 2
  config.objective.kind, config.objective.pairs = "masked", "nsp"
  config.num_steps = 4
  run(config, tmp_path)
  config.init_from, model.head, model.pair_head = str(tmp_path), "sequence", False
  model.num_labels = 3
  mesh, rules = make_mesh(data=-1, fsdp=1, tensor=1), config.mesh.rules.to_dict()
  with use_mesh(mesh, rules):
    got, meta = weights.initial_model(config, mesh, rules)
  pooler = restore(tmp_path).pair_head
  np.testing.assert_array_equal(got.head.dense[...], pooler.dense[...])
  if use_bias:
    np.testing.assert_array_equal(got.head.dense_bias[...], pooler.dense_bias[...])
  assert meta["new"] == ["head/classifier", "head/classifier_bias"]


@pytest.fixture
def classifier(make_tiny, tmp_path):
  """Returns (config to fine-tune, function that stores the config of its source)."""
  config = make_tiny()
  config.task.kind, config.model.head, config.model.num_labels = (
    "classify",
    "sequence",
    2,
  )
  config.init_from = str(tmp_path / "source")

  def store(labels, head="sequence", num_labels=2, **meta):
    source = make_tiny()
    source.task.labels, source.task.kind = labels, "classify"
    source.task.path, source.model.head = "x.csv", head
    source.model.num_labels, source.model.causal = num_labels, False
    source.task.kind = {"sequence": "classify", "token": "tag"}[head]
    checkpoint = tmp_path / "source/checkpoints/4"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (tmp_path / "source/config.json").write_text(config_to_json(source))
    write_manifest(checkpoint, {"format": 1, "step": 4, "files": {}, "meta": meta})

  return config, store


def test_a_classifier_brings_its_classes(classifier):
  config, store = classifier
  store(("pos", "neg"))
  labels = weights.class_labels(config)
  assert labels.names == ("pos", "neg") and labels.numbered and labels.open
  assert labels.owner == f"config.init_from={config.init_from}"
  store(("pos", "neg"), labels_numbered=False)
  assert not weights.class_labels(config).numbered
  # New names are the user's to give, another order is not.
  config.task.labels = ("good", "bad")
  assert weights.class_labels(config).names == ("good", "bad")
  config.task.labels = ("Neg", "Pos")
  with pytest.raises(ConfigError, match=r"given:  Neg Pos(?s:.*)pos neg: the order of"):
    weights.class_labels(config)


@pytest.mark.parametrize(
  "source",
  [
    {"labels": ("a", "b", "c"), "num_labels": 3},
    {"labels": ("a", "b"), "head": "token"},
    {"labels": ()},
  ],
)
def test_a_new_head_has_the_classes_of_its_data(classifier, source):
  config, store = classifier
  store(**source)
  labels = weights.class_labels(config)
  assert labels.names == () and not labels.owner and labels.open
  config.task.labels = ("b", "a")
  assert weights.class_labels(config).names == ("b", "a")


@pytest.fixture
def lora_config(config):
  config.lora.rank, config.lora.targets = 4, ("query", "out", "down")
  config.optim.peak_learning_rate = 1e-2
  return config


def test_adapters_begin_as_nothing_and_move_only_their_targets(base, lora_config):
  model, knobs = restore(base), lora_config.lora
  trained = lora.init(model, **knobs)
  same = lora.merge(model, trained, knobs.alpha)
  for name, leaf in named_leaves(model).items():
    np.testing.assert_array_equal(leaf, named_leaves(same)[name])
  moved = jax.tree.map(lambda x: x + 0.1, trained)
  merged = named_leaves(lora.merge(model, moved, knobs.alpha))
  for name, leaf in named_leaves(model).items():
    target = name.split("/")[-1] in knobs.targets
    assert np.array_equal(leaf, merged[name]) != target, name
  adapter = moved["adapters"]["blocks.attention.out"]
  a, b = (np.asarray(adapter[part][...][1]) for part in "ab")
  expected = named_leaves(model)["blocks/attention/out"][1].reshape(32, 32)
  expected += 16 / 4 * a @ b
  got = merged["blocks/attention/out"][1].reshape(32, 32)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_only_adapters_are_trained_and_saved(base, lora_config, tmp_path):
  run(lora_config, tmp_path)
  step = list_steps(tmp_path / "checkpoints")[-1]
  manifest = read_manifest(tmp_path / f"checkpoints/{step}")
  leaves = [name for name in manifest["leaves"] if name.startswith("model/")]
  assert len(leaves) == 2 * 3 and all("adapters" in name for name in leaves)
  before, after = named_leaves(restore(base)), named_leaves(restore(tmp_path))
  changed = {n for n in before if not np.array_equal(before[n], after[n])}
  assert {name.split("/")[-1] for name in changed} == {"query", "out", "down"}


def test_a_run_can_start_from_adapters(lora_config, tmp_path, tiny):
  run(lora_config, tmp_path / "adapted")
  tiny.lora.rank, tiny.init_from = 0, str(tmp_path / "adapted")
  tiny.optim.peak_learning_rate = tiny.optim.weight_decay = 0.0
  run(tiny, tmp_path / "whole")
  adapted, whole = restore(tmp_path / "adapted"), restore(tmp_path / "whole")
  for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)


def test_resumed_adapters_equal_uninterrupted_ones(lora_config, tmp_path):
  lora_config.optim.schedule = "constant"
  whole = losses(run(lora_config, tmp_path / "whole"))
  parts = tmp_path / "parts"
  lora_config.checkpoint.every = 2
  run(lora_config, parts)
  shutil.rmtree(parts / "checkpoints/4")
  assert losses(run(lora_config, parts)) == whole


def test_unknown_targets_are_refused(lora_config, base):
  with pytest.raises(
    ConfigError, match=r"given:  expert_up\n  needed: .*down gate key"
  ):
    lora.init(restore(base), 4, 16.0, ("query", "expert_up"))


def test_the_table_counts_what_exists(tiny):
  text = weight_table(tiny)
  model = weights.abstract_model(tiny)
  total = sum(x.size for x in jax.tree.leaves(model))
  assert f"{total:,}" in text and "blocks/attention/query" in text
  tiny.mesh.fsdp = 4
  split = weight_table(tiny)
  row = next(line for line in split.splitlines() if line.startswith("blocks/mlp/up"))
  assert row.split()[-1] == f"{2 * 32 * 64 * 4 / 4 / 1e6:.3f}" and "fsdp" in row
  assert jnp.float32(0).dtype.name in row
