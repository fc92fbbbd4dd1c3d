"""The files of a run and its checkpoints describe one model, or the run is refused."""

import hashlib
import json

import pytest

from flaxlm.config.load import (
  config_from_json,
  config_to_json,
  load_config,
  seal_config,
)
from flaxlm.config.tree import flatten, set_value
from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.runs import binding
from flaxlm.runs.directory import RunFiles, load_run_config
from flaxlm.training.manifest import CHECKPOINT_FORMAT, write_manifest

TOKENIZER, TEMPLATE = b"a tokenizer", "{{ messages }}"


def sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


@pytest.fixture
def files(tiny, tmp_path) -> RunFiles:
  """A run with what is read before its weights are."""
  files = RunFiles(tmp_path / "run")
  (files.checkpoints / "4").mkdir(parents=True)
  files.config.write_text(seal_config(tiny))
  (files.workdir / "tokenizer.model").write_bytes(TOKENIZER)
  files.chat_template.write_text(TEMPLATE)
  meta = {
    "step": 4,
    "tokenizer_sha256": sha256(TOKENIZER),
    "files": {files.chat_template.name: sha256(TEMPLATE.encode())},
    "config": json.loads(config_to_json(tiny)),
  }
  manifest = {"format": CHECKPOINT_FORMAT, "step": 4, "meta": meta, "files": {}}
  write_manifest(files.checkpoints / "4", manifest)
  return files


def edit(files, *, seal: str, **changes):
  """Changes values of config.json; the seal is 'kept', 'new' or 'none'."""
  config = config_from_json(files.config.read_text())
  for key, value in changes.items():
    set_value(config, key.replace("__", "."), value)
  stored = json.loads(config_to_json(config))
  if seal == "kept":
    stored["sha256"] = json.loads(files.config.read_text())["sha256"]
  text = seal_config(config) if seal == "new" else json.dumps(stored, indent=2)
  files.config.write_text(text)


def refusal(files) -> str:
  with pytest.raises(DataError) as caught:
    load_run_config(files.workdir)
  message = str(caught.value)
  assert len(message.splitlines()) <= 5 and message.startswith(str(files.workdir))
  return message


def test_a_run_as_it_was_written_is_read(files, tiny, capsys):
  assert flatten(load_run_config(files.workdir)) == flatten(tiny)
  # Laid out anew by an editor: the values count.
  files.config.write_text(json.dumps(json.loads(files.config.read_text())))
  assert flatten(load_run_config(files.workdir)) == flatten(tiny)
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("model.norm_epsilon", 0.5),
    ("model.rope.theta", 20_000.0),
    ("model.attention_softcap", 3.0),
    ("step.ema_decay", 0.9),
    ("lora.alpha", 4.0),
    ("objective.mask_rate", 0.5),
    ("task.labels", ("b", "a")),
  ],
)
@pytest.mark.parametrize("seal", ["kept", "new", "none"])
def test_a_config_of_another_model_is_refused_whatever_its_check_says(
  files, key, value, seal
):
  edit(files, seal=seal, **{key.replace(".", "__"): value})
  message = refusal(files)
  assert f"config.{key}=" in message and "trained with" in message
  assert "checkpoint 4" in message and "remove config.json" in message


def test_any_edit_that_is_sealed_by_no_run_is_refused(files):
  stored = files.config.read_text()
  edit(files, seal="kept", optim__peak_learning_rate=0.5, num_steps=7)
  assert "config.num_steps=7 (trained with 20)" in refusal(files)
  with pytest.raises(DataError, match="do not match its sha256"):
    load_config(files.config)
  files.config.write_text(stored)
  edit(files, seal="new", optim__peak_learning_rate=0.5)  # a resumed run stored it
  assert load_run_config(files.workdir).optim.peak_learning_rate == 0.5


def test_flipped_bits_of_a_config_are_noticed(files, tiny):
  text = files.config.read_bytes()
  for position in range(0, len(text), 149):
    flipped = bytearray(text)
    flipped[position] ^= 1 << position % 8
    files.config.write_bytes(flipped)
    try:
      got = load_run_config(files.workdir)
    except DataError as error:
      assert len(str(error).splitlines()) <= 5
    else:  # white space, or a capital in a number
      assert flatten(got) == flatten(tiny), text[position - 20 : position + 20]


