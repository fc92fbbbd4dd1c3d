"""The list of operations, against the FLOPs and weights of the model itself."""

import importlib
import math

import jax
import pytest
from flax import nnx

from flaxlm.models.config import TransformerConfig
from flaxlm.models.cost import flops_per_token
from flaxlm.models.transformer import Transformer
from flaxlm.parallel import AXES
from flaxlm.planning.operations import layer_parameters, operations

NAMES = (
  "gpt2_124m", "llama3_8b", "gemma2_2b", "mistral_7b", "olmoe_1b_7b",
  "deepseek_moe_16b", "bert_base",
)  # fmt: skip


def load(name):
  return importlib.import_module(f"configs.{name}").get_config()


def mesh(**sizes):
  return dict.fromkeys(AXES, 1) | sizes


def flops(ops, kind):
  return sum(op.count * op.flops for op in ops if op.kind == kind)


@pytest.mark.parametrize("name", NAMES)
def test_operations_add_up_to_the_models_flops(name):
  config = load(name)
  config.model.moe.capacity_factor = 0.0
  tokens = config.data.batch_size * config.data.seq_len
  expected = flops_per_token(config.model, config.data.seq_len) * tokens
  for sizes in (mesh(), mesh(data=2, fsdp=2), mesh(tensor=2, fsdp=4, slice=2)):
    if name == "mistral_7b" and config.data.batch_size % math.prod(sizes.values()):
      continue
    ops = operations(config, sizes, flash=True)
    # A fused kernel does 7 products, where model FLOPs count 6.
    found = flops(ops, "matmul") + flops(ops, "attention") * 6 / 7
    assert found * math.prod(sizes.values()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_counted(name):
  config = load(name)
  model = jax.eval_shape(
    lambda key: Transformer(TransformerConfig(**config.model), nnx.Rngs(key)),
    jax.random.key(0),
  )
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
  # Norms, biases and BERT's heads are left out.
  assert sum(layer_parameters(config)) == pytest.approx(count, rel=0.015)


def test_masked_pairs_and_recomputation_cost_extra():
  config = load("gpt2_124m")
  config.model.remat = "none"
  sparse, full = (
    flops(operations(config, mesh(), flash), "attention") for flash in (True, False)
  )
  length = config.data.seq_len
  assert full / sparse == pytest.approx(6 * length / (7 * (length + 1) / 2))
  config.model.remat = "full"
  ops = operations(config, mesh(), False)
  products = [op for op in ops if op.kind == "matmul"]
  # Forward is one of three products; the output projection is not recomputed.
  assert [op.again for op in products[:-1]] == [pytest.approx(1 / 3)] * (
    len(products) - 1
  )
  assert products[-1].again == 0


def test_pipeline_and_accumulation_cut_tokens_not_work():
  config = load("gpt2_124m")
  config.data.batch_size, config.step.accumulation_steps = 32, 1
  whole = operations(config, mesh(), False)
  config.step.accumulation_steps = 4
  parts = operations(config, mesh(), False)
  assert flops(parts, "matmul") == flops(whole, "matmul")
  assert parts[0].dims[1] * 4 == whole[0].dims[1]
  config.step.accumulation_steps = 1
  config.mesh.microbatches = 8
  staged = operations(config, mesh(stage=2), False)
  assert staged[0].dims[1] * 8 == whole[0].dims[1]
  assert flops(staged, "attention") * 2 == flops(whole, "attention")
