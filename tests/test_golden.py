"""Unintended changes show up here: losses of 20 steps, tables of weights.

`pytest tests/test_golden.py --update-golden` rewrites the files; review its changes.
"""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from flaxlm.config.load import load_config
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer, describe_weights
from flaxlm.training.optim import make_optimizer
from flaxlm.training.state import init_state, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
SHIPPED = [
  p.stem for p in sorted((ROOT / "configs").glob("[a-z]*.py")) if p.stem != "base"
]


def compare(name: str, text: str, update: bool) -> str:
  """Returns the file's content, after writing `text` to it with --update-golden."""
  path = GOLDEN / name
  if update:
    path.write_text(text)
  assert path.exists(), f"{path} is missing: run pytest --update-golden"
  return path.read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_of_a_shipped_config(name, request):
  config = TransformerConfig(**load_config(ROOT / f"configs/{name}.py").model)
  model = jax.eval_shape(
    lambda key: Transformer(config, nnx.Rngs(key)), jax.random.key(0)
  )
  rows = [
    f"{path:<28} {' x '.join(map(str, shape)):<24} "
    + " ".join(str(axis or "-") for axis in axes)
    for path, shape, axes in describe_weights(model)
  ]
  total = sum(int(np.prod(shape)) for _, shape, _ in describe_weights(model))
  text = "\n".join([*rows, f"{total:,} parameters"]) + "\n"
  update = request.config.getoption("--update-golden")
  assert compare(f"{name}_weights.txt", text, update) == text


def test_losses_of_twenty_steps(tiny, request):
  tx, rate = make_optimizer(tiny.num_steps, **tiny.optim)
  model = TransformerConfig(**tiny.model)
  state = jax.jit(lambda key: init_state(key, model, tx, 0.0))(jax.random.key(0))
  step = jax.jit(make_train_step(tx, rate, **tiny.step))
  batches = SyntheticBatches(tiny.data.seq_len, tiny.data.batch_size, 0, 64)
  losses = []
  for i in range(20):
    state, metrics = step(state, batches[i % 4])
    losses.append(float(metrics["loss"]))
  text = "".join(f"{loss:.6f}\n" for loss in losses)
  golden = compare("tiny_loss.txt", text, request.config.getoption("--update-golden"))
  # Processors may differ in the order of sums; a changed default moves the third digit.
  np.testing.assert_allclose(losses, list(map(float, golden.split())), rtol=1e-4)
