"""What each knob may be by itself: the choices of text, the range of a number.

Each table is the one owner of its fact. The code that acts on a choice ends in an
`else` that raises, so a choice that only stands here cannot be used.
"""

import difflib
import math

from flaxlm.errors import SECRET, ConfigError
from flaxlm.kernels.attention.choice import ATTENTION_CHOICES

# The head that a model needs for an objective, and for a task.
HEAD_OF_OBJECTIVE = {
  "causal": "lm",
  "masked": "mlm",
  "span": "lm",
  "prefix": "lm",
  "fim": "lm",
}
HEAD_OF_TASK = {
  "classify": "sequence",
  "tag": "token",
  "qa": "span",
  "choice": "choice",
  "chat": "lm",
}
HEADS = tuple(dict.fromkeys([*HEAD_OF_OBJECTIVE.values(), *HEAD_OF_TASK.values()]))

CHOICES = {
  "model.positions": ("rope", "learned", "none"),
  "model.norm": ("rmsnorm", "layernorm"),
  "model.norm_placement": ("pre", "post", "both", "residual"),
  "model.activation": ("silu", "gelu", "gelu_tanh", "relu"),
  "model.qk_norm": ("none", "head", "full"),
  "model.head": HEADS,
  "model.head_activation": ("gelu", "gelu_tanh", "silu", "tanh"),
  "model.pooling": ("first", "mean", "last"),
  "model.rope.scaling": ("none", "linear", "llama3", "yarn"),
  "model.moe.router": ("softmax", "sigmoid"),
  "model.moe.balance": ("loss", "bias", "none"),
  "model.attention": ATTENTION_CHOICES,
  "model.dtype": ("float32", "bfloat16"),
  "model.quantize": ("none", "fp8", "int8"),
  "model.remat": ("none", "full", "dots"),
  "objective.kind": tuple(HEAD_OF_OBJECTIVE),
  "objective.mask_unit": ("token", "word", "span"),
  "objective.pairs": ("none", "nsp", "sop"),
  "task.kind": ("none", *HEAD_OF_TASK),
  "task.format": ("auto", "csv", "tsv", "jsonl", "squad", "conll", "tfds"),
  "optim.name": ("adamw", "lion", "adafactor", "muon"),
  "optim.schedule": ("cosine", "linear", "wsd", "constant"),
  "data.loader": ("tfdata", "numpy", "synthetic"),
  "data.split": ("auto", "hash", "tail"),
  "data.on_corrupt": ("stop", "skip"),
  "data.sources.*.kind": ("stdlib", "text", "jsonl", "csv", "tsv", "parquet", "tfds"),
  "data.sources.*.document": ("file", "paragraph", "line"),
  "tokenizer.kind": ("bpe", "unigram", "char"),
}
# Numbers that are in no table below may be anything from 0 up.
AT_LEAST_ONE = (
  "num_steps",
  "model.vocab_size",
  "model.max_len",
  "model.num_layers",
  "model.embed_dim",
  "model.num_heads",
  "model.num_kv_heads",
  "model.head_dim",
  "model.mlp_dim",
  "model.unroll",
  "model.moe.experts_per_token",
  "step.accumulation_steps",
  "mesh.slice",
  "mesh.stage",
  "mesh.fsdp",
  "mesh.expert",
  "mesh.context",
  "mesh.tensor",
  "mesh.stage_repeats",
  "data.seq_len",
  "data.batch_size",
  "data.num_threads",
  "data.prefetch",
  "data.shard_tokens",
  "tokenizer.vocab_size",
  "tokenizer.train_bytes",
  "task.doc_stride",
  "checkpoint.every",
  "checkpoint.keep_last",
  "log.every",
  "log.profile_num_steps",
  "guards.max_bad_steps",
)
POSITIVE = (
  "mesh.start_seconds",
  "model.norm_epsilon",
  "model.rope.theta",
  "model.rope.factor",
  "objective.mean_span",
  "lora.alpha",
  "optim.epsilon",
  "data.sources.*.weight",
)
BELOW_ONE = (
  "model.dropout",
  "optim.b1",
  "optim.b2",
  "step.ema_decay",
  "data.validation_fraction",
)
AT_MOST_ONE = (
  "objective.mask_rate",
  "objective.mask_token_rate",
  "objective.random_token_rate",
  "objective.fim_rate",
  "objective.spm_rate",
  "optim.end_factor",
  "optim.decay_fraction",
)
# The largest whole numbers; those in no table have 31 bits, as shapes and steps in JAX.
AT_MOST = {
  "seed": 2**32 - 1,  # JAX keeps 32 bits of it: 2**32 would be 0
  "model.num_layers": 10_000,
  "model.moe.num_experts": 100_000,
  "data.num_threads": 1_000,
  "data.prefetch": 10_000,
  "data.shard_tokens": 2**63 - 1,
  "data.sources.*.max_documents": 2**63 - 1,
  "tokenizer.train_bytes": 2**63 - 1,
}
ANY_NUMBER = ("mesh.data",)  # flaxlm/config/rules.py says which


def check_value(name: str, key: str, value: object) -> None:
  """Raises ConfigError if a leaf is not among its choices or outside its range.

  Args:
    name: the leaf, as the message names it.
    key: its key in the tables, where `*` stands for the name of a source.
  """
  if key in CHOICES and value not in CHOICES[key]:
    near = difflib.get_close_matches(str(value), CHOICES[key], n=1)
    raise ConfigError(name, value, "one of " + " ".join(CHOICES[key]), "".join(near))
  needed = number_needed(key, value)
  if needed:
    raise ConfigError(name, value, needed)
  for text in value if isinstance(value, tuple) else (value,):
    if isinstance(text, str) and not _is_plain(text):
      raise ConfigError(name, text, "UTF-8 without NUL characters")
    if isinstance(text, str) and SECRET.search(text):
      needed = "no password or token: a config is stored, printed and shared"
      raise ConfigError(name, text, needed, "credentials in the environment")


def _is_plain(text: str) -> bool:
  """Returns whether a text can be a path and be stored; an argument may be no UTF-8."""
  return "\0" not in text and text.encode(errors="replace").decode() == text


def number_needed(key: str, value: object) -> str:
  """Returns what is needed in place of a number outside its range; "" if it is fine."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return ""
  most = AT_MOST.get(key, 2**31 - 1)
  if isinstance(value, int) and value > most:
    return f"a whole number of at most {most:,}"
  if key in ANY_NUMBER:
    return ""
  low = 1 if key in AT_LEAST_ONE else 0
  if not math.isfinite(value) or value < low or (key in POSITIVE and value == 0):
    above = "above 0" if key in POSITIVE else f"of at least {low}"
    return f"a finite number {above}"
  if key in BELOW_ONE and value >= 1:
    return "a fraction below 1"
  if key in AT_MOST_ONE and value > 1:
    return "at most 1"
  return ""
