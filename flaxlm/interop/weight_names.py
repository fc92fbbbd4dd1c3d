"""Names of weights in Hugging Face's files, and their paths in our models.

A row is (name in the file, our path, dimensions in the file -> dimensions in ours).
"NH D -> D N H": the file has a matrix of N*H rows and D columns, ours is D x N x H.
`*` is the number of our paths that share one tensor, in the order that they are listed.
A row applies to the models that have its path, and works in both directions.

Letters are those of `flaxlm.models`, and: O embed again · P learned positions ·
T segment types · E experts · X expert width · G shared expert width · C labels.
A digit is a size.
"""

from typing import NamedTuple


class Row(NamedTuple):
  """A kind of tensor in the files, and the weights of ours that it fills."""

  name: str  # in the file; {layer} and {expert} stand for numbers
  path: str | tuple[str, ...]  # ours; several paths share one fused tensor
  dims: str


def _weight_rows(*table: tuple, before: str = "", under: str = "") -> tuple[Row, ...]:
  """Adds the common prefixes of a table to its names and paths."""

  def whole(path):
    return under + path if isinstance(path, str) else tuple(under + p for p in path)

  return tuple(Row(before + name, whole(path), dims) for name, path, dims in table)


def _layer_rows(*table: tuple) -> tuple[Row, ...]:
  return _weight_rows(*table, before="model.layers.{layer}.", under="blocks/")


