"""An export that has changed since is not imported."""

import numpy as np
import pytest

from flaxlm.errors import DataError
from flaxlm.interop import huggingface as hf
from flaxlm.interop.export_manifest import check_export, seal_export
from flaxlm.training.manifest import (
  CHECKPOINT_FORMAT,
  MANIFEST,
  find_damage,
  write_manifest,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_tiny):
  """A directory like an export's: two shards of weights, and {name: content}."""
  directory, config = tmp_path_factory.mktemp("export"), make_tiny()
  fields, rng = config.model.to_dict(), np.random.default_rng(0)
  leaves = {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in hf.weight_shapes(fields).items()
  }
  hf.write_model(directory, fields, leaves, max_shard=40_000)
  (directory / "tokenizer_config.json").write_text("{}")
  (directory / ".draft.lock").write_text("")
  seal_export(directory, 3)
  return directory


@pytest.fixture
def directory(exported, tmp_path):
  for path in exported.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def test_a_whole_export_is_read_and_one_without_a_manifest_too(directory):
  weights = hf.read_model(directory).leaves
  (directory / MANIFEST).unlink()
  again = hf.read_model(directory).leaves
  for path, leaf in weights.items():
    np.testing.assert_array_equal(leaf, again[path])


def test_every_damage_of_every_file_is_refused(directory):
  names = [path.name for path in directory.iterdir() if path.name[0] != "."]
  assert sum(name.endswith(".safetensors") for name in names) > 1
  for name in names:
    path = directory / name
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (flipped, data[:-1], data + b"\n", None):
      path.unlink() if damaged is None else path.write_bytes(damaged)
      if damaged is None and name == MANIFEST:
        continue
      with pytest.raises(DataError, match="is not as it was exported") as caught:
        hf.read_model(directory)
      message = str(caught.value)
      assert name in message and len(message.splitlines()) <= 5
    path.write_bytes(data)
  hf.read_model(directory)


def test_weights_that_no_export_wrote_are_refused_and_notes_are_not(directory):
  (directory / "README.md").write_text("a model card")
  check_export(directory)
  shard = next(directory.glob("*.safetensors"))
  (directory / "model.safetensors").write_bytes(shard.read_bytes())
  with pytest.raises(DataError, match=r"model\.safetensors is not in MANIFEST\.json"):
    check_export(directory)


def test_the_tokenizer_is_checked_by_itself(directory):
  (directory / "tokenizer_config.json").write_text('{"a": 1}')
  check_export(directory, ["tokenizer.json", "config.json"])
  with pytest.raises(DataError, match=r"tokenizer_config\.json"):
    check_export(directory, ["tokenizer.json", "tokenizer_config.json"])


@pytest.mark.parametrize("files", [[], {"config.json": 5}, {"config.json": ["x", 1]}])
def test_a_manifest_that_says_something_else_is_refused(directory, files):
  write_manifest(directory, {"format": CHECKPOINT_FORMAT, "files": files})
  with pytest.raises(DataError, match="is not as it was exported") as caught:
    check_export(directory)
  assert "\\n" not in str(caught.value)
  assert find_damage(directory)
