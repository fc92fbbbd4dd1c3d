"""GPT-3 175B (Brown et al. 2020), for 1,024 TPUs v5p.

  python -m flaxlm.train --config=configs/gpt3_175b.py --workdir=runs/gpt3_175b

Not trained here: no result is claimed. A vocabulary of 50,257 divides by no number of
devices, so the embedding table is not split over the tensor axis.
"""

from . import gpt3_125m


def get_config():
  config = gpt3_125m.get_config()
  config.hardware = "v5p:8x8x16"
  config.num_steps = 91_600
  config.data.batch_size = 1536  # 3.1M tokens; the paper's 3.2M divides less well
  model = config.model
  model.num_layers = 96
  model.embed_dim = 12_288
  model.num_heads = 96
  model.num_kv_heads = 96
  model.head_dim = 128
  model.mlp_dim = 49_152
  model.remat = "full"
  config.optim.peak_learning_rate = 6e-5
  config.optim.warmup_steps = 114
  config.mesh.fsdp = 128
  config.mesh.tensor = 8
  config.mesh.rules.vocab = ()
  config.step.accumulation_steps = 3
  return config
