"""To and from Hugging Face: a directory becomes a run at step 0, and the reverse."""

import json
import pathlib
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from flaxlm import convert
from flaxlm.config.load import config_to_json
from flaxlm.errors import (
  ConfigError,
  DataError,
  MissingInputError,
  OutputError,
  StorageError,
)
from flaxlm.interop import huggingface as hf
from flaxlm.interop import import_run
from flaxlm.interop.hf_config import find_family, read_config, write_config
from flaxlm.interop.hf_fields import flatten_fields
from flaxlm.interop.safetensors_files import read_safetensors, write_safetensors
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.models.trees import named_leaves, nest
from flaxlm.runs import weights
from flaxlm.runs.directory import load_run_config
from flaxlm.tokenizer.sentencepiece import Tokenizer, train_tokenizer
from flaxlm.training import lora
from flaxlm.training.checkpoint import Checkpointer

TEXT = [f"some words, and {n} more" for n in range(40)]
AWKWARD = ["  leading", "a  b", "emoji \U0001f9ea\n\n\ttab", "\u4f60\u597d", "<s> </s>"]


@pytest.fixture(scope="module")
def sentencepiece() -> bytes:
  return train_tokenizer(TEXT, "bpe", 310)


@pytest.fixture
def model_config(tiny):
  tiny.model.vocab_size = 320
  return tiny


def random_leaves(model_config, seed=0) -> dict[str, np.ndarray]:
  fields = model_config.model.to_dict()
  rng = np.random.default_rng(seed)
  return {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in hf.weight_shapes(fields).items()
  }


def save_run(workdir, config, leaves, name="model", tokenizer=None, step=3):
  """A run directory with what other commands read of one that `train` wrote."""
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(config_to_json(config))
  if tokenizer:
    (workdir / "tokenizer.model").write_bytes(tokenizer)
  sha256 = Tokenizer(tokenizer).sha256 if tokenizer else ""
  meta = {"step": step, "tokenizer_sha256": sha256, "data_fingerprint": "x"}
  arrays = {path: jax.numpy.asarray(leaf) for path, leaf in leaves.items()}
  with Checkpointer(workdir / "checkpoints", **config.checkpoint) as checkpoints:
    checkpoints.save(step, {name: nest(arrays)}, meta)
  return workdir


def make_source(directory, config, leaves, tokenizer, **more) -> pathlib.Path:
  """A directory like one from the hub: weights, config, a SentencePiece tokenizer."""
  directory.mkdir()
  hf.write_model(directory, config.model.to_dict(), leaves, like=more)
  (directory / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
  (directory / "tokenizer.model").write_bytes(tokenizer)
  return directory


def run_import(source, workdir, *more):
  convert.main(["import", f"--from={source}", f"--workdir={workdir}", *more])


def run_export(workdir, out, *more):
  convert.main(["export", f"--workdir={workdir}", f"--to={out}", *more])


def restore(workdir, one_device):
  config = load_run_config(workdir)
  rules = config.mesh.rules.to_dict()
  model, meta = weights.restore_model(workdir, config, one_device, rules)
  return config, named_leaves(model), meta


def test_in_and_out(model_config, sentencepiece, tmp_path, one_device, capsys):
  leaves = random_leaves(model_config)
  more = {"eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": None}
  source = make_source(tmp_path / "hub", model_config, leaves, sentencepiece, **more)
  workdir = tmp_path / "run"
  for name in ("run", "out"):  # what killed calls left
    (tmp_path / f"{name}.unfinished" / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / f"{name}.unfinished" / ".draft.lock").write_text("")
  run_import(source, workdir)
  assert "imported llama" in capsys.readouterr().out
  assert {".draft.lock", "checkpoints/0.unfinished"}.isdisjoint(
    str(path.relative_to(workdir)) for path in workdir.rglob("*")
  )
  config, found, meta = restore(workdir, one_device)
  assert (meta["step"], meta["tokens"]) == (0, 0)
  assert meta["tokenizer_sha256"] == Tokenizer(sentencepiece).sha256
  assert meta["config"] == json.loads(config_to_json(config))
  assert (workdir / "tokenizer.model").read_bytes() == sentencepiece
  for key, value in model_config.model.items():
    if key not in ("rope", "moe", "max_len"):
      assert config.model[key] == value, key
  assert found.keys() == leaves.keys()
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(found[path], leaf)

  out = tmp_path / "out"
  run_export(workdir, out, "--dtype=bfloat16")
  written = json.loads((out / "config.json").read_text())
  assert {key: written[key] for key in more} == more
  assert written["dtype"] == "bfloat16"
  for name in ("generation_config.json", "tokenizer.model"):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in out.iterdir()}
  again = hf.read_model(out)
  for path, leaf in leaves.items():
    half = leaf.astype(hf.EXPORT_DTYPES["bfloat16"]).astype(np.float32)
    np.testing.assert_array_equal(again.leaves[path], half)

  kept = workdir / "huggingface/generation_config.json"
  kept.write_text(kept.read_text().replace("7", "8"))
  with pytest.raises(DataError, match=r"huggingface/generation_config\.json is not"):
    run_export(workdir, tmp_path / "other")


