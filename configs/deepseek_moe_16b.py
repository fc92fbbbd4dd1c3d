"""DeepSeekMoE 16B (Dai et al. 2024): 6 of 64 experts plus 2 shared, for 64 devices.

  python -m flaxlm.train --config=configs/deepseek_moe_16b.py \
    --workdir=runs/deepseek_moe_16b

Not trained here: no result is claimed. 16.4B parameters, of which 2.8B are active per
token; the first layer is dense. The published settings: 2T tokens, and a learning rate
that is constant until 80% (then theirs falls in two steps, ours linearly).
"""

from . import llama2_7b


def get_config():
  config = llama2_7b.get_config()
  config.hardware = "v5p:4x4x4"
  config.num_steps = 106_449
  config.tokenizer.vocab_size = 100_000
  config.data.store = "data/c4_deepseek"
  config.data.batch_size = 4608
  model = config.model
  model.vocab_size = 102_400
  model.num_layers = 28
  model.embed_dim = 2048
  model.num_heads = 16
  model.num_kv_heads = 16
  model.mlp_dim = 10_944
  model.norm_epsilon = 1e-6
  model.moe.num_experts = 64
  model.moe.experts_per_token = 6
  model.moe.expert_dim = 1408
  model.moe.shared_dim = 2 * 1408
  model.moe.first_dense_layers = 1
  model.moe.renormalize = False
  model.moe.aux_loss = 0.001 / 6  # theirs averages over the 6 choices, ours sums
  config.optim.peak_learning_rate = 4.2e-4
  config.optim.schedule = "wsd"
  config.optim.epsilon = 1e-8
  config.step.accumulation_steps = 36
  return config
