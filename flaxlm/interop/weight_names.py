"""Names of weights in Hugging Face's files, and where they are in our models.

A row reads: name in the file, our path, how the dimensions of the one become those of
the other. "NH D -> D N H": the file has a matrix of N*H rows and D columns, ours is
D x N x H. `*` counts the paths that share one tensor, in the order in which they are
named. A row holds for the models that have its path, and works in both directions.

Letters are those of `flaxlm.models`, and: O embed again · P learned positions ·
T segment types · E experts · X width of an expert · G width of the shared expert ·
C labels. A digit is a size.
"""

from typing import NamedTuple


class Row(NamedTuple):
  name: str  # in the file; {layer} and {expert} count
  path: str | tuple[str, ...]  # ours; several share one fused tensor
  dims: str


def weight_rows(*table: tuple, before: str = "", under: str = "") -> tuple[Row, ...]:
  """Puts what a table has in common before its names and paths."""

  def whole(path):
    return under + path if isinstance(path, str) else tuple(under + p for p in path)

  return tuple(Row(before + name, whole(path), dims) for name, path, dims in table)


def layer(*table: tuple) -> tuple[Row, ...]:
  return weight_rows(*table, before="model.layers.{layer}.", under="blocks/")


OUTSIDE = weight_rows(
  ("model.embed_tokens.weight", "embed", "V D -> V D"),
  ("model.norm.weight", "final_norm/scale", "D -> D"),
  ("lm_head.weight", "unembed", "V D -> D V"),
)
ATTENTION = layer(
  ("self_attn.q_proj.weight", "attention/query", "NH D -> D N H"),
  ("self_attn.k_proj.weight", "attention/key", "KH D -> D K H"),
  ("self_attn.v_proj.weight", "attention/value", "KH D -> D K H"),
  ("self_attn.o_proj.weight", "attention/out", "D NH -> N H D"),
)
ATTENTION_BIASES = layer(
  ("self_attn.q_proj.bias", "attention/query_bias", "NH -> N H"),
  ("self_attn.k_proj.bias", "attention/key_bias", "KH -> K H"),
  ("self_attn.v_proj.bias", "attention/value_bias", "KH -> K H"),
  ("self_attn.o_proj.bias", "attention/out_bias", "D -> D"),
)
HEAD_NORMS = layer(
  ("self_attn.q_norm.weight", "attention/query_norm/scale", "H -> H"),
  ("self_attn.k_norm.weight", "attention/key_norm/scale", "H -> H"),
)
FULL_NORMS = layer(
  ("self_attn.q_norm.weight", "attention/query_norm/scale", "NH -> N H"),
  ("self_attn.k_norm.weight", "attention/key_norm/scale", "KH -> K H"),
)
MLP = layer(
  ("mlp.gate_proj.weight", "mlp/gate", "F D -> D F"),
  ("mlp.up_proj.weight", "mlp/up", "F D -> D F"),
  ("mlp.down_proj.weight", "mlp/down", "D F -> F D"),
)
MLP_BIASES = layer(
  ("mlp.gate_proj.bias", "mlp/gate_bias", "F -> F"),
  ("mlp.up_proj.bias", "mlp/up_bias", "F -> F"),
  ("mlp.down_proj.bias", "mlp/down_bias", "D -> D"),
)
PRE_NORMS = layer(
  ("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  ("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
)
POST_NORMS = layer(
  ("post_attention_layernorm.weight", "attention_post_norm/scale", "D -> D"),
  ("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "D -> D"),
)
GEMMA_NORMS = POST_NORMS + layer(
  ("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  ("pre_feedforward_layernorm.weight", "mlp_norm/scale", "D -> D"),
)
EXPERTS = layer(
  ("mlp.gate.weight", "mlp/router", "E D -> D E"),
  ("mlp.experts.{expert}.gate_proj.weight", "mlp/expert_gate", "X D -> D X"),
  ("mlp.experts.{expert}.up_proj.weight", "mlp/expert_up", "X D -> D X"),
  ("mlp.experts.{expert}.down_proj.weight", "mlp/expert_down", "D X -> X D"),
)
SHARED_EXPERT = layer(
  ("mlp.shared_expert.gate_proj.weight", "mlp/shared/gate", "G D -> D G"),
  ("mlp.shared_expert.up_proj.weight", "mlp/shared/up", "G D -> D G"),
  ("mlp.shared_expert.down_proj.weight", "mlp/shared/down", "D G -> G D"),
  ("mlp.shared_expert_gate.weight", "mlp/shared_gate", "1 D -> D 1"),
)
MIXTRAL_EXPERTS = layer(
  ("block_sparse_moe.gate.weight", "mlp/router", "E D -> D E"),
  ("block_sparse_moe.experts.{expert}.w1.weight", "mlp/expert_gate", "X D -> D X"),
  ("block_sparse_moe.experts.{expert}.w3.weight", "mlp/expert_up", "X D -> D X"),
  ("block_sparse_moe.experts.{expert}.w2.weight", "mlp/expert_down", "D X -> X D"),
)
# As transformers 5 keeps experts in memory, and writes them when asked to.
FUSED_EXPERTS = layer(
  (
    "mlp.experts.gate_up_proj",
    ("mlp/expert_gate", "mlp/expert_up"),
    "E *X D -> E D X",
  ),
  ("mlp.experts.down_proj", "mlp/expert_down", "E D X -> E X D"),
)
GPT2_WEIGHTS = weight_rows(
  ("transformer.wte.weight", "embed", "V D -> V D"),
  ("transformer.wpe.weight", "positions", "P D -> P D"),
  ("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
  ("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
  ("lm_head.weight", "unembed", "V D -> D V"),
) + weight_rows(
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
BERT_WEIGHTS = weight_rows(
  ("word_embeddings.weight", "embed", "V D -> V D"),
  ("position_embeddings.weight", "positions", "P D -> P D"),
  ("token_type_embeddings.weight", "segment_types", "T D -> T D"),
  ("LayerNorm.weight", "embedding_norm/scale", "D -> D"),
  ("LayerNorm.bias", "embedding_norm/bias", "D -> D"),
  before="bert.embeddings.",
) + weight_rows(
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
BERT_MLM = weight_rows(
  ("transform.dense.weight", "head/dense", "O D -> D O"),
  ("transform.dense.bias", "head/dense_bias", "D -> D"),
  ("transform.LayerNorm.weight", "head/norm/scale", "D -> D"),
  ("transform.LayerNorm.bias", "head/norm/bias", "D -> D"),
  ("bias", "head/vocab_bias", "V -> V"),
  before="cls.predictions.",
)
BERT_POOLER = weight_rows(
  ("bert.pooler.dense.weight", "head/dense", "O D -> D O"),
  ("bert.pooler.dense.bias", "head/dense_bias", "D -> D"),
)
BERT_PAIRS = weight_rows(
  ("bert.pooler.dense.weight", "pair_head/dense", "O D -> D O"),
  ("bert.pooler.dense.bias", "pair_head/dense_bias", "D -> D"),
  ("cls.seq_relationship.weight", "pair_head/classifier", "2 D -> D 2"),
  ("cls.seq_relationship.bias", "pair_head/classifier_bias", "2 -> 2"),
)
CLASSIFIER = weight_rows(
  ("classifier.weight", "head/classifier", "C D -> D C"),
  ("classifier.bias", "head/classifier_bias", "C -> C"),
)
BERT_SPAN = weight_rows(
  ("qa_outputs.weight", "head/classifier", "C D -> D C"),
  ("qa_outputs.bias", "head/classifier_bias", "C -> C"),
)
MODERNBERT_WEIGHTS = weight_rows(
  ("model.embeddings.tok_embeddings.weight", "embed", "V D -> V D"),
  ("model.embeddings.norm.weight", "embedding_norm/scale", "D -> D"),
  ("model.embeddings.norm.bias", "embedding_norm/bias", "D -> D"),
  ("model.final_norm.weight", "final_norm/scale", "D -> D"),
  ("model.final_norm.bias", "final_norm/bias", "D -> D"),
) + layer(
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
  # The first half is activated: it is what others call the gate.
  ("mlp.Wi.weight", ("mlp/gate", "mlp/up"), "*F D -> D F"),
  ("mlp.Wi.bias", ("mlp/gate_bias", "mlp/up_bias"), "*F -> F"),
  ("mlp.Wo.weight", "mlp/down", "D F -> F D"),
  ("mlp.Wo.bias", "mlp/down_bias", "D -> D"),
)
MODERNBERT_DENSE = weight_rows(
  ("head.dense.weight", "head/dense", "O D -> D O"),
  ("head.dense.bias", "head/dense_bias", "D -> D"),
  ("head.norm.weight", "head/norm/scale", "D -> D"),
  ("head.norm.bias", "head/norm/bias", "D -> D"),
)
MODERNBERT_MLM = MODERNBERT_DENSE + weight_rows(
  ("decoder.weight", "unembed", "V D -> D V"),
  ("decoder.bias", "head/vocab_bias", "V -> V"),
)
