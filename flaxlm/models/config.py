"""The shape of a model: frozen dataclasses with the fields of `config.model`."""

import dataclasses

from flaxlm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """`config.model.rope`."""

  theta: float
  local_theta: float
  scaling: str
  factor: float
  original_max_len: int
  low_frequency_factor: float
  high_frequency_factor: float
  beta_fast: float
  beta_slow: float
  attention_factor: float


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """`config.model.moe`."""

  num_experts: int
  experts_per_token: int
  expert_dim: int
  shared_dim: int
  shared_gate: bool
  first_dense_layers: int
  router: str
  renormalize: bool
  routed_scale: float
  balance: str
  aux_loss: float
  z_loss: float
  bias_rate: float
  capacity_factor: float


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """`config.model`; each field is documented in flaxlm/config/base.py."""

  vocab_size: int
  max_len: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  causal: bool
  positions: str
  norm: str
  norm_epsilon: float
  norm_placement: str
  zero_centered_norm: bool
  first_norm: bool
  gated_mlp: bool
  activation: str
  use_bias: bool
  qkv_bias: bool
  qk_norm: str
  tie_embeddings: bool
  scale_embeddings: bool
  embedding_norm: bool
  num_segment_types: int
  sliding_window: int
  layer_pattern: tuple[str, ...]
  attention_scale: float
  attention_softcap: float
  attention_sinks: bool
  logit_softcap: float
  head: str
  num_labels: int
  pooling: str
  head_dense: bool
  head_norm: bool
  head_activation: str
  pair_head: bool
  dropout: float
  rope: RopeConfig
  moe: MoeConfig
  attention: str
  dtype: str
  quantize: str
  remat: str
  keep: tuple[str, ...]
  offload: tuple[str, ...]
  unroll: int

  def __post_init__(self):
    # The groups arrive as ConfigDicts, which cannot be hashed.
    if not isinstance(self.rope, RopeConfig):
      object.__setattr__(self, "rope", RopeConfig(**self.rope))
    if not isinstance(self.moe, MoeConfig):
      object.__setattr__(self, "moe", MoeConfig(**self.moe))

  @property
  def windows(self) -> tuple[int, ...]:
    """The window of each layer, in tokens; 0 means no window."""
    kinds = [self.layer_pattern[i % len(self.layer_pattern)] for i in self.layers]
    return tuple(window_of(kind, self.sliding_window) for kind in kinds)

  @property
  def layers(self) -> range:
    return range(self.num_layers)

  @property
  def num_first_layers(self) -> int:
    """How many of the first layers differ in structure from the rest."""
    dense = self.moe.first_dense_layers if self.moe.num_experts else 0
    return max(dense, 0 if self.first_norm else 1)


def window_of(kind: str, sliding_window: int) -> int:
  """Returns the window of a kind of layer, in tokens; 0 means no window."""
  if kind == "local":
    return sliding_window
  elif kind == "global":
    return 0
  else:
    raise ConfigError("config.model.layer_pattern", kind, "local or global")
