"""The decoder families: GPT-2, Llama and its successors, mixtures of experts.

Most families are written as their differences from Llama.
"""

import dataclasses

from flaxlm.interop import weight_names as names
from flaxlm.interop.family import COMMON_KEYS, Architecture, Family


def _causal(name: str) -> tuple[Architecture, ...]:
  """Returns the language model, and the bare model, whose output matrix is tied."""
  fields = {"head": "lm"}
  return (
    Architecture(f"{name}ForCausalLM", fields),
    Architecture(f"{name}Model", fields),
  )


_LLAMA_KEYS = COMMON_KEYS | {
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
  "rms_norm_eps": "norm_epsilon",
  "hidden_act": "activation",
}
_LLAMA_DEFAULTS = {
  "tie_word_embeddings": False,
  "num_key_value_heads": None,  # num_attention_heads
  "head_dim": None,  # hidden_size / num_attention_heads
  "rms_norm_eps": 1e-6,
  "hidden_act": "silu",
  "rope_theta": 10_000.0,
}
_LLAMA_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
_NO_BIAS = {"attention_bias": (False,)}

GPT2 = Family(
  model_type="gpt2",
  prefix="transformer.",
  rows=names.GPT2_WEIGHTS,
  architectures=(
    Architecture("GPT2LMHeadModel", {"head": "lm"}),
    Architecture("GPT2Model", {"head": "lm"}),
  ),
  keys={
    "vocab_size": "vocab_size",
    "n_embd": "embed_dim",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_inner": "mlp_dim",
    "n_positions": "max_len",
    "layer_norm_epsilon": "norm_epsilon",
    "activation_function": "activation",
    "tie_word_embeddings": "tie_embeddings",
  },
  defaults={
    "n_inner": None,  # 4 * n_embd
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
  },
  fields={
    "positions": "learned",
    "norm": "layernorm",
    "gated_mlp": False,
    "use_bias": True,
  },
  fixed={
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
  },
  rope="none",
  gelu_tanh="gelu_new",
  ignored=(r"\.attn\.(bias|masked_bias)$",),
  copies={"lm_head.weight": "transformer.wte.weight"},
)

LLAMA = Family(
  model_type="llama",
  prefix="model.",
  rows=names.OUTSIDE
  + names.PRE_NORMS
  + names.ATTENTION
  + names.ATTENTION_BIASES
  + names.MLP
  + names.MLP_BIASES,
  architectures=_causal("Llama"),
  keys=_LLAMA_KEYS,
  defaults=_LLAMA_DEFAULTS,
  fields={},
  bias_keys=("attention_bias", "mlp_bias"),
  copies=_LLAMA_COPIES,
)

MISTRAL = dataclasses.replace(
  LLAMA,
  model_type="mistral",
  rows=names.OUTSIDE + names.PRE_NORMS + names.ATTENTION + names.MLP,
  architectures=_causal("Mistral"),
  defaults=_LLAMA_DEFAULTS | {"sliding_window": 4096},
  bias_keys=(),
  window="all",
)

QWEN2 = dataclasses.replace(
  MISTRAL,
  model_type="qwen2",
  rows=names.OUTSIDE
  + names.PRE_NORMS
  + names.ATTENTION
  + names.ATTENTION_BIASES
  + names.MLP,
  architectures=_causal("Qwen2"),
  defaults=_LLAMA_DEFAULTS | {"sliding_window": 4096, "max_window_layers": 28},
  fields={"qkv_bias": True},
  window="qwen",
)

QWEN3 = dataclasses.replace(
  QWEN2,
  model_type="qwen3",
  rows=names.OUTSIDE + names.PRE_NORMS + names.ATTENTION + names.HEAD_NORMS + names.MLP,
  architectures=_causal("Qwen3"),
  defaults=QWEN2.defaults | {"head_dim": 128},
  fields={"qk_norm": "head"},
  fixed=_NO_BIAS,
)

GEMMA2 = Family(
  model_type="gemma2",
  prefix="model.",
  rows=names.OUTSIDE + names.GEMMA_NORMS + names.ATTENTION + names.MLP,
  architectures=_causal("Gemma2"),
  keys=COMMON_KEYS
  | {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "attention_scale",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
  },
  # Google's Gemma 3 files leave out most keys and rely on these.
  defaults={
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "rope_theta": 10_000.0,
  },
  fields={
    "norm_placement": "both",
    "zero_centered_norm": True,
    "scale_embeddings": True,
  },
  fixed=_NO_BIAS | {"use_bidirectional_attention": (False, None)},
  window="gemma",
  copies=_LLAMA_COPIES,
)

