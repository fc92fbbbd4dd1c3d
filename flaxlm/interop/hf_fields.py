"""Our model fields as `interop` handles them, and Hugging Face's names for values.

Fields are flat, with dots for groups: {"moe.num_experts": 8}.
"""

from flaxlm.config.tree import flatten
from flaxlm.interop.hf_rope import ROPE_FIELDS

# Our fields where a family says nothing else: those of Llama.
NEUTRAL_FIELDS = {
  "num_kv_heads": 0,  # num_heads
  "head_dim": 0,  # embed_dim / num_heads
  "causal": True,
  "positions": "rope",
  "norm": "rmsnorm",
  "norm_placement": "pre",
  "zero_centered_norm": False,
  "first_norm": True,
  "gated_mlp": True,
  "use_bias": False,
  "qkv_bias": False,
  "qk_norm": "none",
  "scale_embeddings": False,
  "embedding_norm": False,
  "num_segment_types": 0,
  "sliding_window": 0,
  "layer_pattern": ("local",),
  "attention_scale": 0.0,
  "attention_softcap": 0.0,
  "attention_sinks": False,
  "logit_softcap": 0.0,
  "num_labels": 0,
  "pooling": "first",
  "head_dense": True,
  "head_norm": False,
  "head_activation": "gelu",
  "pair_head": False,
  "rope.theta": 10_000.0,
  "rope.local_theta": 0.0,
  **ROPE_FIELDS,
  "moe.num_experts": 0,
  "moe.experts_per_token": 2,
  "moe.expert_dim": 0,
  "moe.shared_dim": 0,
  "moe.shared_gate": False,
  "moe.first_dense_layers": 0,
  "moe.router": "softmax",
  "moe.renormalize": True,
  "moe.routed_scale": 1.0,
  "moe.balance": "loss",
  "moe.aux_loss": 0.01,
  "moe.z_loss": 0.0,
  "moe.bias_rate": 1e-3,
  "moe.capacity_factor": 0.0,
}
# Fields that decide how a model is trained or run, not what it computes.
_NOT_COMPUTED = {
  *("attention", "dtype", "quantize", "remat", "keep", "offload", "unroll", "dropout"),
  *("moe.balance", "moe.aux_loss", "moe.z_loss", "moe.bias_rate"),
  "moe.capacity_factor",  # drops tokens in training alone; other programs never drop
}
HF_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
  "tanh": "tanh",
}
HF_POOLINGS = {"cls": "first", "mean": "mean"}
# Keys that do not change what the weights compute: where a file comes from, how to
# train it, special ids, and the generation settings that older files include.
_SILENT = """
  architectures model_type transformers_version torch_dtype dtype _name_or_path
  _model_name_or_path
  name_or_path auto_map use_cache gradient_checkpointing initializer_range
  initializer_cutoff_factor attention_dropout hidden_dropout_prob embedding_dropout
  attention_probs_dropout_prob classifier_dropout mlp_dropout resid_pdrop embd_pdrop
  attn_pdrop summary_activation summary_first_dropout summary_proj_to_labels
  summary_type summary_use_proj n_ctx reorder_and_upcast_attn pretraining_tp
  bos_token_id eos_token_id pad_token_id unk_token_id cls_token_id sep_token_id
  mask_token_id decoder_start_token_id task_specific_params finetuning_task id2label
  label2id num_labels problem_type output_attentions output_hidden_states return_dict
  _attn_implementation attn_implementation _attn_implementation_autoset
  output_router_logits router_jitter_noise cache_implementation hidden_act
  _sliding_window_pattern is_llama_config unsloth_version unsloth_fixed
  transformers.js_config directionality pooler_fc_size pooler_num_attention_heads
  pooler_num_fc_layers pooler_size_per_head pooler_type chunk_size_feed_forward
  torchscript tokenizer_class prefix max_length min_length do_sample early_stopping
  num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
  repetition_penalty length_penalty no_repeat_ngram_size
  encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
  return_dict_in_generate forced_bos_token_id forced_eos_token_id
  remove_invalid_values exponential_decay_length_penalty suppress_tokens
  begin_suppress_tokens deterministic_flash_attn sparse_prediction
  sparse_pred_ignore_index reference_compile repad_logits_with_grad layer_norm_eps
  boi_token_index eoi_token_index image_token_index mm_tokens_per_image vision_config
  boi_token_id eoi_token_id image_token_id
"""
SILENT_KEYS = frozenset(_SILENT.split())


def pattern_of(windows: list[int]) -> tuple[str, ...]:
  """Returns the shortest pattern of kinds that gives these layers when repeated."""
  if not any(windows):
    return NEUTRAL_FIELDS["layer_pattern"]
  kinds = ["local" if window else "global" for window in windows]
  for period in range(1, len(kinds) + 1):
    if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
      return tuple(kinds[:period])
  raise AssertionError(kinds)


def windows_of(fields: dict) -> list[int]:
  """Returns the window of each layer in tokens; 0 is the whole row."""
  pattern, window = fields["layer_pattern"], fields["sliding_window"]
  kinds = [pattern[i % len(pattern)] for i in range(fields["num_layers"])]
  return [window if kind == "local" else 0 for kind in kinds]


def canonical(fields: dict[str, object]) -> dict[str, object]:
  """Returns the fields that decide what is computed, each in a single spelling."""
  fields = NEUTRAL_FIELDS | fields
  fields = {key: value for key, value in fields.items() if key not in _NOT_COMPUTED}
  windows = windows_of(fields)
  fields["sliding_window"], fields["layer_pattern"] = max(windows), tuple(windows)
  fields["attention_scale"] = fields["attention_scale"] or fields["head_dim"] ** -0.5
  fields["moe.expert_dim"] = fields["moe.expert_dim"] or fields["mlp_dim"]
  fields["qkv_bias"] |= fields["use_bias"]
  idle = []
  if fields["positions"] != "rope":
    idle += [key for key in fields if key.startswith("rope.")]
  if not any(windows):
    idle.append("rope.local_theta")
  if not fields["moe.num_experts"]:
    idle += [key for key in fields if key.startswith("moe.")]
  elif not fields["moe.first_dense_layers"]:
    idle.append("mlp_dim")
  if not fields["moe.shared_dim"]:
    idle.append("moe.shared_gate")
  if fields["head"] in ("lm", "mlm"):
    idle += ["head_dense", "head_norm", "num_labels"]
  if fields["head"] == "lm" or not (fields["head_dense"] or fields["head"] == "mlm"):
    idle.append("head_activation")
  if fields["head"] not in ("sequence", "token"):
    idle.append("num_labels")
  if fields["head"] != "sequence" or not fields["num_labels"]:
    idle.append("pooling")
  return {key: value for key, value in fields.items() if key not in idle}


def flatten_fields(fields: dict) -> dict[str, object]:
  """Returns {"moe.z_loss": 0} for {"moe": {"z_loss": 0}}, with lists as tuples."""
  return {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in flatten(fields).items()
  }
