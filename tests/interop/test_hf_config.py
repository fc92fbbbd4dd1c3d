"""config.json from the hub is read as transformers reads it, or refused by name."""

import math

import pytest

from flaxlm.config.load import load_config
from flaxlm.errors import DataError
from flaxlm.interop import huggingface as hf
from flaxlm.interop.hf_config import (
  FAMILIES,
  choose_family,
  read_class_names,
  read_config,
  write_config,
)
from flaxlm.interop.hf_fields import canonical, flatten_fields, windows_of
from flaxlm.models.trees import nest

LLAMA = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "hidden_size": 64,
  "intermediate_size": 128,
  "max_position_embeddings": 256,
  "num_attention_heads": 4,
  "num_hidden_layers": 6,
  "vocab_size": 100,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
# Relevant keys of files on the hub, as transformers 4 and 5 wrote them. What these
# files omit is omitted here.
HUB = {
  "Llama-2-7b-hf": LLAMA
  | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
  },
  "Llama-3.2-1B": LLAMA
  | {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3 | {"factor": 32.0},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
  },
  "SmolLM2-135M": LLAMA
  | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
  },
  "Mistral-7B-v0.1": LLAMA
  | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "vocab_size": 32000,
  },
  "Qwen2.5-0.5B": LLAMA
  | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "Qwen3-30B-A3B": LLAMA
  | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 151936,
  },
  "Mixtral-8x7B-v0.1": LLAMA
  | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32000,
  },
  "gemma-2-2b": LLAMA
  | {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "vocab_size": 256000,
  },
  "gemma-3-4b-it": {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "text_config": {
      "hidden_size": 2560,
      "intermediate_size": 10240,
      "model_type": "gemma3_text",
      "num_hidden_layers": 34,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
  },
  "OLMo-2-1124-7B": LLAMA
  | {
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "vocab_size": 100352,
  },
  "bert-base-uncased": {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
  },
  "ModernBERT-base": {
    "model_type": "modernbert",
    "architectures": ["ModernBertForMaskedLM"],
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "position_embedding_type": "absolute",
    "vocab_size": 50368,
  },
}
# As published, or the sum over their files on the hub; for Gemma 3, the text model.
PARAMETERS = {
  "Llama-2-7b-hf": 6_738_415_616,
  "Llama-3.2-1B": 1_235_814_400,
  "SmolLM2-135M": 134_515_008,
  "Mistral-7B-v0.1": 7_241_732_096,
  "Qwen2.5-0.5B": 494_032_768,
  "Qwen3-30B-A3B": 30_532_122_624,
  "Mixtral-8x7B-v0.1": 46_702_792_704,
  "gemma-2-2b": 2_614_341_888,
  "gemma-3-4b-it": 3_880_263_168,
  "OLMo-2-1124-7B": 7_298_617_344,
  "bert-base-uncased": 109_514_298,
  "ModernBERT-base": 149_655_232,
}


def fields_of(config: dict) -> dict:
  """Returns our fields for a config file whose tensors fit its architecture."""
  for family in FAMILIES:
    if family.model_type == config["model_type"]:
      names = [
        row.name
        for architecture in family.architectures
        for row in architecture.rows
        if architecture.name in config["architectures"]
      ]
      return read_config(config, names)[2]
  raise AssertionError(config["model_type"])


@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub_have_the_published_number_of_parameters(name):
  shapes = hf.weight_shapes(nest(fields_of(HUB[name]), "."))
  assert sum(map(math.prod, shapes.values())) == PARAMETERS[name]


