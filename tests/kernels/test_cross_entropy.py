"""The fused loss equals the plain one, repeats no product and needs less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxlm.kernels import cross_entropy
from flaxlm.kernels.cross_entropy import Split, chunk_tokens, linear_cross_entropy
from flaxlm.parallel.mesh import make_mesh

T, D, V = 300, 16, 48
WHOLE = Split()


def inputs(dtype=jnp.float32):
  """Returns x, weight, targets, scale, bias."""
  keys = jax.random.split(jax.random.key(1), 5)
  x = jax.random.normal(keys[0], (T, D)).astype(dtype)
  w = (0.5 * jax.random.normal(keys[1], (D, V))).astype(dtype)
  targets = jax.random.randint(keys[2], (T,), -1, V)  # -1: nothing to predict
  scale = jnp.where(targets < 0, 0.0, jax.random.uniform(keys[3], (T,)))
  return x, w, targets, scale, jax.random.normal(keys[4], (V,))


def plain(x, w, targets, scale, bias=None, softcap=0.0, z_loss=0.0):
  """The definition, for JAX to differentiate."""
  logits = jnp.einsum("TD,DV->TV", x, w, preferred_element_type=jnp.float32)
  logits = logits if bias is None else logits + bias[None, :]
  logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
  log_z = jax.nn.logsumexp(logits, axis=1)
  nats = log_z - jnp.where(targets < 0, 0.0, logits[jnp.arange(len(x)), targets])
  return jnp.sum(scale * (nats + z_loss * log_z**2)), nats


def fused(x, w, targets, scale, bias=None, **options):
  return linear_cross_entropy(x, w, targets, scale, bias_V=bias, **options)


def differentiate(loss, arrays, **options):
  """Returns ((sum, nats), gradients of x, weight and bias)."""
  which = (0, 1, 4) if len(arrays) == 5 else (0, 1)
  function = functools.partial(loss, **options)
  return jax.jit(jax.value_and_grad(function, which, has_aux=True))(*arrays)


def assert_close(got, expected, relative):
  """Asserts equality up to `relative` times the largest value of each array."""
  (total, nats), gradients = expected
  for a, b in zip(
    jax.tree.leaves(got), jax.tree.leaves(((total, nats), gradients)), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())


@pytest.fixture(params=[0, 128], ids=["whole", "chunks"])
def chunk(request, monkeypatch):
  """All 300 tokens at once, or 128 at a time: the last chunk is not full."""
  if request.param:
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", request.param * V * 4)
    assert chunk_tokens(T, V) == request.param
  return request.param


OPTIONS = [
  {},
  {"z_loss": 1e-2},
  {"softcap": 3.0},
  {"softcap": 3.0, "z_loss": 1e-2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_plain_loss_and_all_its_gradients(chunk, options, with_bias):
  arrays = inputs()[: 4 + with_bias]
  got = differentiate(fused, arrays, **options)
  assert_close(got, differentiate(plain, arrays, **options), 1e-6)
  # The same without a gradient, as in evaluation.
  total, nats = jax.jit(functools.partial(fused, **options))(*arrays)
  np.testing.assert_allclose(total, got[0][0], rtol=1e-6)
  np.testing.assert_allclose(nats, got[0][1], rtol=1e-6)


def test_bfloat16_is_rounded_once_or_twice(chunk):
  """Logits and sums are float32, so only d and the result are rounded."""
  arrays = inputs(jnp.bfloat16)
  exact = [a.astype(jnp.float32) if a.ndim == 2 else a for a in arrays]
  (got, gradients), expected = differentiate(fused, arrays), differentiate(plain, exact)
  assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  assert_close((got, ()), (expected[0], ()), 1e-6)
  assert_close((got, gradients), expected, 2**-7)


def test_the_gradient_follows_the_factor_of_the_loss(chunk):
  arrays = inputs()[:4]

  def tripled(*arrays):
    total, nats = fused(*arrays)
    return 3 * total + jnp.sum(nats), nats  # nats carry no gradient

  one, three = differentiate(fused, arrays)[1], differentiate(tripled, arrays)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), one, three)


@pytest.mark.faults
def test_extreme_logits_stay_finite(chunk):
  x, w, *rest = inputs()
  (total, nats), gradients = differentiate(fused, (1e4 * x, 1e4 * w, *rest))
  assert all(np.isfinite(a).all() for a in (total, nats, *gradients))


def compiled(T, D, V, which=(0, 1), split=WHOLE, place=lambda *axes: None, **options):
  """Returns the compiled gradient with respect to `which` of x and weight."""

  def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place(*axes))

  tokens, vocab = split.tokens or None, split.vocab or None
  arrays = (
    array((T, D), jnp.float32, tokens), array((D, V), jnp.float32, None, vocab),
    array((T,), jnp.int32, tokens), array((T,), jnp.float32, tokens),
  )  # fmt: skip

  def loss(*arrays):
    return fused(*arrays, split=split, **options)

  return jax.jit(jax.grad(loss, which, has_aux=True)).lower(*arrays).compile()


@pytest.mark.parametrize("which, products", [((0, 1), 3), ((0,), 2)])
def test_nothing_is_computed_twice(chunk, which, products):
  """Three products, or two if the matrix is frozen, as with LoRA."""
  text = compiled(T, D, V, which).as_text()
  assert len(re.findall(r"= \S+ dot\(", text)) == products
  assert len(re.findall(r" exponential\(", text)) == 1


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
  monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 1 << 27)
  tokens, width = 8192, 8

  def temporary(vocab):
    memory = compiled(tokens, width, vocab).memory_analysis()
    # The gradient's sum over chunks, and one chunk's addend.
    return memory.temp_size_in_bytes - 2 * 4 * width * vocab

  small, large = temporary(8192), temporary(131_072)
  assert small < 2.2 * (1 << 27)  # a chunk's logits and their gradient
  assert large < 1.15 * small


def test_chunks_are_as_large_as_the_budget_allows():
  assert chunk_tokens(8192, 4096) == 8192
  assert chunk_tokens(8192, 50_257) == 4096
  assert chunk_tokens(8192, 128_256) == 2048
  assert chunk_tokens(5000, 128_256) == 1792  # whole tiles
  assert chunk_tokens(100, 10**9) == 100


MESHES = [
  {"data": 8},
  {"data": 2, "fsdp": 4},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"fsdp": 2, "tensor": 2, "stage": 2},
  {"tensor": 8},
]


def placed(sizes):
  mesh = make_mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | sizes))
  axes = {name for name, size in sizes.items() if size > 1}
  split = Split(
    tuple(a for a in ("data", "fsdp") if a in axes),
    tuple(a for a in ("tensor", "stage") if a in axes),
    tuple(a for a in ("fsdp",) if a in axes),
  )
  return mesh, split


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(sizes))
def test_eight_devices_compute_what_one_does(sizes, monkeypatch):
  monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 128 * 4 * V)
  arrays = [jnp.tile(a, (8,) + (1,) * (a.ndim - 1))[:2048] for a in inputs()]
  arrays[1], arrays[4] = inputs()[1], inputs()[4]
  options = {"z_loss": 1e-2, "softcap": 5.0}
  expected = differentiate(plain, arrays, **options)
  mesh, split = placed(sizes)
  with jax.set_mesh(mesh):
    assert_close(differentiate(fused, arrays, split=split, **options), expected, 2e-6)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(sizes))
def test_no_device_gets_logits_or_tokens_of_others(sizes, monkeypatch):
  """Devices exchange only sums of gradients and, if split, two numbers per token."""
  monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 128 * 4 * V)
  mesh, split = placed(sizes)

  def place(*axes):
    return NamedSharding(mesh, P(*axes))

  with jax.set_mesh(mesh):
    text = compiled(2048, D, V, (0, 1), split, place).as_text()
  assert "all-gather" not in text and "all-to-all" not in text
  assert "collective-permute" not in text
  # Each product has only a device's own tokens and vocabulary.
  tokens = 2048 // np.prod([mesh.shape[a] for a in split.tokens], dtype=int)
  vocab = V // np.prod([mesh.shape[a] for a in split.vocab], dtype=int)
  size = chunk_tokens(int(tokens), int(vocab))
  assert f"f32[{size},{vocab}]" in text
  assert f"f32[{2 * size},{vocab}]" not in text