def test_files_of_a_tokenizer_that_is_still_theirs_are_copied(
  model_config, sentencepiece, tmp_path
):
  leaves = random_leaves(model_config)
  source = make_source(tmp_path / "hub", model_config, leaves, sentencepiece)
  run_import(source, tmp_path / "first")
  run_export(tmp_path / "first", tmp_path / "second")  # has a tokenizer.json, too
  (tmp_path / "second" / "special_tokens_map.json").write_text("{}")
  run_import(tmp_path / "second", tmp_path / "run")
  # A run that starts from the import, as its config says, inherits the originals.
  config = load_run_config(tmp_path / "run")
  config.init_from = str(tmp_path / "run")
  save_run(tmp_path / "tuned", config, leaves, tokenizer=sentencepiece)
  (tmp_path / "tuned" / "chat_template.jinja").write_text("{{ messages }}")
  run_export(tmp_path / "tuned", tmp_path / "out")
  names = {path.name for path in (tmp_path / "second").iterdir()}
  out = {path.name for path in (tmp_path / "out").iterdir()}
  assert out == names | {"chat_template.jinja"}
  for name in import_run.TOKENIZER_FILES:
    if name in names:
      content = (tmp_path / "second" / name).read_bytes()
      assert (tmp_path / "out" / name).read_bytes() == content


def test_another_tokenizer_than_the_original_is_what_is_exported(
  model_config, sentencepiece, tmp_path
):
  leaves = random_leaves(model_config)
  source = make_source(tmp_path / "hub", model_config, leaves, sentencepiece)
  run_import(source, tmp_path / "first")
  run_export(tmp_path / "first", tmp_path / "second")
  run_import(tmp_path / "second", tmp_path / "third")
  other = train_tokenizer(TEXT[:30], "bpe", 300)
  config = load_run_config(tmp_path / "third")
  config.init_from = str(tmp_path / "third")
  save_run(tmp_path / "run", config, leaves, tokenizer=other)
  run_export(tmp_path / "run", tmp_path / "out")
  assert (tmp_path / "out" / "tokenizer.model").read_bytes() == other
  whole = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
  assert len(whole["model"]["vocab"]) == 300


@pytest.mark.parametrize("encoder", [False, True])
def test_a_run_of_ours_loads_in_transformers(
  encoder, model_config, sentencepiece, tmp_path
):
  transformers = pytest.importorskip("transformers", reason="needs transformers")
  torch = pytest.importorskip("torch", reason="needs torch")
  model = model_config.model
  if encoder:
    model.update(causal=False, positions="learned", norm="layernorm", head="sequence")
    model.update(norm_placement="residual", embedding_norm=True, num_segment_types=2)
    model.update(gated_mlp=False, activation="gelu", use_bias=True, num_kv_heads=4)
    model.update(num_labels=3, head_activation="tanh")
    model_config.task.kind, model_config.task.path = "classify", "x.csv"
    model_config.task.labels = ("bad", "fair", "good")
  leaves = random_leaves(model_config)
  save_run(tmp_path / "run", model_config, leaves, tokenizer=sentencepiece)
  run_export(tmp_path / "run", tmp_path / "out")
  auto = transformers.AutoModelForSequenceClassification if encoder else (
    transformers.AutoModelForCausalLM
  )  # fmt: skip
  theirs, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(info.values()), info
  own = Tokenizer(sentencepiece)
  assert theirs.config.pad_token_id == own.pad_id
  if encoder:
    assert theirs.config.id2label == {0: "bad", 1: "fair", 2: "good"}
  else:
    assert theirs.generation_config.eos_token_id == own.eos_id
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  for text in AWKWARD[:-1]:
    assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
  ids = torch.tensor([[own.bos_id, *own.encode(TEXT[0])]])
  with torch.no_grad():
    logits = theirs(ids).logits.numpy()
  ours = hf.make_model(model.to_dict(), leaves)
  shape = ids.shape
  batch = [ids.numpy(), np.arange(shape[1])[None], np.ones(shape, np.int32)]
  features = ours(*map(jax.numpy.asarray, batch)).features
  if encoder:
    scores = ours.head.classify(ours.head.transform(features[:, 0]))
  else:
    scores = ours.logits(features)
  np.testing.assert_allclose(scores, logits, atol=1e-4 * np.abs(logits).max())


