"""What is to be known of a family of Hugging Face models, in one record.

A family is what its config.json can say: the keys that are our fields under another
name, the fields that it takes for granted, and the values that it must have because we
compute nothing else. `decoders.py` and `encoders.py` list them.
"""

import dataclasses
from typing import NamedTuple

from flaxlm.interop.weight_names import Row


class Architecture(NamedTuple):
  """A model class of transformers: what it has on top of its family."""

  name: str
  fields: dict  # ours, that it means
  rows: tuple[Row, ...] = ()
  instead_of: str = ""  # taken for this one too, if its own tensors are all there


@dataclasses.dataclass(frozen=True)
class Family:
  """What Hugging Face calls a `model_type`."""

  model_type: str
  prefix: str  # of the names of the base model; files may lack it
  rows: tuple[Row, ...]
  architectures: tuple[Architecture, ...]  # the first that fits is taken
  keys: dict[str, str]  # of config.json: our field; `hf_config.py` knows the other keys
  defaults: dict[str, object]  # Hugging Face's, for keys that a config.json may lack
  fields: dict[str, object]  # ours, that the family means
  fixed: dict[str, tuple] = dataclasses.field(default_factory=dict)  # allowed values
  bias_keys: tuple[str, ...] = ()  # all true or all false: `use_bias`
  rope: str = "one"  # one | none | gemma3 | modernbert: how many, under which names
  window: str = "none"  # none | all | qwen | gemma | modernbert: which layers have one
  gelu_tanh: str = "gelu_pytorch_tanh"  # its name for our gelu_tanh
  old_rows: tuple[Row, ...] = ()  # other spellings: read, never written
  renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) for old names
  # Buffers, which are computed again; and weights that an architecture does not use.
  ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
  unused: tuple[str, ...] = ()
  copies: dict[str, str] = dataclasses.field(default_factory=dict)  # name: equal name


# Keys of config.json that most families share.
KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "embed_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
  "max_position_embeddings": "max_len",
  "tie_word_embeddings": "tie_embeddings",
}
