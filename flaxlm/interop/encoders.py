"""The encoder families, BERT and ModernBERT, with their heads.

A head is recognised by its tensors; a bare encoder is a head without labels.
"""

from flaxlm.interop import weight_names as names
from flaxlm.interop.family import COMMON_KEYS, Architecture, Family

BERT = Family(
  model_type="bert",
  prefix="bert.",
  rows=names.BERT_WEIGHTS,
  architectures=(
    Architecture(
      "BertForPreTraining",
      {"head": "mlm", "pair_head": True},
      names.BERT_MLM + names.BERT_PAIRS,
      instead_of="BertForMaskedLM",
    ),
    Architecture("BertForMaskedLM", {"head": "mlm"}, names.BERT_MLM),
    Architecture(
      "BertForSequenceClassification",
      {"head": "sequence", "head_dense": True, "head_activation": "tanh"},
      names.BERT_POOLER + names.CLASSIFIER,
    ),
    Architecture(
      "BertForTokenClassification",
      {"head": "token", "head_dense": False},
      names.CLASSIFIER,
    ),
    Architecture(
      "BertForMultipleChoice",
      {"head": "choice", "head_dense": True, "head_activation": "tanh"},
      names.BERT_POOLER + names.CLASSIFIER,
    ),
    Architecture(
      "BertForQuestionAnswering",
      {"head": "span", "head_dense": False},
      names.BERT_SPAN,
    ),
    # The bare encoder: a head that ends before its labels.
    Architecture(
      "BertModel",
      {
        "head": "sequence",
        "num_labels": 0,
        "head_dense": True,
        "head_activation": "tanh",
      },
      names.BERT_POOLER,
    ),
    Architecture(
      "BertModel", {"head": "sequence", "num_labels": 0, "head_dense": False}
    ),
  ),
  keys=COMMON_KEYS
  | {
    "hidden_act": "activation",
    "layer_norm_eps": "norm_epsilon",
    "type_vocab_size": "num_segment_types",
  },
  defaults={
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
  },
  fields={
    "causal": False,
    "positions": "learned",
    "norm": "layernorm",
    "norm_placement": "residual",
    "embedding_norm": True,
    "gated_mlp": False,
    "use_bias": True,
  },
  fixed={
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
  },
  rope="none",
  gelu_tanh="gelu_new",
  renames=(
    (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"),
    (r"\.LayerNorm\.beta$", ".LayerNorm.bias"),
  ),
  ignored=(r"embeddings\.(position_ids|token_type_ids)$",),
  unused=(r"^bert\.pooler\.dense\.", r"^cls\.(predictions|seq_relationship)\."),
  copies={
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
  },
)

MODERNBERT = Family(
  model_type="modernbert",
  prefix="model.",
  rows=names.MODERNBERT_WEIGHTS,
  architectures=(
    Architecture("ModernBertForMaskedLM", {"head": "mlm"}, names.MODERNBERT_MLM),
    *(
      Architecture(
        f"ModernBertFor{name}",
        {"head": head, "head_dense": True, "head_norm": True},
        names.MODERNBERT_DENSE + names.CLASSIFIER,
      )
      for name, head in (
        ("SequenceClassification", "sequence"),
        ("TokenClassification", "token"),
        ("MultipleChoice", "choice"),
        ("QuestionAnswering", "span"),
      )
    ),
    Architecture(
      "ModernBertModel", {"head": "sequence", "num_labels": 0, "head_dense": False}
    ),
  ),
  keys=COMMON_KEYS
  | {
    "hidden_activation": "activation",
    "classifier_activation": "head_activation",
    "classifier_pooling": "pooling",
    "norm_eps": "norm_epsilon",
  },
  defaults={
    "tie_word_embeddings": True,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "classifier_pooling": "cls",
    "norm_eps": 1e-5,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
  },
  fields={
    "causal": False,
    "norm": "layernorm",
    "embedding_norm": True,
    "first_norm": False,
  },
  fixed={"decoder_bias": (True,), "position_embedding_type": ("absolute",)},
  bias_keys=("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"),
  rope="modernbert",
  window="modernbert",
  copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)

ENCODERS = (BERT, MODERNBERT)