@pytest.mark.parametrize("name", HUB)
def test_what_is_written_reads_the_same(name):
  fields = fields_of(HUB[name])
  kind = HUB[name]["model_type"]
  family, architecture, config = choose_family(fields, kind)
  assert family.model_type == ("gemma3_text" if kind == "gemma3" else kind)
  assert canonical(fields_of(config)) == canonical(fields)
  # Each spelling works alone: the one of transformers 4 and the one of 5.
  old = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types")}
  assert canonical(fields_of(old)) == canonical(fields)
  former = ("rope_theta", "rope_scaling", "rope_local_base_freq", "local_rope_theta")
  former += (
    "global_rope_theta",
    "sliding_window_pattern",
    "global_attn_every_n_layers",
  )
  new = {k: v for k, v in config.items() if k not in former}
  assert canonical(fields_of(new)) == canonical(fields)
  assert write_config(family, architecture, fields) == config


def test_the_layers_of_gemma3_and_modernbert():
  gemma = fields_of(HUB["gemma-3-4b-it"])
  assert gemma["layer_pattern"] == ("local",) * 5 + ("global",)
  assert gemma["rope.theta"] == 1e6 and gemma["rope.local_theta"] == 1e4
  assert gemma["rope.scaling"] == "linear" and gemma["rope.factor"] == 8
  modern = fields_of(HUB["ModernBERT-base"])
  assert modern["layer_pattern"] == ("global", "local", "local")
  assert modern["sliding_window"] == 65  # 64 on each side, and the token itself


def test_layers_where_the_file_names_only_a_rule():
  windows = lambda name, **keys: windows_of(fields_of(HUB[name] | keys))  # noqa: E731
  assert windows("Mistral-7B-v0.1") == [4096] * 32
  assert windows("Mistral-7B-v0.1", sliding_window=None) == [0] * 32
  assert windows("Mixtral-8x7B-v0.1") == [0] * 32
  assert windows("gemma-2-2b") == [4096, 0] * 13
  assert windows("Qwen2.5-0.5B") == [0] * 24
  used = {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 9}
  assert windows("Qwen2.5-0.5B", **used) == [0] * 20 + [9] * 4
  assert windows("Qwen3-30B-A3B", **used) == [9] * 48
  assert windows("ModernBERT-base", global_attn_every_n_layers=2) == [0, 65] * 11


def test_every_spelling_of_rope():
  def rope(**keys):
    fields = fields_of(LLAMA | keys)
    return {key: value for key, value in fields.items() if key.startswith("rope.")}

  plain = rope()
  assert plain["rope.theta"] == 10_000 and plain["rope.scaling"] == "none"
  assert rope(rope_scaling={"rope_type": "default"}) == plain
  linear = rope(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5)
  assert linear["rope.factor"] == 2 and linear["rope.theta"] == 5e5
  new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
  assert rope(rope_parameters=new) == rope(rope_scaling=new) == linear
  assert rope(rope_parameters=new, rope_scaling=new | {"type": "linear"}) == linear
  kinds = {"full_attention": new, "sliding_attention": new}
  assert rope(rope_parameters=kinds) == linear
  yarn = rope(rope_scaling={"type": "yarn", "factor": 4.0})
  assert yarn["rope.original_max_len"] == 256 and yarn["rope.attention_factor"] == 0
  deepseek = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5}
  factor = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
  assert rope(rope_scaling=deepseek)["rope.attention_factor"] == pytest.approx(factor)


