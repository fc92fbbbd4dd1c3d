"""A model is opened where it lies, and a run and its export are the same model."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import flaxlm
from flaxlm.config.load import config_to_json
from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.interop.export_run import export_model
from flaxlm.interop.import_run import import_model
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.models.trees import named_leaves, nest
from flaxlm.open_model import find_model
from flaxlm.runs.directory import RunFiles, load_run_config
from flaxlm.training.checkpoint import Checkpointer

PAGE = pathlib.Path(flaxlm.__file__).parent / "LIBRARY.md"
PLAIN = """{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def save_run(config, workdir, tokenizer=None, step=7):
  """Writes a run whose weights are random; returns the model."""
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(3))
  files = RunFiles(workdir)
  workdir.mkdir(parents=True)
  with Checkpointer(files.checkpoints, **config.checkpoint) as checkpoints:
    meta = {"step": step, "tokenizer_sha256": tokenizer.sha256 if tokenizer else ""}
    meta["config"] = json.loads(config_to_json(config))
    checkpoints.save(step, {"model": nest(named_leaves(model))}, meta)
  files.config.write_text(config_to_json(config))
  if tokenizer:
    (workdir / "tokenizer.model").write_bytes(tokenizer.model)
  return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tiny, bpe):
  """A run and its export, with the same random weights."""
  home, config = tmp_path_factory.mktemp("library"), make_tiny()
  config.tokenizer.vocab_size = bpe.vocab_size
  save_run(config, home / "run", bpe)
  export_model(config, home / "run", home / "exported")
  return home


def test_the_examples_of_the_page_run(make_tiny, bpe, tmp_path, monkeypatch, capsys):
  pytest.importorskip("jinja2", reason="chat templates need jinja2: the extra `hf`")
  config = make_tiny()
  config.tokenizer.vocab_size, config.data.seq_len = bpe.vocab_size, 64
  config.model.num_layers = 1
  save_run(config, tmp_path / "runs/quickstart", bpe)
  shutil.copytree(tmp_path / "runs/quickstart", tmp_path / "runs/chat")
  (tmp_path / "runs/chat/chat_template.jinja").write_text(PLAIN)
  config.model.causal, config.model.num_segment_types = False, 2
  config.model.head, config.objective.kind = "mlm", "masked"
  save_run(config, tmp_path / "runs/bert", bpe)
  config.model.head, config.model.num_labels = "sequence", 2
  config.task.kind, config.task.labels = "classify", ("code", "prose")
  config.task.path = "topics.jsonl"
  save_run(config, tmp_path / "runs/topics", bpe)
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
  assert len(blocks) == 7
  names = {}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  assert names["best"] in ("code", "prose") and len(names["guesses"]) == 3
  assert len(names["texts"]) == 2 and isinstance(names["answer"], str)
  assert names["vectors"].shape == (2, 32) and names["writing"].finish != ["stop"]
  assert "fill_mask(text)" in capsys.readouterr().out.splitlines()[-1]


def test_importing_flaxlm_imports_no_jax():
  code = "import sys, flaxlm; flaxlm.load; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_its_checkpoint_and_its_export_are_one_model(saved):
  run = flaxlm.load(saved / "run")
  assert run.step == 7 and flaxlm.load(f"{saved}/run/checkpoints/7").step == 7
  theirs = flaxlm.load(saved / "exported")
  assert theirs.step is None
  ids = run.encode("def main(argv):")
  assert theirs.encode("def main(argv):") == ids
  assert theirs.decode(ids) == run.decode(ids) == "def main(argv):"
  np.testing.assert_allclose(run.logits(ids), theirs.logits(ids), atol=1e-5)
  pairs = [("def main(", "argv):"), ("", "import sys")]
  for a, b in zip(run.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
    assert a.log_p == pytest.approx(b.log_p, abs=1e-4) and a[1:] == b[1:]


def test_overrides_change_a_run_and_nothing_else(saved):
  from flaxlm.open_model import load_model

  model = load_model(saved / "run", overrides=["model.dtype=bfloat16"])
  assert model.config.dtype == "bfloat16"
  with pytest.raises(ConfigError, match="without steps or knobs"):
    load_model(saved / "exported", overrides=["model.dtype=bfloat16"])
  with pytest.raises(ConfigError, match="step=3"):
    flaxlm.load(saved / "exported", step=3)
  with pytest.raises(ConfigError, match="step"):
    flaxlm.load(f"{saved}/run/checkpoints/7", step=3)


def test_what_is_no_model_is_refused(saved, tmp_path):
  with pytest.raises(MissingInputError, match="holds no model"):
    flaxlm.load(tmp_path / "nothing")
  (tmp_path / "config.json").write_text("[1, 2")
  with pytest.raises(DataError, match=r"config\.json"):
    flaxlm.load(tmp_path)
  shutil.copyfile(saved / "exported/config.json", tmp_path / "config.json")
  with pytest.raises(MissingInputError, match="weights"):
    flaxlm.load(tmp_path)


@pytest.mark.parametrize("damage", [None, b"{", b"\xff", b"[1]"])
def test_a_run_stays_a_run_whatever_became_of_its_config(saved, tmp_path, damage):
  shutil.copytree(saved / "run", tmp_path / "run")
  config = tmp_path / "run/config.json"
  if damage is None:
    config.unlink()
    assert find_model(tmp_path / "run").config.data.seq_len == 32
    return
  config.write_bytes(damage)
  with pytest.raises(DataError, match="not the config that its checkpoints") as caught:
    find_model(tmp_path / "run")
  assert "remove config.json" in str(caught.value)


def test_all_end_tokens_of_a_model_end_its_texts(saved, tmp_path):
  shutil.copytree(saved / "exported", tmp_path / "model")
  file = tmp_path / "model/generation_config.json"
  file.write_text(json.dumps({"eos_token_id": [2, 6, 5]}))
  (tmp_path / "model/MANIFEST.json").unlink(missing_ok=True)
  assert set(flaxlm.load(tmp_path / "model").end_ids) == {2, 5, 6}
  import_model(tmp_path / "model", tmp_path / "run")
  assert set(flaxlm.load(tmp_path / "run").end_ids) == {2, 5, 6}
  config = load_run_config(saved / "run", [f"init_from={tmp_path}/run"])
  shutil.copytree(saved / "run", tmp_path / "tuned")
  RunFiles(tmp_path / "tuned").config.write_text(config_to_json(config))
  assert set(flaxlm.load(tmp_path / "tuned").end_ids) == {2, 5, 6}
  shutil.rmtree(tmp_path / "run")
  assert flaxlm.load(tmp_path / "tuned").end_ids == ()


def test_a_mesh_gives_the_same_numbers(saved):
  from flaxlm.parallel.mesh import make_mesh

  one = flaxlm.load(saved / "run")
  mesh = make_mesh(jax.devices()[:4], data=1, fsdp=2, tensor=2)
  for name in ("run", "exported"):
    many = flaxlm.load(saved / name, mesh=mesh)
    ids = one.encode("import sys")
    np.testing.assert_allclose(many.logits(ids), one.logits(ids), atol=1e-5)
