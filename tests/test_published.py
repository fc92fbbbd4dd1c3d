"""Shipped configs have the sizes of the published models, to the last weight.

There are three references: published totals, transformers' own models (on torch's meta
device, which needs no memory), and tables of papers, to the digits that they print.
"""

import math
import pathlib

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from flaxlm.config.load import load_config
from flaxlm.models.config import TransformerConfig
from flaxlm.models.cost import flops_per_token
from flaxlm.models.transformer import Transformer, describe_weights
from flaxlm.parallel import AXES
from flaxlm.parallel.mesh import axis_sizes
from flaxlm.training.state import with_shardings

DIRECTORY = pathlib.Path(__file__).parents[1] / "configs"
SHIPPED = [p.stem for p in sorted(DIRECTORY.glob("[a-z]*.py")) if p.stem != "base"]
# Parameters, with tied tables counted once, as in safetensors files and model cards.
TOTALS = {
  "bert_base": 110_106_428,
  "bert_large": 336_226_108,
  "bert_tiny": 4_433_468,
  "deepseek_moe_16b": 16_375_728_128,
  "gemma2_2b": 2_614_341_888,
  "gemma2_9b": 9_241_705_984,
  "gemma3_1b": 999_885_952,
  "gemma3_4b": 3_880_263_168,
  "gpt2_124m": 124_439_808,
  "gpt2_355m": 354_823_168,
  "gpt2_774m": 774_030_080,
  "gpt2_1_5b": 1_557_611_200,
  "llama2_7b": 6_738_415_616,
  "llama2_13b": 13_015_864_320,
  "llama2_70b": 68_976_648_192,
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3_1_8b": 8_030_261_248,
  "llama3_2_1b": 1_235_814_400,
  "llama3_2_3b": 3_212_749_824,
  "mistral_7b": 7_241_732_096,
  "mixtral_8x7b": 46_702_792_704,
  "modernbert_base": 149_655_232,
  "modernbert_large": 395_881_664,
  "olmo2_1b": 1_484_916_736,
  "olmo2_7b": 7_298_617_344,
  "olmoe_1b_7b": 6_919_161_856,
  "qwen2_5_0_5b": 494_032_768,
  "qwen2_5_7b": 7_615_616_512,
  "qwen3_0_6b": 596_049_920,
  "qwen3_8b": 8_190_735_360,
  "qwen3_30b_a3b": 30_532_122_624,
  "smollm2_135m": 134_515_008,
  "smollm2_360m": 361_821_120,
  "smollm2_1_7b": 1_711_376_384,
}
# Brown et al. 2020, table D.1: millions of parameters, and how far they are rounded.
GPT3 = {
  "gpt3_125m": (125, 0),
  "gpt3_350m": (356, 0),
  "gpt3_760m": (760, 0),
  "gpt3_1_3b": (1_320, -1),
  "gpt3_2_7b": (2_650, -1),
  "gpt3_6_7b": (6_660, -1),
  "gpt3_13b": (12_850, -1),
  "gpt3_175b": (174_600, -2),
}
# Billions of active parameters per token, as published.
ACTIVE = {
  "deepseek_moe_16b": 2.8,
  "mixtral_8x7b": 12.9,
  "olmoe_1b_7b": 1.3,
  "qwen3_30b_a3b": 3.3,
}


def load(name: str):
  return load_config(DIRECTORY / f"{name}.py")


def abstract(model):
  config = TransformerConfig(**model)
  return jax.eval_shape(
    lambda key: Transformer(config, nnx.Rngs(key)), jax.random.key(0)
  )


def count(name: str) -> int:
  return sum(
    math.prod(shape) for _, shape, _ in describe_weights(abstract(load(name).model))
  )


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_divide_over_the_mesh_that_the_config_asks_for(name):
  config = load(name)
  sizes = axis_sizes(config.mesh)
  sizes["data"] = max(sizes["data"], 1)
  placed = with_shardings(
    abstract(config.model),
    AbstractMesh(tuple(sizes.values()), AXES),
    config.mesh.rules.to_dict(),
  )
  total = sum(array.size for array in jax.tree.leaves(placed))
  share = sum(
    math.prod(array.sharding.shard_shape(array.shape))
    for array in jax.tree.leaves(placed)
  )
  # 16 bytes per weight (gradient, two moments) leave half of 80 GB for activations.
  assert 16 * share < 40e9
  split = math.prod(
    sizes[axis] for axis in ("stage", "fsdp", "expert", "context", "tensor")
  )
  assert share < 1.1 * total / split


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_are_those_of_the_published_model(name):
  assert count(name) == TOTALS[name]


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_has_the_sizes_of_its_paper(name):
  millions, digits = GPT3[name]
  assert round(count(name) / 1e6, digits) == millions


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_uses_as_many_parameters_as_published(name):
  model = load(name).model
  attention = 12 * model.num_layers * model.num_heads * model.head_dim
  matrices = (flops_per_token(model, 1) - attention) / 6
  embeddings = model.vocab_size * model.embed_dim  # a look-up costs no FLOPs
  # Some round, some truncate: Qwen publishes 3.35 as 3.3, Mixtral 12.88 as 12.9.
  assert abs((matrices + embeddings) / 1e9 - ACTIVE[name]) < 0.06


