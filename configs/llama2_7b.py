"""Llama 2 7B (Touvron et al. 2023), for 64 devices.

  python -m flaxlm.train --config=configs/llama2_7b.py --workdir=runs/llama2_7b

Not trained here: no result is claimed. The published optimizer settings, and 2T tokens
in steps of 4M. --config.tokenizer.path takes its tokenizer; otherwise one of its size
is trained. On 64n devices, divide accumulation_steps by n.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5p:4x4x4"
  config.num_steps = 477_000
  config.tokenizer.vocab_size = 32_000
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/c4_llama2"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 4096
  config.data.batch_size = 1024

  model = config.model
  model.num_layers = 32
  model.embed_dim = 4096
  model.num_heads = 32
  model.num_kv_heads = 32
  model.head_dim = 128
  model.mlp_dim = 11_008
  model.tie_embeddings = False
  model.dtype = "bfloat16"
  model.remat = "full"

  config.optim.peak_learning_rate = 3e-4
  config.optim.warmup_steps = 2000
  config.optim.epsilon = 1e-5
  config.mesh.fsdp = 64
  config.step.accumulation_steps = 8
  return config
