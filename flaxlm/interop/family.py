"""One record for what we know about a family of Hugging Face models.

It says what the family's config.json can express: the keys that are our fields under
another name, the fields that the family implies, and the values that must be as they
are because we compute nothing else. decoders.py and encoders.py list the families.
"""

import dataclasses
import math
from typing import NamedTuple

from flaxlm.errors import DataError
from flaxlm.interop.weight_names import Row

GLOBAL, LOCAL = "full_attention", "sliding_attention"  # the two kinds of layers


class Architecture(NamedTuple):
  """A model class of transformers: what it adds to its family."""

  name: str
  fields: dict  # ours, that it implies
  rows: tuple[Row, ...] = ()
  instead_of: str = ""  # also chosen for this class, if its own tensors are there


@dataclasses.dataclass(frozen=True)
class Family:
  """All models with one `model_type` in their config.json."""

  model_type: str
  prefix: str  # of the base model's tensor names; files may lack it
  rows: tuple[Row, ...]
  architectures: tuple[Architecture, ...]  # the first that fits is chosen
  keys: dict[str, str]  # key of config.json: our field; hf_config.py knows other keys
  defaults: dict[str, object]  # Hugging Face's, for keys that a config.json may lack
  fields: dict[str, object]  # ours, that the family implies
  fixed: dict[str, tuple] = dataclasses.field(default_factory=dict)  # allowed values
  bias_keys: tuple[str, ...] = ()  # all true or all false: `use_bias`
  rope: str = "one"  # one | none | gemma3 | modernbert: how many, under which keys
  window: str = "none"  # a key of hf_windows.WINDOW_KEYS: which layers have a window
  gelu_tanh: str = "gelu_pytorch_tanh"  # its name for our gelu_tanh
  old_rows: tuple[Row, ...] = ()  # other spellings: read, never written
  renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) for old names
  # Patterns of buffers, which are computed again, and of weights that are not used.
  ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
  unused: tuple[str, ...] = ()
  copies: dict[str, str] = dataclasses.field(default_factory=dict)  # name: equal name


# Keys of config.json that most families share.
COMMON_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "embed_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
  "max_position_embeddings": "max_len",
  "tie_word_embeddings": "tie_embeddings",
}


def wrong_hf_value(key: str, given: object, needed: str, hint: str = "") -> DataError:
  """Returns the error for a key of config.json whose value is not supported."""
  return DataError(f"config.json: {key} cannot be used", given, needed, hint)


def read_number(key: str, value: object, above: float = -math.inf) -> float:
  """Returns the number at a key of config.json; DataError if it is not one."""
  if isinstance(value, bool) or not isinstance(value, int | float) or value <= above:
    raise wrong_hf_value(key, value, "a number" + f" above {above:g}" * (above >= 0))
  return float(value)
