"""The cost per token, against sums made by hand."""

import pytest

from configs import gpt2_124m
from flaxlm.models.cost import flops_per_token


def gpt2(**fields):
  model = gpt2_124m.get_config().model
  for name, value in fields.items():
    group = model.moe if name in model.moe else model
    group[name] = value
  return model


def test_flops_of_gpt2_by_hand():
  # Attention 4 x 768^2 and MLP 2 x 768 x 3072 in 12 layers; the tied head 768 x 50257.
  weights = 12 * (4 * 589_824 + 2 * 2_359_296) + 38_597_376
  assert weights == 123_532_032
  # Per layer and token: a query sees 512.5 keys of 1024 on average; q.k and p.v are 768
  # multiply-adds each, of 2 FLOPs, and the backward pass costs twice the forward.
  attention = 12 * 512.5 * (768 + 768) * 2 * 3
  assert flops_per_token(gpt2(), 1024) == 6 * weights + attention == 797_870_592


def test_flops_follow_the_config():
  base = flops_per_token(gpt2(), 64)
  swiglu = flops_per_token(gpt2(gated_mlp=True), 64)
  assert swiglu - base == 6 * 12 * 768 * 3072
  grouped = flops_per_token(gpt2(num_kv_heads=3), 64)
  assert base - grouped == 6 * 12 * 2 * 768 * (768 - 192)
  # Every query of a row of 4 with window 2 sees 1, 2, 2, 2 keys: 1.75 on average, not
  # 2.5.
  window = flops_per_token(gpt2(sliding_window=2), 4)
  assert flops_per_token(gpt2(), 4) - window == 12 * 12 * 768 * 0.75
  wide = flops_per_token(gpt2(sliding_window=4096), 64)
  assert wide == base
  half = flops_per_token(gpt2(sliding_window=2, layer_pattern=("local", "global")), 4)
  assert flops_per_token(gpt2(), 4) - half == 6 * 12 * 768 * 0.75


def test_an_encoder_sees_both_sides():
  # 4 keys each; with window 2 the four queries see 2, 3, 3, 2 of them.
  causal = flops_per_token(gpt2(), 4)
  both = flops_per_token(gpt2(causal=False), 4)
  assert both - causal == 12 * 12 * 768 * (4 - 2.5)
  near = flops_per_token(gpt2(causal=False, sliding_window=2), 4)
  assert both - near == pytest.approx(12 * 12 * 768 * (4 - 2.5))


def test_only_the_experts_of_a_token_count():
  base = flops_per_token(gpt2(), 64)
  experts = gpt2(
    num_experts=8, experts_per_token=2, expert_dim=512, shared_dim=256,
    first_dense_layers=2,
  )  # fmt: skip
  per_layer = 2 * 768 * (2 * 512 + 256) + 768 * 8 - 2 * 768 * 3072
  assert flops_per_token(experts, 64) - base == 6 * 10 * per_layer