def test_averages_and_adapters_are_what_is_exported(model_config, tmp_path):
  leaves, average = random_leaves(model_config), random_leaves(model_config, 1)
  workdir = save_run(tmp_path / "base", model_config, leaves)
  model_config.step.ema_decay = 0.9
  save_run(tmp_path / "averaged", model_config, average, name="ema")
  run_export(tmp_path / "averaged", tmp_path / "out")
  found = hf.read_model(tmp_path / "out").leaves
  np.testing.assert_array_equal(found["embed"], average["embed"])

  model_config.step.ema_decay = 0.0
  model_config.lora.rank = 2
  model_config.init_from = str(workdir)
  base = hf.make_model(model_config.model.to_dict(), leaves)
  adapters = jax.tree.map(
    lambda x: x + 0.1, lora.init(base, **model_config.lora.to_dict())
  )
  save_run(tmp_path / "tuned", model_config, named_leaves(adapters))
  run_export(tmp_path / "tuned", tmp_path / "merged")
  found = hf.read_model(tmp_path / "merged").leaves
  merged = named_leaves(lora.merge(base, adapters, model_config.lora.alpha))
  assert not np.allclose(
    found["blocks/attention/query"], leaves["blocks/attention/query"]
  )
  for path, leaf in merged.items():
    np.testing.assert_allclose(found[path], leaf, atol=1e-6)


def test_what_is_in_the_way_is_not_touched(model_config, sentencepiece, tmp_path):
  leaves = random_leaves(model_config)
  source = make_source(tmp_path / "hub", model_config, leaves, sentencepiece)
  run_import(source, tmp_path / "run")
  with pytest.raises(OutputError, match="holds a run already"):
    run_import(source, tmp_path / "run")
  for name in ("out", "other.unfinished"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "note").write_text("mine")
  for name in ("out", "other"):
    with pytest.raises(OutputError, match="new or empty"):
      run_export(tmp_path / "run", tmp_path / name)
  (tmp_path / "empty").mkdir()
  run_export(tmp_path / "run", tmp_path / "empty")
  # A failure leaves nothing behind.
  with pytest.raises(MissingInputError, match="no checkpoint of step 8"):
    run_export(tmp_path / "run", tmp_path / "new", "--step=8")
  with pytest.raises(ConfigError, match="qwen3"):
    run_export(tmp_path / "run", tmp_path / "new", "--family=qwen3")
  with pytest.raises(ConfigError, match="--dtype cannot be used"):
    run_export(tmp_path / "run", tmp_path / "new", "--dtype=int8")
  (tmp_path / "half").mkdir()
  (tmp_path / "half" / "tokenizer_config.json").write_text("{}")
  with pytest.raises(MissingInputError, match=r"tokenizer_config(.|\n)*--no_tokenizer"):
    run_import(tmp_path / "half", tmp_path / "new")
  for out in ("out/note/x", "out/note"):  # below a file, and a file
    with pytest.raises(OutputError, match=r"--to=.* cannot be written"):
      run_export(tmp_path / "run", tmp_path / out)
    with pytest.raises(OutputError, match=r"--workdir=.* cannot be (written|used)"):
      run_import(source, tmp_path / out)
  assert not list(tmp_path.glob("new*"))
  assert (tmp_path / "out" / "note").read_text() == "mine"
  (tmp_path / "hub" / "model.safetensors").write_bytes(b"1234567890")
  with pytest.raises(DataError):
    run_import(source, tmp_path / "broken")
  assert not (tmp_path / "broken").exists()


