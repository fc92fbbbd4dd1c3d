"""Gemma 2 2B (Gemma Team 2024), for 8 devices.

  python -m flaxlm.train --config=configs/gemma2_2b.py --workdir=runs/gemma2_2b

Not trained here: no result is claimed. Google distilled it from a larger model; this
config trains on text alone. Its optimizer settings were not published; these are Llama
2's. --config.tokenizer.path takes its tokenizer; otherwise one of its size is trained.
On 8n devices, divide accumulation_steps by n.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v6e:2x4"
  config.num_steps = 477_000
  config.tokenizer.vocab_size = 256_000
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/c4_gemma2"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 8192
  config.data.batch_size = 512

  model = config.model
  model.num_layers = 26
  model.embed_dim = 2304
  model.num_heads = 8
  model.num_kv_heads = 4
  model.head_dim = 256
  model.mlp_dim = 9216
  model.norm_epsilon = 1e-6
  model.norm_placement = "both"
  model.zero_centered_norm = True
  model.activation = "gelu_tanh"
  model.scale_embeddings = True
  model.sliding_window = 4096
  model.layer_pattern = ("local", "global")
  model.attention_softcap = 50.0
  model.logit_softcap = 30.0
  model.dtype = "bfloat16"
  model.remat = "full"

  config.optim.peak_learning_rate = 3e-4
  config.optim.warmup_steps = 2000
  config.mesh.fsdp = 8
  config.step.accumulation_steps = 64
  return config
