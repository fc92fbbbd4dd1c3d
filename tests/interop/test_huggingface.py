"""Ours = Hugging Face: random small models of every family, round trip.

transformers makes a model. We import it and compute the same features, scores and loss
on a batch with a whole row, a right-padded, a left-padded and a packed one. We export
it; transformers loads that without a warning and computes the same. We import that
again, and every bit is the same.
"""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.interop import huggingface as hf
from flaxlm.interop.hf_config import choose_family, find_family
from flaxlm.interop.hf_fields import flatten_fields
from flaxlm.interop.safetensors_files import read_safetensors
from flaxlm.models.heads import label_scores
from flaxlm.training.losses import losses

torch = pytest.importorskip("torch", reason="parity needs torch: the extra `parity`")
transformers = pytest.importorskip(
  "transformers", reason="parity needs transformers: the extra `parity`"
)
torch.set_num_threads(1)
VOCAB, LENGTH, CLASSES = 97, 28, 3
COMMON = {
  "vocab_size": VOCAB,
  "hidden_size": 32,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
HALF = {"head_dim": 12}  # heads * head_dim is not the width
BERT_HEADS = {
  "Model": {},
  "ForPreTraining": {},
  "ForMaskedLM": {},
  "ForSequenceClassification": {"num_labels": CLASSES},
  "ForTokenClassification": {"num_labels": CLASSES},
  "ForQuestionAnswering": {},
  "ForMultipleChoice": {},
}
GPT2 = {
  "vocab_size": VOCAB,
  "n_embd": 32,
  "n_head": 4,
  "n_layer": 3,
  "n_positions": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
}


def rope(kind, theta=10_000.0, **more):
  return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = rope(
  "llama3",
  factor=8.0,
  low_freq_factor=1.5,
  high_freq_factor=5.0,
  original_max_position_embeddings=40,
)
# The slowest pair rotates more often than beta_slow, so the ramp ends past the pairs.
YARN = rope("yarn", theta=100.0, factor=4.0, original_max_position_embeddings=1024)
YARN_FULL = rope(
  "yarn",
  factor=8.0,
  original_max_position_embeddings=16,
  beta_fast=8.0,
  beta_slow=2.0,
  attention_factor=1.3,
)
GEMMA3_ROPE = {
  "rope_parameters": {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
  }
}
# name: (prefix of the classes, model class, config keys)
CASES = {
  "gpt2": ("GPT2", "LMHeadModel", GPT2),
  "gpt2-wide": ("GPT2", "LMHeadModel", GPT2 | {"n_inner": 40}),
  "llama": ("Llama", "ForCausalLM", GROUPED),
  "llama-tied-llama3": (
    "Llama",
    "ForCausalLM",
    GROUPED | LLAMA3 | HALF | {"tie_word_embeddings": True},
  ),
  "llama-biases-linear": (
    "Llama",
    "ForCausalLM",
    GROUPED | rope("linear", factor=2.0) | {"attention_bias": True, "mlp_bias": True},
  ),
  "llama-yarn": ("Llama", "ForCausalLM", GROUPED | YARN),
  "qwen2": ("Qwen2", "ForCausalLM", GROUPED | YARN_FULL),
  "qwen2-window": (
    "Qwen2",
    "ForCausalLM",
    GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen3": ("Qwen3", "ForCausalLM", GROUPED | HALF),
  "mistral": ("Mistral", "ForCausalLM", GROUPED | {"sliding_window": 5}),
  "mistral-no-window": (
    "Mistral",
    "ForCausalLM",
    GROUPED | HALF | {"sliding_window": None},
  ),
  "gemma2": (
    "Gemma2",
    "ForCausalLM",
    GROUPED | HALF | {"sliding_window": 5, "query_pre_attn_scalar": 20},
  ),
  "gemma3": (
    "Gemma3Text/Gemma3",
    "ForCausalLM",
    GROUPED | HALF | GEMMA3_ROPE | {"sliding_window": 5, "sliding_window_pattern": 3},
  ),
  "olmo2": ("Olmo2", "ForCausalLM", GROUPED),
  "mixtral": (
    "Mixtral",
    "ForCausalLM",
    GROUPED | {"num_local_experts": 5, "sliding_window": 5},
  ),
  "qwen3_moe": (
    "Qwen3Moe",
    "ForCausalLM",
    GROUPED
    | EXPERTS
    | HALF
    | {"moe_intermediate_size": 16, "norm_topk_prob": True, "mlp_only_layers": [0]},
  ),
  "qwen2_moe": (
    "Qwen2Moe",
    "ForCausalLM",
    GROUPED
    | EXPERTS
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
  ),
  "olmoe": ("Olmoe", "ForCausalLM", GROUPED | EXPERTS),
  **{
    f"bert-{name}": ("Bert", name, COMMON | more) for name, more in BERT_HEADS.items()
  },
  **{
    f"modernbert-{name}": (
      "ModernBert",
      name,
      COMMON | {"local_attention": 8, "num_hidden_layers": 4} | more,
    )
    for name, more in BERT_HEADS.items()
    if name != "ForPreTraining"
  },
  "bert-relu": ("Bert", "ForMaskedLM", COMMON | {"hidden_act": "relu"}),
  "bert-gelu_new": ("Bert", "Model", COMMON | {"hidden_act": "gelu_new"}),
  "modernbert-mean-biases": (
    "ModernBert",
    "ForSequenceClassification",
    COMMON
    | {"num_labels": CLASSES, "local_attention": 9, "classifier_pooling": "mean"}
    | {"global_attn_every_n_layers": 2, "classifier_activation": "silu"}
    | {"attention_bias": True, "mlp_bias": True, "norm_bias": True}
    | {"classifier_bias": True},
  ),
}


class Pair(NamedTuple):
  theirs: object  # their model
  ours: object
  imported: hf.Imported
  directory: object


def randomize(model) -> None:
  """Draws weights that make every part of the model matter, even norms and biases."""
  torch.manual_seed(0)
  gemma = "gemma" in model.config.model_type
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim > 1:
        weight.normal_(0, 0.25)
      else:
        weight.normal_(0, 0.3)
        is_scale = "norm" in name.lower() or "ln_" in name
        weight += is_scale and name.endswith("weight") and not gemma


def make(name: str):
  prefix, suffix, keys = CASES[name]
  config_prefix, _, model_prefix = prefix.partition("/")
  if prefix == "ModernBert":
    keys = keys | {"cls_token_id": 1, "sep_token_id": 2}
  config = getattr(transformers, f"{config_prefix}Config")(**keys)
  # Eager attention is their definition; the faster kinds ignore soft caps.
  config._attn_implementation = "eager"
  model = getattr(transformers, (model_prefix or config_prefix) + suffix)(config)
  randomize(model)
  return model.eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """Returns a function from the name of a case to its models, made once."""

  @functools.cache
  def pair(name: str) -> Pair:
    directory = tmp_path_factory.mktemp(name)
    theirs = make(name)
    theirs.save_pretrained(directory)
    imported = hf.read_model(directory)
    ours = hf.make_model(imported.fields, imported.leaves)
    return Pair(theirs, ours, imported, directory)

  return pair


FIRST, SECOND = 11, 13  # lengths of the packed documents


def make_batch() -> dict[str, np.ndarray]:
  """Four rows: whole, right-padded, left-padded, two documents packed."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, VOCAB, (4, LENGTH))
  segments = np.ones((4, LENGTH), int)
  segments[1, 20:], segments[2, :9] = 0, 0
  segments[3, FIRST : FIRST + SECOND], segments[3, FIRST + SECOND :] = 2, 0
  positions = np.maximum(np.cumsum(segments > 0, axis=1) - 1, 0)
  positions[3, FIRST : FIRST + SECOND] -= FIRST
  types = rng.integers(0, 2, (4, LENGTH))
  arrays = {
    "tokens": np.where(segments > 0, tokens, 0),
    "segment_ids": segments,
    "positions": np.where(segments > 0, positions, 0),
    "token_types": np.where(segments > 0, types, 0),
  }
  return {key: array.astype(np.int32) for key, array in arrays.items()}


BATCH = make_batch()
# Each document as (row, columns); those of row 3 share one row of our batch.
DOCUMENTS = [
  (0, slice(0, LENGTH)),
  (1, slice(0, LENGTH)),
  (2, slice(0, LENGTH)),
  (3, slice(0, FIRST)),
  (3, slice(FIRST, FIRST + SECOND)),
]


def their_inputs(model, row: int, columns: slice) -> dict:
  cut = {
    key: torch.tensor(a[row : row + 1, columns]).long() for key, a in BATCH.items()
  }
  inputs = {
    "input_ids": cut["tokens"],
    "attention_mask": (cut["segment_ids"] > 0).long(),
    "position_ids": cut["positions"],
  }
  if model.config.model_type == "bert":
    inputs["token_type_ids"] = cut["token_types"]
  if type(model).__name__.endswith("MultipleChoice"):  # one choice
    inputs = {key: value[:, None] for key, value in inputs.items()}
  return inputs


def run_theirs(model, row: int, columns: slice, **more):
  with torch.no_grad():
    return model(**their_inputs(model, row, columns), output_hidden_states=True, **more)


def batch_for(model) -> dict[str, jax.Array]:
  batch = dict(BATCH)
  if not model.config.num_segment_types:
    del batch["token_types"]
  return {key: jnp.asarray(array) for key, array in batch.items()}


def run_ours(model):
  @jax.jit
  def run(model, batch):
    out = model(
      batch["tokens"],
      batch["positions"],
      batch["segment_ids"],
      token_types_BL=batch.get("token_types"),
    )
    in_vocabulary = model.config.head in ("lm", "mlm")
    return out.features, model.logits(out.features) if in_vocabulary else None

  return run(model, batch_for(model))


def assert_near(ours, theirs, what: str) -> None:
  """Asserts equality to 1e-4 of the largest value."""
  theirs = np.asarray(theirs)
  error = np.abs(np.asarray(ours) - theirs).max()
  assert error <= 1e-4 * np.abs(theirs).max(), (what, error, np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_features_and_scores_of_words(name, pairs):
  pair = pairs(name)
  features_BLD, logits_BLV = run_ours(pair.ours)
  for row, columns in DOCUMENTS:
    out = run_theirs(pair.theirs, row, columns)
    real = BATCH["segment_ids"][row, columns] > 0
    assert_near(
      features_BLD[row, columns][real], out.hidden_states[-1][0][real], "features"
    )
    if logits_BLV is not None:
      theirs = out.prediction_logits if "PreTraining" in name else out.logits
      assert_near(logits_BLV[row, columns][real], theirs[0][real], "logits")


UNLABELLED = ("Model", "ForMaskedLM", "ForPreTraining")


@pytest.mark.parametrize(
  "name", [n for n, case in CASES.items() if "bert" in n and case[1] not in UNLABELLED]
)
def test_scores_of_labels(name, pairs):
  pair = pairs(name)
  batch = batch_for(pair.ours) | {"starts": jnp.array([[0], [0], [9], [0]])}
  features_BLD, _ = run_ours(pair.ours)
  scores_BRC = np.asarray(label_scores(pair.ours, features_BLD, batch))
  for row, columns in DOCUMENTS[:4]:  # the second in a packed row has none
    out = run_theirs(pair.theirs, row, columns)
    real = BATCH["segment_ids"][row, columns] == 1
    if "Question" in name:
      theirs = torch.stack([out.start_logits[0], out.end_logits[0]])[:, real]
      assert_near(scores_BRC[row][:, columns][:, real], theirs, "spans")
    elif "Token" in name:
      assert_near(scores_BRC[row, columns][real], out.logits[0][real], "tokens")
    elif row != 2 or "mean" in name or name == "modernbert-ForMultipleChoice":
      # transformers' other heads use the first column, which is padding there.
      assert_near(scores_BRC[row, 0], out.logits[0], "classes")


def test_scores_of_sentence_pairs(pairs):
  pair = pairs("bert-ForPreTraining")
  features_BLD, _ = run_ours(pair.ours)
  head = pair.ours.pair_head
  scores_BC = head.classify(head.transform(features_BLD[:, 0]))
  for row in (0, 1):
    out = run_theirs(pair.theirs, *DOCUMENTS[row])
    assert_near(scores_BC[row], out.seq_relationship_logits[0], "pairs")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "bert-ForMaskedLM"])
def test_loss(name, pairs):
  """Returns the mean loss that transformers computes from the labels of one row."""
  pair = pairs(name)
  tokens = BATCH["tokens"]
  targets = np.full_like(tokens, -1)
  if pair.ours.config.causal:
    same = BATCH["segment_ids"][:, 1:] == BATCH["segment_ids"][:, :-1]
    real = same & (BATCH["segment_ids"][:, 1:] > 0)
    targets[:, :-1] = np.where(real, tokens[:, 1:], -1)
  else:
    targets[:, 3::5] = np.where(BATCH["segment_ids"] > 0, tokens, -1)[:, 3::5]
  batch = batch_for(pair.ours) | {"targets": jnp.asarray(targets)}
  result = jax.jit(losses)(pair.ours, batch)
  for row, columns in DOCUMENTS[:3]:
    wanted = targets[row, columns]
    if pair.ours.config.causal:  # transformers shifts them itself
      wanted = np.concatenate([[-1], wanted[:-1]])
    labels = torch.tensor(np.where(wanted >= 0, wanted, -100)).long()[None]
    theirs = run_theirs(pair.theirs, row, columns, labels=labels).loss
    ours = result.nats[row].sum() / result.predicted[row].sum()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, pairs, tmp_path):
  pair = pairs(name)
  fields, leaves = pair.imported.fields, pair.imported.leaves
  config = hf.write_model(tmp_path, fields, leaves, max_shard=40_000)
  assert (tmp_path / "model.safetensors.index.json").is_file()
  theirs, info = type(pair.theirs).from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  assert not any(info.values()), info
  for (key, a), (other, b) in zip(
    theirs.state_dict().items(), pair.theirs.state_dict().items(), strict=True
  ):
    assert key == other and torch.equal(a, b), key
  before, after = (run_theirs(m, *DOCUMENTS[1])[0] for m in (pair.theirs, theirs))
  np.testing.assert_allclose(after, before, atol=1e-6, rtol=1e-6)  # the config, too
  again = hf.read_model(tmp_path)
  assert again.fields == fields and again.config == config
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(again.leaves[path], leaf)


def resave(pair: Pair, directory, change, **config_changes):
  """Writes a .bin checkpoint of a pair, with its tensors changed by `change`."""
  tensors = {
    name: torch.tensor(np.array(tensor.read(), np.float32))
    for name, tensor in read_safetensors(pair.directory / "model.safetensors").items()
  }
  torch.save(change(tensors), directory / "pytorch_model.bin")
  config = json.loads((pair.directory / "config.json").read_text()) | config_changes
  (directory / "config.json").write_text(json.dumps(config))
  return directory


def assert_same(imported: hf.Imported, expected: hf.Imported) -> None:
  assert imported.fields == expected.fields
  for path, leaf in expected.leaves.items():
    np.testing.assert_array_equal(imported.leaves[path], leaf)


def renamed(*pairs):
  def change(tensors):
    for old, new in pairs:
      tensors = {name.replace(old, new): t for name, t in tensors.items()}
    return tensors

  return change


def with_buffers(tensors):
  """GPT-2 as in its first checkpoints: no prefix, masks, an output matrix."""
  tensors = {n.removeprefix("transformer."): t for n, t in tensors.items()}
  mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
  old = {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
  return tensors | mask | old | {"lm_head.weight": tensors["wte.weight"]}


def fuse_experts(tensors):
  fused = dict(tensors)
  for layer in range(3):
    stem = f"model.layers.{layer}.block_sparse_moe."
    expert = [{k: fused.pop(f"{stem}experts.{e}.w{k}.weight") for k in (1, 2, 3)}
              for e in range(5)]  # fmt: skip
    stem = stem.replace("block_sparse_moe", "mlp")
    both = [torch.cat([w[1], w[3]]) for w in expert]
    fused[f"{stem}experts.gate_up_proj"] = torch.stack(both)
    fused[f"{stem}experts.down_proj"] = torch.stack([w[2] for w in expert])
  return renamed((".block_sparse_moe.gate.", ".mlp.gate."))(fused)


def with_decoder(tensors):
  """BERT as in old files: gamma and beta, tied weights twice, buffers."""
  tensors = renamed(
    ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
  )(tensors)
  words = tensors["bert.embeddings.word_embeddings.weight"]
  return tensors | {
    "cls.predictions.decoder.weight": words,
    "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    "bert.embeddings.position_ids": torch.arange(64)[None],
  }


OLD = {
  "gpt2": with_buffers,
  "mixtral": fuse_experts,
  "bert-ForMaskedLM": with_decoder,
  "bert-ForSequenceClassification": lambda t: t,
  "llama": lambda t: (
    t | {"model.layers.0.self_attn.rotary_emb.inv_freq": t["lm_head.weight"]}
  ),
  "llama-tied-llama3": renamed(("model.embed_tokens.weight", "lm_head.weight")),
}


@pytest.mark.parametrize("name", OLD)
def test_older_spellings_of_weights(name, pairs, tmp_path):
  pair = pairs(name)
  imported = hf.read_model(resave(pair, tmp_path, OLD[name]))
  assert_same(imported, pair.imported)
  assert imported.left_out == []  # buffers and equal copies are no loss


@pytest.mark.parametrize("old", [False, True])
def test_the_text_part_of_gemma3(old, pairs, tmp_path):
  pair = pairs("gemma3")
  vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
  config = transformers.Gemma3Config(
    text_config=pair.theirs.config.to_dict(),
    vision_config=vision,
    mm_tokens_per_image=4,
    image_token_index=5,
  )
  whole = transformers.Gemma3ForConditionalGeneration(config)
  whole.model.language_model.load_state_dict(pair.theirs.model.state_dict())
  whole.save_pretrained(tmp_path)
  if old:  # as transformers 4 wrote them, and as on the hub
    tensors = read_safetensors(tmp_path / "model.safetensors")
    arrays = {n: torch.tensor(np.array(t.read())) for n, t in tensors.items()}
    arrays = renamed(
      ("model.language_model.", "language_model.model."),
      ("model.vision_tower.", "vision_tower."),
      ("model.multi_modal_projector.", "multi_modal_projector."),
    )(arrays)
    torch.save(arrays, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
  imported = hf.read_model(tmp_path)
  assert_same(imported, pair.imported)
  assert imported.left_out and all("language" not in n for n in imported.left_out)
  out = tmp_path / "out"
  out.mkdir()
  like = imported.config
  assert (
    hf.write_model(out, imported.fields, imported.leaves, like=like)["model_type"]
    == "gemma3_text"
  )


def test_a_leftover_head_is_named_and_what_the_architecture_lacks_is_not_guessed(
  pairs, tmp_path
):
  pair = pairs("bert-ForPreTraining")
  name = "BertForTokenClassification"
  with pytest.raises(DataError, match=r"missing: classifier.weight, classifier.bias"):
    hf.read_model(resave(pair, tmp_path, dict, architectures=[name]))
  # BertForMaskedLM with all tensors of BertForPreTraining is read as the latter:
  # bert-base-uncased.
  both = hf.read_model(resave(pair, tmp_path, dict, architectures=["BertForMaskedLM"]))
  assert_same(both, pair.imported)
  drop = lambda t: {n: x for n, x in t.items() if "relationship" not in n}  # noqa: E731
  alone = hf.read_model(resave(pair, tmp_path, drop, architectures=["BertForMaskedLM"]))
  assert alone.fields["head"] == "mlm" and not alone.fields["pair_head"]
  pooler = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
  assert sorted(alone.left_out) == sorted(pooler)
  # Without a name, the tensors decide.
  bare = {
    n.removeprefix("bert."): t for n, t in make("bert-Model").state_dict().items()
  }
  found = hf.read_model(resave(pair, tmp_path, lambda _: bare, architectures=None))
  assert found.fields["head"] == "sequence" and found.fields["num_labels"] == 0


def broken(tensors):
  tensors = dict(tensors)
  del tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 32)
  tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
  return tensors


def test_missing_unknown_and_misshapen_tensors_are_listed(pairs, tmp_path):
  directory = resave(pairs("llama"), tmp_path, broken)
  with pytest.raises(DataError) as error:
    hf.read_model(directory)
  _, *lines = str(error.value).splitlines()
  assert lines == [
    "  missing: model.layers.1.mlp.up_proj.weight",
    "  unknown: model.layers.0.self_attn.q_proj.bias",
    "  wrong:   model.layers.0.mlp.up_proj.weight (7, 32) for (48, 32)",
  ]
  with pytest.raises(DataError) as error:  # only what was named is skipped
    hf.read_model(directory, skip=("q_proj",))
  assert "  unknown:" not in str(error.value) and "missing:" in str(error.value)
  many = resave(pairs("llama"), tmp_path, lambda t: {"x": t["lm_head.weight"]})
  with pytest.raises(DataError, match=r", \.\.\. 30 in all") as error:
    hf.read_model(many)
  assert len(str(error.value).splitlines()) <= 5


def test_quantized_or_differing_tied_tensors_are_refused(pairs, tmp_path):
  ints = lambda t: {n: (100 * x).to(torch.int8) for n, x in t.items()}  # noqa: E731
  with pytest.raises(DataError, match=r"lm_head.weight of int8"):
    hf.read_model(resave(pairs("llama"), tmp_path, ints))
  other = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}  # noqa: E731
  with pytest.raises(DataError, match=r"differ, and config\.json ties them"):
    hf.read_model(resave(pairs("llama-tied-llama3"), tmp_path, other))
  twice = lambda t: t | {"wte.weight": t["transformer.wte.weight"]}  # noqa: E731
  with pytest.raises(DataError, match=r"two tensors mean transformer\.wte"):
    hf.read_model(resave(pairs("gpt2"), tmp_path, twice))


@pytest.mark.faults
def test_directories_without_a_model(pairs, tmp_path):
  with pytest.raises(MissingInputError, match=r"config\.json does not exist"):
    hf.read_model(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(MissingInputError, match="holds no weights"):
    hf.read_model(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "t5"}')
  with pytest.raises(DataError, match=r"model_type=t5(.|\n)*gpt2 llama mistral"):
    hf.read_model(tmp_path)
  (tmp_path / "config.json").write_text("[1")
  with pytest.raises(DataError, match="cannot be read"):
    hf.read_model(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_16_bits(dtype, pairs, tmp_path):
  pair = pairs("qwen2")
  like = pair.imported.config | {"eos_token_id": [2, 5], "auto_map": {"a": "b"}}
  hf.write_model(tmp_path, pair.imported.fields, pair.imported.leaves, dtype, like)
  theirs = type(pair.theirs).from_pretrained(tmp_path)
  assert theirs.dtype == getattr(torch, dtype) and theirs.config.eos_token_id == [2, 5]
  assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
  for name, weight in pair.theirs.state_dict().items():
    assert torch.equal(theirs.state_dict()[name], weight.to(theirs.dtype)), name
  again = hf.read_model(tmp_path).leaves["blocks/mlp/up"]
  half = torch.tensor(pair.imported.leaves["blocks/mlp/up"]).to(theirs.dtype)
  np.testing.assert_array_equal(again, half.float().numpy())
  leaves = pair.imported.leaves | {"embed": pair.imported.leaves["embed"] * 1e6}
  if dtype == "float16":
    with pytest.raises(DataError, match="too large for float16"):
      hf.write_model(tmp_path, pair.imported.fields, leaves, dtype)


class Once(dict):
  """Returns each value only once."""

  def __getitem__(self, key):
    return self.pop(key)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "modernbert-ForMaskedLM"])
def test_each_weight_is_read_once(name, pairs, tmp_path):
  pair = pairs(name)
  leaves = Once(pair.imported.leaves)
  hf.write_model(tmp_path, pair.imported.fields, leaves)
  assert not leaves
  assert_same(hf.read_model(tmp_path), pair.imported)


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("llama", {"qk_norm": "head", "norm_placement": "post"}, "norm_placement=post"),
    ("qwen3_moe", {"moe.router": "sigmoid"}, "moe.router=sigmoid"),
    ("bert-ForMaskedLM", {"causal": True}, "causal=True"),
  ],
)
def test_what_no_family_computes_is_not_exported(name, change, message, pairs):
  fields = flatten_fields(pairs(name).imported.fields) | change
  with pytest.raises(ConfigError, match=message):
    choose_family(fields, find_family(pairs(name).theirs.config.model_type).model_type)


def test_the_family_is_found_by_what_is_computed(pairs):
  """No hint is needed. Mistral without a window is Llama, and exports as Llama."""
  same = {"mistral-no-window": "llama", "gpt2-wide": "gpt2", "qwen2-window": "qwen2"}
  for name, model_type in same.items():
    fields = flatten_fields(pairs(name).imported.fields)
    assert choose_family(fields)[0].model_type == model_type
    hinted = choose_family(fields, pairs(name).theirs.config.model_type)[0].model_type
    assert hinted == pairs(name).theirs.config.model_type
