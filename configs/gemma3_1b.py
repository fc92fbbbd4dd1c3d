"""Gemma 3 1B (Gemma Team 2025), for 8 devices.

  python -m flaxlm.train --config=configs/gemma3_1b.py --workdir=runs/gemma3_1b

Not trained here: no result is claimed. Unlike Gemma 2: QK-norm instead of soft caps,
five local layers per global layer, and a rotary base for each kind. Rows have 8192
tokens; the original's 32,768 need an attention kernel.
"""

from . import gemma2_2b


def get_config():
  config = gemma2_2b.get_config()
  config.hardware = "v6e:2x4"
  config.tokenizer.vocab_size = 262_144
  config.data.store = "data/c4_gemma3"
  model = config.model
  model.max_len = 32_768
  model.embed_dim = 1152
  model.num_heads = 4
  model.num_kv_heads = 1
  model.mlp_dim = 6912
  model.qk_norm = "head"
  model.sliding_window = 512
  model.layer_pattern = ("local",) * 5 + ("global",)
  model.rope.theta = 1_000_000.0
  model.rope.local_theta = 10_000.0
  model.attention_softcap = 0.0
  model.logit_softcap = 0.0
  return config