GEMMA3 = dataclasses.replace(
  GEMMA2,
  model_type="gemma3_text",
  rows=GEMMA2.rows + names.HEAD_NORMS,
  architectures=_causal("Gemma3")[:1] + _causal("Gemma3Text")[1:],
  defaults=GEMMA2.defaults
  | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
  },
  fields=GEMMA2.fields | {"qk_norm": "head"},
  rope="gemma3",
)

# The text model inside a multimodal Gemma 3; it is exported as `gemma3_text`.
GEMMA3_IMAGES = dataclasses.replace(
  GEMMA3,
  model_type="gemma3",
  architectures=(Architecture("Gemma3ForConditionalGeneration", {"head": "lm"}),),
  renames=(
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model."),
  ),
  unused=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
)

OLMO2 = dataclasses.replace(
  LLAMA,
  model_type="olmo2",
  rows=names.OUTSIDE
  + names.POST_NORMS
  + names.ATTENTION
  + names.FULL_NORMS
  + names.MLP,
  architectures=_causal("Olmo2"),
  defaults=_LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
  fields={"norm_placement": "post", "qk_norm": "full"},
  fixed=_NO_BIAS,
  bias_keys=(),
)

MIXTRAL = dataclasses.replace(
  MISTRAL,
  model_type="mixtral",
  rows=names.OUTSIDE + names.PRE_NORMS + names.ATTENTION + names.MIXTRAL_EXPERTS,
  old_rows=names.FUSED_EXPERTS,
  architectures=_causal("Mixtral"),
  keys=_LLAMA_KEYS
  | {
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "router_aux_loss_coef": "moe.aux_loss",
  },
  defaults=_LLAMA_DEFAULTS
  | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "router_aux_loss_coef": 0.001,
  },
  renames=((r"\.mlp\.gate\.", ".block_sparse_moe.gate."),),
)

QWEN3_MOE = dataclasses.replace(
  QWEN3,
  model_type="qwen3_moe",
  rows=QWEN3.rows + names.EXPERTS,
  old_rows=names.FUSED_EXPERTS,
  architectures=_causal("Qwen3Moe"),
  keys=_LLAMA_KEYS
  | {
    "num_experts": "moe.num_experts",
    "num_local_experts": "moe.num_experts",  # transformers 5 writes this one
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.expert_dim",
    "norm_topk_prob": "moe.renormalize",
    "mlp_only_layers": "moe.first_dense_layers",
    "router_aux_loss_coef": "moe.aux_loss",
  },
  defaults=QWEN3.defaults
  | {
    "head_dim": None,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "mlp_only_layers": (),
    "router_aux_loss_coef": 0.001,
  },
  fixed=_NO_BIAS | {"decoder_sparse_step": (1,)},
  window="qwen3_moe",
)

QWEN2_MOE = dataclasses.replace(
  QWEN3_MOE,
  model_type="qwen2_moe",
  rows=QWEN2.rows + names.EXPERTS + names.SHARED_EXPERT,
  architectures=_causal("Qwen2Moe"),
  keys=QWEN3_MOE.keys
  | {"shared_expert_intermediate_size": "moe.shared_dim", "qkv_bias": "qkv_bias"},
  defaults=QWEN3_MOE.defaults | {"num_experts_per_tok": 4, "qkv_bias": True},
  fields={"moe.shared_gate": True},
  fixed={"decoder_sparse_step": (1,)},
  window="qwen",
)

OLMOE = dataclasses.replace(
  OLMO2,
  model_type="olmoe",
  rows=names.OUTSIDE
  + names.PRE_NORMS
  + names.ATTENTION
  + names.FULL_NORMS
  + names.EXPERTS,
  old_rows=names.FUSED_EXPERTS,
  architectures=_causal("Olmoe"),
  keys=_LLAMA_KEYS
  | {
    "num_experts": "moe.num_experts",
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "norm_topk_prob": "moe.renormalize",
    "router_aux_loss_coef": "moe.aux_loss",
  },
  defaults=OLMO2.defaults
  | {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
  },
  fields={"qk_norm": "full"},
  fixed=_NO_BIAS | {"clip_qkv": (None,)},
)

DECODERS = (
  *(GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GEMMA3_IMAGES, OLMO2),
  *(MIXTRAL, QWEN3_MOE, QWEN2_MOE, OLMOE),
)