def test_a_config_that_was_lost_is_that_of_the_newest_checkpoint(files, tiny, capsys):
  files.config.unlink()
  config = load_run_config(files.workdir, ["num_steps=7"])
  assert flatten(config) == flatten(tiny) | {"num_steps": 7}
  assert "the config of checkpoint 4 is used" in capsys.readouterr().err
  (files.checkpoints / "4/MANIFEST.json").unlink()
  with pytest.raises(MissingInputError, match="holds no run"):
    load_run_config(files.workdir)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja"])
def test_another_tokenizer_or_template_is_refused(files, name):
  path = files.workdir / name
  path.write_bytes(path.read_bytes().swapcase())
  message = refusal(files)
  assert f"{path} is not the file" in message and "checkpoint 4" in message
  path.write_bytes(path.read_bytes().swapcase())
  load_run_config(files.workdir)


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja"])
def test_a_file_that_was_lost_is_noticed(files, name):
  (files.workdir / name).unlink()
  assert name in refusal(files) and "no such file" in refusal(files)


def test_a_run_of_an_older_version_is_read(files, tiny):
  files.config.write_text(config_to_json(tiny))  # it has no check
  meta = {"step": 4, "config": json.loads(config_to_json(tiny))}  # names no files
  manifest = {"format": CHECKPOINT_FORMAT, "step": 4, "meta": meta, "files": {}}
  write_manifest(files.checkpoints / "4", manifest)
  assert flatten(load_run_config(files.workdir)) == flatten(tiny)


def test_a_change_on_the_command_line_is_named(files, capsys):
  changes = ["model.norm_epsilon=0.1", "model.dropout=0.1", "log.every=3"]
  assert load_run_config(files.workdir, changes).model.norm_epsilon == 0.1
  assert capsys.readouterr().err.splitlines() == [
    "flaxlm: warning: config.model.norm_epsilon=0.1 (trained with 1e-05)"
  ]


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("num_steps", 40),
    ("data.batch_size", 16),
    ("log.every", 3),
    ("optim.peak_learning_rate", 1e-5),
    ("optim.schedule", "linear"),
    ("model.dropout", 0.1),
    ("model.dtype", "bfloat16"),
    ("model.attention", "xla"),
    ("step.accumulation_steps", 2),
    ("mesh.fsdp", 2),
    ("data.loader", "numpy"),
  ],
)
def test_how_to_train_may_change_when_a_run_is_resumed(tiny, key, value):
  before = tiny.copy_and_resolve_references()
  set_value(tiny, key, value)
  binding.check_resumed(tiny, before, 4)


@pytest.mark.faults
@pytest.mark.parametrize(
  ("key", "value", "hint"),
  [
    ("model.norm_epsilon", 0.1, "init_from"),
    ("model.rope.theta", 2e4, "init_from"),
    ("lora.alpha", 2.0, "init_from"),
    ("objective.mask_rate", 0.5, "init_from"),
    ("seed", 1, "place in its data"),
    ("data.seq_len", 16, "place in its data"),
    ("data.sources.main.weight", 2.0, "place in its data"),
  ],
)
def test_what_the_weights_and_the_rows_mean_may_not(tiny, key, value, hint):
  before = tiny.copy_and_resolve_references()
  tiny.model.max_len = 32  # else it follows seq_len
  set_value(tiny, key, value)
  with pytest.raises(ConfigError, match=f"config.{key}={value} ") as caught:
    binding.check_resumed(tiny, before, 4)
  assert hint in str(caught.value) and len(str(caught.value).splitlines()) <= 5


def test_adapters_are_bound_to_the_weights_under_them():
  base = {"step": 4, "config": {"seed": 0}}
  name = binding.name_checkpoint(base | {"new": [], "left": ["head/x"]})
  binding.check_base("runs/a", name, base)
  binding.check_base("runs/a", None, base)  # an older version kept no name
  with pytest.raises(DataError, match="checkpoints/N, for the step 4"):
    binding.check_base("runs/a", name, base | {"step": 8})