def edit_config(source, **changes):
  file = source / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_class_and_other_heads_are_read_when_the_user_says_so(
  model_config, sentencepiece, tmp_path
):
  leaves = random_leaves(model_config)
  source = make_source(tmp_path / "hub", model_config, leaves, sentencepiece)
  edit_config(source, architectures=["AntiBERTy"])
  with pytest.raises(DataError, match=r"AntiBERTy(.|\n)*try: +--architecture=NAME"):
    hf.read_model(source)
  with pytest.raises(DataError, match=r"architectures=AntiBERTy2"):
    hf.read_model(source, architecture="AntiBERTy2")
  found = hf.read_model(source, architecture="LlamaForCausalLM")
  assert found.config["architectures"] == ["AntiBERTy"]
  arrays = {
    n: t.read() for n, t in read_safetensors(source / "model.safetensors").items()
  }
  arrays["species_head.weight"] = np.zeros((2, 2), np.float32)
  specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
  write_safetensors(source, specs, arrays.items())
  edit_config(source, architectures=["LlamaForCausalLM"])
  with pytest.raises(DataError, match=r"species_head.weight\n  try: +--skip=PATTERN"):
    hf.read_model(source)
  assert hf.read_model(source, skip=("species",)).left_out == ["species_head.weight"]


# What cannot be a number of layers, what no machine holds, and other JSON.
WRONG_SIZES = (0, -1, 10**9, 1e26, "many", [2], None, True)


@pytest.mark.faults
def test_sizes_that_the_files_do_not_have_are_refused_at_once(
  model_config, tmp_path, monkeypatch
):
  (tmp_path / "hub").mkdir()
  leaves = random_leaves(model_config)
  whole = hf.write_model(tmp_path / "hub", model_config.model.to_dict(), leaves)
  sizes = [k for k, value in whole.items() if type(value) is int and "_token_" not in k]
  assert len(sizes) > 6
  optional = ("num_key_value_heads", "head_dim", "intermediate_size")
  started = time.process_time()
  for key in sizes:
    for value in WRONG_SIZES:
      if key in optional and value in (0, None):
        continue  # the usual size
      if key == "max_position_embeddings" and value == 10**9:
        continue  # rotary positions have no weights
      edit_config(tmp_path / "hub", **whole | {key: value})
      with pytest.raises(DataError):
        hf.read_model(tmp_path / "hub")
  assert time.process_time() - started < 20
  edit_config(tmp_path / "hub", **whole)
  hf.read_model(tmp_path / "hub")
  monkeypatch.setattr(hf, "host_memory", lambda: 1000.0)
  with pytest.raises(StorageError, match="too large to read here"):
    hf.read_model(tmp_path / "hub")


LINEAR = {"rope_type": "linear"}


@pytest.mark.parametrize(
  ("key", "values"),
  [
    ("architectures", [5, "x", {}, [5], [[]]]),
    ("model_type", [5, None, [], {}]),
    ("text_config", [5, "x", [1]]),
    ("id2label", [5, [1], {"x": "y"}, {"0": 5}, {"9" * 40: "y"}]),
    ("rope_scaling", [5, "x", [1], {"rope_type": []}, LINEAR | {"factor": "x"},
                      {"rope_type": "yarn", "original_max_position_embeddings": 0}]),
    ("rope_parameters", [5, {"full_attention": 5}, {"rope_theta": []}]),
    ("hidden_act", [5, [], {}, None, "x"]),
    ("rms_norm_eps", ["x", [], -1, None]),
    ("tie_word_embeddings", [5, "yes", None]),
  ],
)  # fmt: skip
def test_values_of_another_kind_are_refused_by_their_key(key, values, model_config):
  family = find_family("llama")
  fields = flatten_fields(model_config.model.to_dict())
  whole = write_config(family, family.architectures[0], fields)
  for value in values:
    with pytest.raises(DataError):
      read_config(whole | {key: value}, [row.name for row in family.rows])


def test_a_damaged_checkpoint_is_not_exported(model_config, tmp_path):
  workdir = save_run(tmp_path / "run", model_config, random_leaves(model_config))
  for path in (workdir / "checkpoints" / "3" / "state").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
  with pytest.raises(ValueError, match="no checkpoint is whole"):
    run_export(workdir, tmp_path / "out")