OUTSIDE = _weight_rows(
  ("model.embed_tokens.weight", "embed", "V D -> V D"),
  ("model.norm.weight", "final_norm/scale", "D -> D"),
  ("lm_head.weight", "unembed", "V D -> D V"),
)
ATTENTION = _layer_rows(
  ("self_attn.q_proj.weight", "attention/query", "NH D -> D N H"),
  ("self_attn.k_proj.weight", "attention/key", "KH D -> D K H"),
  ("self_attn.v_proj.weight", "attention/value", "KH D -> D K H"),
  ("self_attn.o_proj.weight", "attention/out", "D NH -> N H D"),
)
ATTENTION_BIASES = _layer_rows(
  ("self_attn.q_proj.bias", "attention/query_bias", "NH -> N H"),
  ("self_attn.k_proj.bias", "attention/key_bias", "KH -> K H"),
  ("self_attn.v_proj.bias", "attention/value_bias", "KH -> K H"),
  ("self_attn.o_proj.bias", "attention/out_bias", "D -> D"),
)
HEAD_NORMS = _layer_rows(
  ("self_attn.q_norm.weight", "attention/query_norm/scale", "H -> H"),
  ("self_attn.k_norm.weight", "attention/key_norm/scale", "H -> H"),
)
FULL_NORMS = _layer_rows(
  ("self_attn.q_norm.weight", "attention/query_norm/scale", "NH -> N H"),
  ("self_attn.k_norm.weight", "attention/key_norm/scale", "KH -> K H"),
)
MLP = _layer_rows(
  ("mlp.gate_proj.weight", "mlp/gate", "F D -> D F"),
  ("mlp.up_proj.weight", "mlp/up", "F D -> D F"),
  ("mlp.down_proj.weight", "mlp/down", "D F -> F D"),
)
MLP_BIASES = _layer_rows(
  ("mlp.gate_proj.bias", "mlp/gate_bias", "F -> F"),
  ("mlp.up_proj.bias", "mlp/up_bias", "F -> F"),
  ("mlp.down_proj.bias", "mlp/down_bias", "D -> D"),
)
PRE_NORMS = _layer_rows(
  ("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  ("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
)
POST_NORMS = _layer_rows(
  ("post_attention_layernorm.weight", "attention_post_norm/scale", "D -> D"),
  ("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "D -> D"),
)
GEMMA_NORMS = POST_NORMS + _layer_rows(
  ("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  ("pre_feedforward_layernorm.weight", "mlp_norm/scale", "D -> D"),
)
EXPERTS = _layer_rows(
  ("mlp.gate.weight", "mlp/router", "E D -> D E"),
  ("mlp.experts.{expert}.gate_proj.weight", "mlp/expert_gate", "X D -> D X"),
  ("mlp.experts.{expert}.up_proj.weight", "mlp/expert_up", "X D -> D X"),
  ("mlp.experts.{expert}.down_proj.weight", "mlp/expert_down", "D X -> X D"),
)
SHARED_EXPERT = _layer_rows(
  ("mlp.shared_expert.gate_proj.weight", "mlp/shared/gate", "G D -> D G"),
  ("mlp.shared_expert.up_proj.weight", "mlp/shared/up", "G D -> D G"),
  ("mlp.shared_expert.down_proj.weight", "mlp/shared/down", "D G -> G D"),
  ("mlp.shared_expert_gate.weight", "mlp/shared_gate", "1 D -> D 1"),
)
MIXTRAL_EXPERTS = _layer_rows(
  ("block_sparse_moe.gate.weight", "mlp/router", "E D -> D E"),
  ("block_sparse_moe.experts.{expert}.w1.weight", "mlp/expert_gate", "X D -> D X"),
  ("block_sparse_moe.experts.{expert}.w3.weight", "mlp/expert_up", "X D -> D X"),
  ("block_sparse_moe.experts.{expert}.w2.weight", "mlp/expert_down", "D X -> X D"),
)
# How transformers 5 holds experts in memory; it can also save them so.
FUSED_EXPERTS = _layer_rows(
  (
    "mlp.experts.gate_up_proj",
    ("mlp/expert_gate", "mlp/expert_up"),
    "E *X D -> E D X",
  ),
  ("mlp.experts.down_proj", "mlp/expert_down", "E D X -> E X D"),
)
GPT2_WEIGHTS = _weight_rows(
  ("transformer.wte.weight", "embed", "V D -> V D"),
  ("transformer.wpe.weight", "positions", "P D -> P D"),
  ("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
  ("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
  ("lm_head.weight", "unembed", "V D -> D V"),
) + _weight_rows(
  ("ln_1.weight", "attention_norm/scale", "D -> D"),
  ("ln_1.bias", "attention_norm/bias", "D -> D"),
  (
    "attn.c_attn.weight",
    ("attention/query", "attention/key", "attention/value"),
    "D *NH -> D N H",
  ),
  (
    "attn.c_attn.bias",
    ("attention/query_bias", "attention/key_bias", "attention/value_bias"),
    "*NH -> N H",
  ),
  ("attn.c_proj.weight", "attention/out", "NH D -> N H D"),
  ("attn.c_proj.bias", "attention/out_bias", "D -> D"),
  ("ln_2.weight", "mlp_norm/scale", "D -> D"),
  ("ln_2.bias", "mlp_norm/bias", "D -> D"),
  ("mlp.c_fc.weight", "mlp/up", "D F -> D F"),
  ("mlp.c_fc.bias", "mlp/up_bias", "F -> F"),
  ("mlp.c_proj.weight", "mlp/down", "F D -> F D"),
  ("mlp.c_proj.bias", "mlp/down_bias", "D -> D"),
  before="transformer.h.{layer}.",
  under="blocks/",
)
BERT_WEIGHTS = _weight_rows(
  ("word_embeddings.weight", "embed", "V D -> V D"),
  ("position_embeddings.weight", "positions", "P D -> P D"),
  ("token_type_embeddings.weight", "segment_types", "T D -> T D"),
  ("LayerNorm.weight", "embedding_norm/scale", "D -> D"),
  ("LayerNorm.bias", "embedding_norm/bias", "D -> D"),
  before="bert.embeddings.",
) + _weight_rows(
  ("attention.self.query.weight", "attention/query", "NH D -> D N H"),
  ("attention.self.query.bias", "attention/query_bias", "NH -> N H"),
  ("attention.self.key.weight", "attention/key", "KH D -> D K H"),
  ("attention.self.key.bias", "attention/key_bias", "KH -> K H"),
  ("attention.self.value.weight", "attention/value", "KH D -> D K H"),
  ("attention.self.value.bias", "attention/value_bias", "KH -> K H"),
  ("attention.output.dense.weight", "attention/out", "D NH -> N H D"),
  ("attention.output.dense.bias", "attention/out_bias", "D -> D"),
  ("attention.output.LayerNorm.weight", "attention_norm/scale", "D -> D"),
  ("attention.output.LayerNorm.bias", "attention_norm/bias", "D -> D"),
  ("intermediate.dense.weight", "mlp/up", "F D -> D F"),
  ("intermediate.dense.bias", "mlp/up_bias", "F -> F"),
  ("output.dense.weight", "mlp/down", "D F -> F D"),
  ("output.dense.bias", "mlp/down_bias", "D -> D"),
  ("output.LayerNorm.weight", "mlp_norm/scale", "D -> D"),
  ("output.LayerNorm.bias", "mlp_norm/bias", "D -> D"),
  before="bert.encoder.layer.{layer}.",
  under="blocks/",
)
BERT_MLM = _weight_rows(
  ("transform.dense.weight", "head/dense", "O D -> D O"),
  ("transform.dense.bias", "head/dense_bias", "D -> D"),
  ("transform.LayerNorm.weight", "head/norm/scale", "D -> D"),
  ("transform.LayerNorm.bias", "head/norm/bias", "D -> D"),
  ("bias", "head/vocab_bias", "V -> V"),
  before="cls.predictions.",
)
BERT_POOLER = _weight_rows(
  ("bert.pooler.dense.weight", "head/dense", "O D -> D O"),
  ("bert.pooler.dense.bias", "head/dense_bias", "D -> D"),
)
BERT_PAIRS = _weight_rows(
  ("bert.pooler.dense.weight", "pair_head/dense", "O D -> D O"),
  ("bert.pooler.dense.bias", "pair_head/dense_bias", "D -> D"),
  ("cls.seq_relationship.weight", "pair_head/classifier", "2 D -> D 2"),
  ("cls.seq_relationship.bias", "pair_head/classifier_bias", "2 -> 2"),
)
CLASSIFIER = _weight_rows(
  ("classifier.weight", "head/classifier", "C D -> D C"),
  ("classifier.bias", "head/classifier_bias", "C -> C"),
)
BERT_SPAN = _weight_rows(
  ("qa_outputs.weight", "head/classifier", "C D -> D C"),
  ("qa_outputs.bias", "head/classifier_bias", "C -> C"),
)
MODERNBERT_WEIGHTS = _weight_rows(
  ("model.embeddings.tok_embeddings.weight", "embed", "V D -> V D"),
  ("model.embeddings.norm.weight", "embedding_norm/scale", "D -> D"),
  ("model.embeddings.norm.bias", "embedding_norm/bias", "D -> D"),
  ("model.final_norm.weight", "final_norm/scale", "D -> D"),
  ("model.final_norm.bias", "final_norm/bias", "D -> D"),
) + _layer_rows(
  ("attn_norm.weight", "attention_norm/scale", "D -> D"),
  ("attn_norm.bias", "attention_norm/bias", "D -> D"),
  (
    "attn.Wqkv.weight",
    ("attention/query", "attention/key", "attention/value"),
    "*NH D -> D N H",
  ),
  (
    "attn.Wqkv.bias",
    ("attention/query_bias", "attention/key_bias", "attention/value_bias"),
    "*NH -> N H",
  ),
  ("attn.Wo.weight", "attention/out", "D NH -> N H D"),
  ("attn.Wo.bias", "attention/out_bias", "D -> D"),
  ("mlp_norm.weight", "mlp_norm/scale", "D -> D"),
  ("mlp_norm.bias", "mlp_norm/bias", "D -> D"),
  # The activation applies to the first half, which is the gate elsewhere.
  ("mlp.Wi.weight", ("mlp/gate", "mlp/up"), "*F D -> D F"),
  ("mlp.Wi.bias", ("mlp/gate_bias", "mlp/up_bias"), "*F -> F"),
  ("mlp.Wo.weight", "mlp/down", "D F -> F D"),
  ("mlp.Wo.bias", "mlp/down_bias", "D -> D"),
)
MODERNBERT_DENSE = _weight_rows(
  ("head.dense.weight", "head/dense", "O D -> D O"),
  ("head.dense.bias", "head/dense_bias", "D -> D"),
  ("head.norm.weight", "head/norm/scale", "D -> D"),
  ("head.norm.bias", "head/norm/bias", "D -> D"),
)
MODERNBERT_MLM = MODERNBERT_DENSE + _weight_rows(
  ("decoder.weight", "unembed", "V D -> D V"),
  ("decoder.bias", "head/vocab_bias", "V -> V"),
)
