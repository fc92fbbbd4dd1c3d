"""What a token costs to train, from the shapes of the model alone."""

from flaxlm.models.config import window_of


def flops_per_token(model, seq_len: int) -> float:
  """Returns the model FLOPs to train on one token: 6 per matrix weight, and attention.

  The output head counts; the embedding's gather does not. Attention counts only the
  keys that a query may see: half of the square if causal, less with a sliding window.
  (PaLM, appendix B, and nanoGPT count the full square.) Recomputation under remat does
  not count.

  Args:
    model: anything with the fields of `config.model`.
    seq_len: tokens per row.
  """
  D, moe = model.embed_dim, model.moe
  heads = model.num_heads * model.head_dim
  attention = D * (2 * heads + 2 * model.num_kv_heads * model.head_dim)
  matrices = 3 if model.gated_mlp else 2
  mlp = matrices * D * model.mlp_dim
  layers = model.num_layers * (attention + mlp)
  if moe.num_experts:  # a token passes through its own experts alone
    active = moe.experts_per_token * (moe.expert_dim or model.mlp_dim) + moe.shared_dim
    experts = matrices * D * active + D * moe.num_experts
    layers += (model.num_layers - moe.first_dense_layers) * (experts - mlp)
  output = model.vocab_size if model.head in ("lm", "mlm") else model.num_labels
  weights = layers + D * output + (D * D if model.head == "mlm" else 0)
  keys = 0.0
  for i in range(model.num_layers):
    kind = model.layer_pattern[i % len(model.layer_pattern)]
    keys += mean_keys(seq_len, window_of(kind, model.sliding_window), model.causal)
  # Scores and values: 2 x 2 FLOPs per key and head channel, twice that backward.
  return float(6 * weights + 12 * heads * keys)


def mean_keys(seq_len: int, window: int, causal: bool) -> float:
  """Returns how many keys a query sees on average; 0 means no window."""
  window = min(window or seq_len, seq_len)
  # The t-th query sees min(t, window) keys on its left.
  left = window - window * (window - 1) / (2 * seq_len)
  return left if causal else 2 * left - 1
