"""8-bit products: close to the exact ones, used where requested and nowhere else."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.config.check import check_config
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.errors import ConfigError
from flaxlm.inference.decoding import generate
from flaxlm.inference.sampling import Sampling
from flaxlm.kernels.matmul_8bit import quantize, quantized_matmul
from flaxlm.parallel.mesh import make_mesh
from flaxlm.runs import program

T, I, O = 64, 128, 96  # noqa: E741
# Relative error of (product, dx, dw). A float with m fraction bits is off by up to
# 2^-(m+1) of itself, an int8 by half of 1/127 of its row's largest value.
BOUNDS = {"fp8": (0.045, 0.07, 0.07), "int8": (0.012, 1e-6, 1e-6)}


def random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def distance(a, b) -> float:
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("kind", BOUNDS)
def test_is_near_the_exact_product_and_gradient(kind):
  # Rows and columns of very different scales, as in activations.
  x = random(T, I) * 10.0 ** jnp.linspace(-3, 3, T)[:, None]
  w, g = 0.02 * random(I, O, seed=1), random(T, O, seed=2)
  y, backward = jax.vjp(lambda x, w: quantized_matmul(x, w, kind), x, w)
  _, exact = jax.vjp(lambda x, w: jnp.einsum("TI,IO->TO", x, w), x, w)
  rows = [distance(a, b) for a, b in zip(y, jnp.einsum("TI,IO->TO", x, w), strict=True)]
  limits = BOUNDS[kind]
  assert 1e-3 < max(rows) < 1.2 * limits[0]
  for got, expected, limit in zip(backward(g), exact(g), limits[1:], strict=True):
    assert distance(got, expected) < limit


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_row_depends_on_no_other(kind):
  x, w, g = random(T, I), random(I, O, seed=1), random(T, O, seed=2)

  def first_row(x, g):
    y, backward = jax.vjp(lambda x: quantized_matmul(x, w, kind), x)
    return y[0], backward(g)[0][0]

  alone = first_row(x, g)
  disturbed = first_row(x.at[1:].multiply(1e4), g.at[1:].multiply(1e4))
  jax.tree.map(np.testing.assert_array_equal, alone, disturbed)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8])
def test_the_largest_number_is_kept_and_zeros_stay_zeros(dtype):
  x = random(4, 8).at[2].set(0.0)
  x8, scale = quantize(x, dtype, 1)
  back = x8.astype(jnp.float32) * scale
  np.testing.assert_allclose(jnp.abs(back).max(1), jnp.abs(x).max(1), rtol=1e-6)
  assert not back[2].any() and x8.dtype == dtype


def test_what_is_not_a_number_is_not_hidden():
  w = random(I, O)
  for bad in (jnp.nan, jnp.inf):
    y = quantized_matmul(random(T, I).at[3, 3].set(bad), w, "fp8")
    assert jnp.isnan(y[3]).all() and jnp.isfinite(y[4]).all()


def products(config, mesh=None) -> collections.Counter:
  """Counts the products of the lowered training step by type."""
  mesh = mesh or make_mesh(jax.devices()[:1], data=1, fsdp=1, tensor=1)
  built = program.build_program(config, mesh)
  with program.use_config_mesh(config, mesh):
    batch = program.abstract_batch(config, mesh)
    text = built.train_step.lower(built.target, batch, None).as_text()
  types = re.findall(
    r"dot_general.*\(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", text
  )
  return collections.Counter(types)


@pytest.mark.parametrize(
  ("gated", "remat"),
  [
    (False, "none"),
    (True, "full"),
    pytest.param(True, "none", marks=pytest.mark.slow),
    pytest.param(False, "full", marks=pytest.mark.slow),
  ],
)
def test_every_matrix_of_the_layers_is_quantised_and_nothing_else(tiny, gated, remat):
  tiny.model.gated_mlp, tiny.model.remat = gated, remat
  tiny.model.dtype = "bfloat16"
  matrices = 4 + 2 + gated
  # The backward pass recomputes all but the last, which it does not need.
  forward = matrices + (matrices - 1) * (remat == "full")
  plain = products(tiny)
  tiny.model.quantize = "fp8"
  found = products(tiny)
  assert found.total() == plain.total()
  e4m3, e5m2 = "f8E4M3FN", "f8E5M2"
  quantised = {(e4m3, e4m3): forward, (e5m2, e4m3): matrices, (e4m3, e5m2): matrices}
  assert {types: n for types, n in found.items() if "f8" in "".join(types)} == quantised
  tiny.model.quantize = "int8"
  found = products(tiny)
  assert found.total() == plain.total()
  assert found[("i8", "i8")] == forward


def train(config, steps: int, mesh=None) -> list[float]:
  """Returns losses of a model that memorises a few sentences."""
  mesh = mesh or make_mesh(jax.devices()[:1], data=1, fsdp=1, tensor=1)
  built = program.build_program(config, mesh)
  losses = []
  with program.use_config_mesh(config, mesh):
    state = built.init(jax.random.key(0))
    for i in range(steps):
      rows = SyntheticBatches(config.data.seq_len, config.data.batch_size, 0, 64)[i % 4]
      state, metrics = built.train_step(state, rows, None)
      losses.append(float(metrics["loss"]))
  return losses


@pytest.fixture
def learner(tiny):
  tiny.model.dtype = "bfloat16"
  tiny.num_steps, tiny.optim.warmup_steps = 100, 10
  tiny.optim.peak_learning_rate = 1e-2
  return tiny


# Rows have only 32 numbers with 3 fraction bits each, so rounding averages out less
# than in wide models.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "distance"), [("fp8", 0.03), ("int8", 0.02)])
def test_training_in_8_bits_ends_where_bfloat16_does(learner, kind, distance):
  final = {}
  for name in ("none", kind):
    learner.model.quantize = name
    losses = train(learner, learner.num_steps)
    final[name] = np.mean(losses[-8:])
    first = losses[0]
  assert final["none"] < 0.5 * first  # it has learnt something
  assert abs(final[kind] - final["none"]) < distance * (first - final["none"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_eight_devices_compute_what_one_does(learner, kind):
  learner.model.quantize, learner.model.dtype = kind, "float32"
  learner.model.remat = "full"
  expected = train(learner, 4)
  learner.mesh.data, learner.mesh.fsdp, learner.mesh.tensor = 2, 2, 2
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  assert products(learner, mesh).keys() == products(learner).keys()
  np.testing.assert_allclose(train(learner, 4, mesh), expected, rtol=2e-3)


@pytest.mark.parametrize("kind", [pytest.param("fp8", marks=pytest.mark.slow), "int8"])
def test_decoding_depends_on_no_other_prompt(tiny, kind):
  from flax import nnx

  from flaxlm.models.config import TransformerConfig
  from flaxlm.models.transformer import Transformer

  tiny.model.quantize = kind
  model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(0))

  def write(*prompts):
    allowed = np.ones(64, bool)
    parts = generate(model, [list(p) for p in prompts], 8, Sampling(0.0), allowed)
    return np.concatenate(list(parts), axis=1)

  alone = write([5, 6, 7, 8])
  np.testing.assert_array_equal(write([5, 6, 7, 8], [9, 1, 2, 3])[:1], alone)


def test_experts_are_refused(tiny):
  tiny.model.quantize, tiny.model.moe.num_experts = "fp8", 4
  with pytest.raises(ConfigError, match=r"model.quantize"):
    check_config(tiny)