def llama(dim, mlp, layers, heads, kv_heads, vocab, tied=False, **more):
  """Arguments of transformers' configs, most of which share these names."""
  shapes = {"hidden_size": dim, "intermediate_size": mlp, "num_hidden_layers": layers}
  shapes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
  return shapes | {"vocab_size": vocab, "tie_word_embeddings": tied} | more


def bert(dim, layers, heads):
  return {
    "hidden_size": dim, "intermediate_size": 4 * dim, "num_hidden_layers": layers,
    "num_attention_heads": heads,
  }  # fmt: skip


# Empty means that transformers' defaults are that model.
THEIRS = {
  "bert_base": ("bert", {}),
  "bert_large": ("bert", bert(1024, 24, 16)),
  "bert_tiny": ("bert", bert(128, 2, 2)),
  "gemma2_2b": ("gemma2", {}),
  "gemma2_9b": ("gemma2", llama(3584, 14336, 42, 16, 8, 256_000, True)),
  "gemma3_1b": ("gemma3_text", llama(1152, 6912, 26, 4, 1, 262_144, True)),
  "gemma3_4b": ("gemma3_text", llama(2560, 10240, 34, 8, 4, 262_208, True)),
  "gpt2_124m": ("gpt2", {}),
  "gpt2_355m": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
  "gpt2_774m": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
  "gpt2_1_5b": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
  "llama2_7b": ("llama", {}),
  "llama2_13b": ("llama", llama(5120, 13824, 40, 40, 40, 32_000)),
  "llama2_70b": ("llama", llama(8192, 28672, 80, 64, 8, 32_000)),
  "llama3_8b": ("llama", llama(4096, 14336, 32, 32, 8, 128_256)),
  "llama3_70b": ("llama", llama(8192, 28672, 80, 64, 8, 128_256)),
  "llama3_2_1b": ("llama", llama(2048, 8192, 16, 32, 8, 128_256, True, head_dim=64)),
  "llama3_2_3b": ("llama", llama(3072, 8192, 28, 24, 8, 128_256, True)),
  "mistral_7b": ("mistral", {}),
  "mixtral_8x7b": ("mixtral", {}),
  "modernbert_base": ("modernbert", {}),
  "modernbert_large": ("modernbert", bert(1024, 28, 16) | {"intermediate_size": 2624}),
  "olmo2_1b": ("olmo2", llama(2048, 8192, 16, 16, 16, 100_352)),
  "olmo2_7b": ("olmo2", {"vocab_size": 100_352}),
  "olmoe_1b_7b": ("olmoe", {"intermediate_size": 1024}),
  "qwen2_5_0_5b": ("qwen2", llama(896, 4864, 24, 14, 2, 151_936, True)),
  "qwen2_5_7b": ("qwen2", llama(3584, 18944, 28, 28, 4, 152_064)),
  "qwen3_0_6b": ("qwen3", llama(1024, 3072, 28, 16, 8, 151_936, True)),
  "qwen3_8b": ("qwen3", llama(4096, 12288, 36, 32, 8, 151_936)),
  "qwen3_30b_a3b": ("qwen3_moe", {"num_hidden_layers": 48, "head_dim": 128}),
  "smollm2_135m": ("llama", llama(576, 1536, 30, 9, 3, 49_152, True)),
  "smollm2_360m": ("llama", llama(960, 2560, 32, 15, 5, 49_152, True)),
  "smollm2_1_7b": ("llama", llama(2048, 8192, 24, 32, 32, 49_152, True)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_counts_the_same(name):
  torch = pytest.importorskip("torch", reason="counts transformers' models")
  transformers = pytest.importorskip("transformers", reason="its models are counted")
  model_type, shapes = THEIRS[name]
  heads = {
    "bert": transformers.AutoModelForPreTraining,
    "modernbert": transformers.AutoModelForMaskedLM,
  }
  model_class = heads.get(model_type, transformers.AutoModelForCausalLM)
  with torch.device("meta"):
    model = model_class.from_config(
      transformers.AutoConfig.for_model(model_type, **shapes)
    )
  assert sum(weight.numel() for weight in model.parameters()) == count(name)
