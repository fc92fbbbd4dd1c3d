"""The chunked loss is the plain one, and needs less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.kernels.cross_entropy import linear_cross_entropy


def inputs(T=30, D=16, V=50):
  keys = jax.random.split(jax.random.key(1), 3)
  x = jax.random.normal(keys[0], (T, D))
  w = jax.random.normal(keys[1], (D, V))
  return x, w, jax.random.randint(keys[2], (T,), 0, V)


def test_equals_log_softmax():
  x, w, targets = inputs()
  loss, penalty = linear_cross_entropy(x, w, targets, z_loss=0.5)
  logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  expected = log_z - logits[np.arange(30), np.asarray(targets)]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(penalty, 0.5 * log_z**2, rtol=1e-5)


def test_bias_and_softcap_come_before_the_softmax():
  x, w, targets = inputs()
  bias = jnp.linspace(-2, 2, 50)
  loss, _ = linear_cross_entropy(x, w, targets, bias_V=bias, softcap=3.0)
  logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(bias)
  logits = 3 * np.tanh(logits / 3)
  expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(30), np.asarray(targets)]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 10, 30, 64])
def test_chunks_change_neither_loss_nor_gradient(chunk_size):
  x, w, targets = inputs()

  def total(x, w, chunk_size):
    losses = linear_cross_entropy(x, w, targets, z_loss=1e-2, chunk_size=chunk_size)
    return sum(jnp.sum(part) for part in losses)

  plain = jax.value_and_grad(total, (0, 1))(x, w, 0)
  chunked = jax.value_and_grad(total, (0, 1))(x, w, chunk_size)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), plain, chunked
  )


def test_extreme_logits_stay_finite():
  x, w, targets = inputs()
  loss, _ = linear_cross_entropy(1e4 * x, 1e4 * w, targets)
  assert np.isfinite(loss).all()


def test_chunks_save_memory():
  T, D, V = 1024, 32, 4096
  x, w, targets = jnp.ones((T, D)), jnp.ones((D, V)), jnp.zeros(T, jnp.int32)

  def bytes_needed(chunk_size):
    def total(x, w):
      return jnp.sum(linear_cross_entropy(x, w, targets, chunk_size=chunk_size)[0])

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(x, w).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = T * V * 4
  assert bytes_needed(0) >= logits
  assert bytes_needed(64) < logits / 4


def test_chunks_of_split_tokens_are_split_too():
  """No device gathers the features of the others."""
  from flaxlm.parallel.mesh import make_mesh

  mesh = make_mesh(data=8, fsdp=1, tensor=1)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  x = jax.ShapeDtypeStruct((256, 16), jnp.float32, sharding=place)
  targets = jax.ShapeDtypeStruct((256,), jnp.int32, sharding=place)
  w = jax.ShapeDtypeStruct((16, 50), jnp.float32)

  def total(x, w, targets):
    return jnp.sum(linear_cross_entropy(x, w, targets, chunk_size=64)[0])

  text = jax.jit(jax.grad(total, (0, 1))).lower(x, w, targets).compile().as_text()
  assert "all-gather" not in text
