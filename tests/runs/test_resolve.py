"""A config is resolved once, before the loop, and never changes afterwards."""

import json
import types

import jax
import pytest

from flaxlm.config import base
from flaxlm.config.load import config_from_json, config_to_json
from flaxlm.config.tree import flatten
from flaxlm.errors import OutputError
from flaxlm.kernels.attention import choice
from flaxlm.runs.directory import RunFiles
from flaxlm.runs.program import open_feed
from flaxlm.runs.resolve import choose_attention, describe_kernel, resolve, store_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  """Returns the path where measurements of kernels are stored."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def gpu():
  """A fake mesh of one GPU; tests may change its `card`."""
  card = types.SimpleNamespace(platform="gpu", device_kind="H")
  return types.SimpleNamespace(devices=types.SimpleNamespace(flat=[card]), card=card)


def labelled(labels=(), template_path=""):
  """The attributes that resolve reads from a feed of labelled examples."""
  examples = types.SimpleNamespace(label_names=labels) if labels else None
  return types.SimpleNamespace(
    examples=examples, template_path=template_path, tokenizer=b"", chat_template=None
  )


def measure(found):
  speeds = {name: {"conforms": True, "tflops": {"1024": x}} for name, x in found}
  choice.save_measured("H", jax.__version__, speeds)


def test_a_resolved_config_cannot_be_changed(tiny, one_device, tmp_path):
  config = resolve(tiny, one_device, open_feed(tiny, one_device), tmp_path / "none")
  assert flatten(config) == flatten(tiny)
  for group, knob in ((config, "seed"), (config.model.moe, "num_experts")):
    with pytest.raises(AttributeError, match="immutable"):
      group[knob] = 3
  with pytest.raises(AttributeError, match="immutable"):
    config.data.sources.main.weight = 2.0
  with pytest.raises(AttributeError, match="immutable"):
    config.unlock()


def test_the_config_that_was_asked_for_stays(tiny, gpu, tmp_path):
  before = config_to_json(tiny)
  measure([("cudnn", 1.0)])
  tiny.model.dtype = "bfloat16"
  asked = config_to_json(tiny)
  assert asked != before
  feed = labelled(("animal", "tool"), "chat.jinja")
  config = resolve(tiny, gpu, feed, tmp_path / "none")
  assert config_to_json(tiny) == asked
  changed = {k: v for k, v in flatten(config).items() if v != flatten(tiny)[k]}
  assert changed == {
    "model.attention": "cudnn",
    "task.chat_template": "chat.jinja",
    "task.labels": ("animal", "tool"),
  }
  tiny.tokenizer.vocab_size = 96  # linked knobs follow, but not in the resolved config
  assert (tiny.model.vocab_size, config.model.vocab_size) == (96, 64)


def test_what_the_user_named_is_kept(tiny, one_device, gpu, tmp_path):
  tiny.task.labels, tiny.task.chat_template = ("b", "a"), "mine.jinja"
  feed = open_feed(tiny, one_device)  # of random tokens: it has no labels
  config = resolve(tiny, one_device, feed, tmp_path / "none")
  assert config.task.labels == ("b", "a")
  assert config.task.chat_template == "mine.jinja"
  feed = open_feed(tiny, one_device, template_path="of the model.jinja")
  config = resolve(tiny, one_device, feed, tmp_path / "none")
  assert config.task.chat_template == "of the model.jinja"
  measure([("cudnn", 1.0)])
  tiny.model.dtype, tiny.model.attention = "bfloat16", "xla"
  assert choose_attention(tiny, gpu, tmp_path / "none") == "xla"


def test_a_resumed_run_keeps_its_kernel(tiny, gpu, tmp_path):
  tiny.model.dtype = "bfloat16"
  file = RunFiles(tmp_path).kernel
  assert choose_attention(tiny, gpu, file) == "xla"
  assert describe_kernel("xla", gpu) == f"H, jax {jax.__version__}: xla"
  measure([("cudnn", 1.0)])
  assert choose_attention(tiny, gpu, file) == "cudnn"  # a new run
  file.write_text(f"H, jax {jax.__version__}: xla\n")
  assert choose_attention(tiny, gpu, file) == "xla"
  for damaged in (f"H, jax {jax.__version__}: xlb\n", ""):
    file.write_text(damaged)
    assert choose_attention(tiny, gpu, file) == "cudnn"
  file.write_text("another card, jax 1: xla\n")
  assert choose_attention(tiny, gpu, file) == "cudnn"
  gpu.card.platform = "cpu"
  assert choose_attention(tiny, gpu, file) == "auto"


def test_a_run_stores_what_another_machine_can_use(tiny, gpu, tmp_path):
  measure([("cudnn", 1.0)])
  tiny.model.dtype = "bfloat16"
  tiny.data.sources = base.sources(b=base.source(), a=base.source())
  files, feed = RunFiles(tmp_path), labelled(("animal", "tool"), "chat.jinja")
  config = resolve(tiny, gpu, feed, files.kernel)
  store_run(files, tiny, config, gpu, feed)
  stored = config_from_json(files.config.read_text())
  assert stored.model.attention == "auto"
  assert stored.task.labels == ("animal", "tool")
  assert stored.task.chat_template == "chat.jinja"
  # In the order of flaxlm/config/base.py, as a user reads it.
  assert [*json.loads(files.config.read_text())][:2] == ["seed", "num_steps"]
  assert files.kernel.read_text() == f"H, jax {jax.__version__}: cudnn\n"
  # The next start of this run, after the doctor has found something faster.
  measure([("cudnn", 1.0), ("xla", 2.0)])
  assert resolve(tiny, gpu, feed, files.kernel) == config


def test_a_run_keeps_the_small_files_of_the_model_that_it_starts_from(
  tiny, one_device, tmp_path
):
  parent, files = RunFiles(tmp_path / "imported"), RunFiles(tmp_path / "tuned")
  for folder in (parent.originals, files.workdir):
    folder.mkdir(parents=True)
  (parent.originals / "config.json").write_text('{"eos_token_id": [1, 2]}')
  parent.config.write_text(config_to_json(tiny))
  tiny.init_from = str(parent.workdir / "checkpoints" / "0")
  feed = open_feed(tiny, one_device)
  config = resolve(tiny, one_device, feed, files.kernel)
  store_run(files, tiny, config, one_device, feed)
  assert (files.originals / "config.json").read_text() == '{"eos_token_id": [1, 2]}'


@pytest.mark.faults
def test_files_that_cannot_be_written_are_named_before_anything_is_compiled(
  tiny, one_device, tmp_path
):
  files, feed = RunFiles(tmp_path), open_feed(tiny, one_device)
  config = resolve(tiny, one_device, feed, files.kernel)
  files.config.mkdir()
  with pytest.raises(OutputError, match=r"config\.json"):
    store_run(files, tiny, config, one_device, feed)


def test_a_kernel_that_was_not_chosen_is_not_stored(tiny, one_device, tmp_path):
  files, feed = RunFiles(tmp_path), open_feed(tiny, one_device)
  config = resolve(tiny, one_device, feed, files.kernel)
  store_run(files, tiny, config, one_device, feed)
  assert flatten(config_from_json(files.config.read_text())) == flatten(tiny)
  assert not files.kernel.exists()