@pytest.mark.faults
@pytest.mark.parametrize(
  ("keys", "message"),
  [
    (
      {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
      r"dynamic(.|\n)*llama3 yarn",
    ),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_scaling": {"type": "linear"}}, "a factor"),
    ({"rope_scaling": LLAMA3 | {"beta": 3}}, "llama3: beta"),
    ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate"),
    (
      {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
      r"rope_theta(.|\n)*1000000.0 and 10000.0",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"hidden_act": "quick_gelu"}, "hidden_act"),
    ({"attention_bias": True}, "biases in only some places"),
    ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_attention_heads": 5}, "number of heads"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
    ({"vocab_size": "many"}, "vocab_size"),
  ],
)
def test_what_would_be_computed_otherwise_is_refused(keys, message):
  with pytest.raises(DataError, match=message) as error:
    fields_of(LLAMA | keys)
  assert len(str(error.value).splitlines()) <= 5


@pytest.mark.parametrize(
  ("name", "keys", "message"),
  [
    ("Qwen3-30B-A3B", {"mlp_only_layers": [2]}, "mlp_only_layers"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("Qwen3-30B-A3B", {"num_local_experts": 4}, "num_local_experts"),
    ("gemma-2-2b", {"use_bidirectional_attention": True}, "bidirectional"),
    ("gemma-2-2b", {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
    ("bert-base-uncased", {"is_decoder": True}, "is_decoder"),
    ("bert-base-uncased", {"position_embedding_type": "relative_key"}, "relative_key"),
    ("bert-base-uncased", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("ModernBERT-base", {"norm_bias": True}, "norm_bias=True"),
    ("ModernBERT-base", {"classifier_pooling": "max"}, "classifier_pooling"),
  ],
)
def test_what_a_family_cannot_be_is_refused(name, keys, message):
  with pytest.raises(DataError, match=message):
    fields_of(HUB[name] | keys)


TENTH = tuple(f"{i}." for i in range(11))  # 10 comes after 9, not after 1


@pytest.mark.parametrize(
  "keys, names",
  [
    ({}, ()),
    ({"id2label": {"1": "pos", "0": "neg"}}, ("neg", "pos")),
    ({"label2id": {"pos": 1, "neg": 0}}, ("neg", "pos")),
    # transformers' own names beside those of the model are no contradiction.
    ({"id2label": {"0": "b", "1": "a"}, "label2id": {"LABEL_0": 0}}, ("b", "a")),
    ({"id2label": {f"{i}": f"{i}." for i in (10, *range(10))}}, TENTH),
  ],
)  # fmt: skip
def test_classes_keep_the_numbers_of_the_file(keys, names):
  assert read_class_names(keys) == names


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"id2label": {"0": "a", "2": "b"}}, "id2label(?s:.*)0 2(?s:.*)0 to 1"),
    ({"id2label": {"1": "a", "2": "b"}}, "0 to 1, each once"),
    ({"label2id": {"a": 0, "b": 0}}, "label2id(?s:.*)0 to 1"),
    ({"id2label": {"zero": "a"}}, "the numbers zero"),
    ({"id2label": ["a", "b"]}, "an object"),
    (
      {"id2label": {"0": "neg", "1": "pos"}, "label2id": {"neg": 1, "pos": 0}},
      "label2id(?s:.*)neg: 1(?s:.*)0, as in id2label",
    ),
    ({"id2label": {"0": "a", "1": "a"}, "label2id": {"a": 1}}, "label2id"),
  ],
)
def test_classes_are_never_numbered_by_their_order(keys, message):
  with pytest.raises(DataError, match=message):
    read_class_names(keys)


def test_fields_are_flat_or_nested():
  flat = {"vocab_size": 3, "moe.num_experts": 2, "layer_pattern": ("local", "global")}
  assert flatten_fields(nest(flat, ".")) == flat


SHIPPED = {
  "llama2_7b": "Llama-2-7b-hf",
  "llama3_2_1b": "Llama-3.2-1B",
  "smollm2_135m": "SmolLM2-135M",
  "mistral_7b": "Mistral-7B-v0.1",
  "qwen2_5_0_5b": "Qwen2.5-0.5B",
  "qwen3_30b_a3b": "Qwen3-30B-A3B",
  "mixtral_8x7b": "Mixtral-8x7B-v0.1",
  "gemma2_2b": "gemma-2-2b",
  "gemma3_4b": "gemma-3-4b-it",
  "olmo2_7b": "OLMo-2-1124-7B",
  "bert_base": "bert-base-uncased",
  "modernbert_base": "ModernBERT-base",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_compute_what_the_files_of_the_hub_mean(name):
  published = HUB[SHIPPED[name]]
  if name == "bert_base":
    published = published | {"architectures": ["BertForPreTraining"]}
  ours = canonical(flatten_fields(load_config(f"configs/{name}.py").model.to_dict()))
  theirs = canonical(fields_of(published))
  different = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
  assert different <= {"max_len"}
