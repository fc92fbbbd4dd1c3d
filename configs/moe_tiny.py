"""A small mixture of experts: the quickstart's model with 2 of 8 experts per token.

  python -m flaxlm.prepare --config=configs/moe_tiny.py
  python -m flaxlm.train --config=configs/moe_tiny.py --workdir=runs/moe_tiny

It uses the quickstart's token store and takes a few minutes on 2 CPU cores. Experts
have room for twice their fair share. On a CPU that costs half as much as the dropless
form, and once the loads are even, no token is dropped.
"""

from . import quickstart


def get_config():
  config = quickstart.get_config()
  config.hardware = "cpu"
  moe = config.model.moe
  moe.num_experts = 8
  moe.experts_per_token = 2
  moe.expert_dim = 176  # two of them are as wide as the quickstart's MLP
  moe.capacity_factor = 2.0
  return config