def test_arguments(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match="--from cannot be used"):
    convert.main(["import", f"--workdir={tmp_path}"])
  with pytest.raises(ConfigError, match="--skip cannot be used"):
    convert.main(["import", "--from=x", f"--workdir={tmp_path}", "--skip=["])
  with pytest.raises(ConfigError, match="--to cannot be used"):
    convert.main(["export", f"--workdir={tmp_path}"])
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(MissingInputError, match="huggingface_hub is not installed"):
    run_import("someone/model", tmp_path / "run")
  with pytest.raises(MissingInputError, match="no such directory"):
    run_import(tmp_path / "absent", tmp_path / "run")


def test_a_model_of_the_hub_is_fetched(
  model_config, sentencepiece, tmp_path, monkeypatch
):
  leaves = random_leaves(model_config)
  source = make_source(tmp_path / "hub", model_config, leaves, sentencepiece)
  asked = []

  class Hub:
    @staticmethod
    def snapshot_download(name, allow_patterns):
      asked.append((name, allow_patterns))
      if name == "someone/absent":
        raise OSError("404 not\nfound")
      return str(source)

  monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
  run_import("someone/model", tmp_path / "run")
  assert asked[0][0] == "someone/model" and "*.safetensors" in asked[0][1]
  assert load_run_config(tmp_path / "run").model.vocab_size == 320
  with pytest.raises(MissingInputError, match="OSError: 404 not found"):
    run_import("someone/absent", tmp_path / "other")


def test_without_a_tokenizer(model_config, sentencepiece, tmp_path, capsys):
  leaves = random_leaves(model_config)
  source = make_source(tmp_path / "hub", model_config, leaves, sentencepiece)
  run_import(source, tmp_path / "run", "--no_tokenizer", "--config.data.seq_len=16")
  assert "no tokenizer was imported" in capsys.readouterr().out
  assert load_run_config(tmp_path / "run").data.seq_len == 16
  run_export(tmp_path / "run", tmp_path / "out")
  assert "the run has no tokenizer" in capsys.readouterr().out
  assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.mark.parametrize("head", ["sequence", "token", "span", "choice", "mlm", "bare"])
def test_every_head_makes_a_config_that_loads(head, model_config, tmp_path):
  model = model_config.model
  model.update(causal=False, positions="learned", norm="layernorm", use_bias=True)
  model.update(norm_placement="residual", embedding_norm=True, num_segment_types=2)
  model.update(gated_mlp=False, activation="gelu", num_kv_heads=4)
  model.head = "sequence" if head == "bare" else head
  model.num_labels = 2 if head in ("sequence", "token") else 0
  model.head_dense = head in ("sequence", "choice", "bare")
  model.pair_head = head == "mlm"
  model.head_activation = "tanh" if model.head_dense else "gelu"
  (tmp_path / "hub").mkdir()
  names = {"id2label": {"1": "good", "0": "bad"}} if model.num_labels else {}
  names |= {"problem_type": "multi_label_classification"} if head == "sequence" else {}
  leaves = random_leaves(model_config)
  hf.write_model(tmp_path / "hub", model.to_dict(), leaves, like=names)
  run_import(tmp_path / "hub", tmp_path / "run")
  config = load_run_config(tmp_path / "run")
  assert config.task.labels == (("bad", "good") if model.num_labels else ())
  loaded = config.model
  keys = ("head", "num_labels", "pair_head")
  keys += ("head_dense",) if head != "mlm" else ()
  keys += ("head_activation",) if model.head_dense else ()
  assert all(loaded[key] == model[key] for key in keys)
  abstract = jax.eval_shape(
    lambda: Transformer(TransformerConfig(**loaded), nnx.Rngs(0))
  )
  assert named_leaves(abstract).keys() == random_leaves(model_config).keys()
  if head != "sequence":
    return
  # What was fine-tuned from it here has one class per text, under the same names.
  config.init_from = str(tmp_path / "run")
  save_run(tmp_path / "tuned", config, leaves)
  for run, kind in (("run", "multi_label_classification"), ("tuned", None)):
    run_export(tmp_path / run, tmp_path / f"{run}_out")
    written = json.loads((tmp_path / f"{run}_out/config.json").read_text())
    assert written.get("problem_type") == kind
    assert written["id2label"] == {"0": "bad", "1": "good"}
    assert written["label2id"] == {"bad": 0, "good": 1}
