"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) as functions of trees.

The base model is frozen. A tree of its own is trained: a pair A, B for each adapted
weight W, and the task's head if it has one. Each step computes with
`merge(base, adapters)`, which has W + (alpha / rank) A B for W. So there is one forward
pass, and merged and unmerged models are the same by construction.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.models.transformer import Transformer
from flaxlm.models.trees import named_leaves
from flaxlm.training.optim import MUON_DIMENSIONS

_VOCABULARY_HEADS = ("lm", "mlm")  # of the base model; other heads are the task's


def init(
  model: Transformer, rank: int, alpha: float, targets: tuple[str, ...], seed: int = 0
) -> dict:
  """Returns adapters for the weights named in `targets`, in all layers.

  B is zero, so `merge` with them returns the model to the last bit.

  Raises:
    ConfigError: a target is not a matrix of the layers of this model.
  """
  assert rank > 0 and alpha > 0
  adapters, found, key = {}, set(), jax.random.key(seed)
  for number, (name, weight) in enumerate(named_leaves(model).items()):
    last = name.split("/")[-1]
    if last not in targets or last not in MUON_DIMENSIONS or "blocks/" not in name:
      continue
    found.add(last)
    lead, size_in, size_out = _split_shape(last, weight.shape)
    a = jax.random.normal(jax.random.fold_in(key, number), (*lead, size_in, rank))
    # A is scaled like the weights of a dense layer; the product is zero at first.
    adapters[name.replace("/", ".")] = {
      "a": nnx.Param(a / math.sqrt(size_in), axes=(None,) * a.ndim),
      "b": nnx.Param(jnp.zeros((*lead, rank, size_out)), axes=(None,) * a.ndim),
    }
  if unknown := sorted(set(targets) - found):
    has = {name.split("/")[-1] for name in named_leaves(model) if "blocks/" in name}
    raise ConfigError(
      "config.lora.targets",
      " ".join(unknown),
      "matrices of the layers: " + " ".join(sorted(has & MUON_DIMENSIONS.keys())),
      "query,value",
    )
  trained = {"adapters": adapters}
  if model.config.head not in _VOCABULARY_HEADS:
    trained["head"] = model.head
  return trained


def _split_shape(name: str, shape: tuple[int, ...]) -> tuple[tuple, int, int]:
  """Returns (leading dimensions, rows, columns) of a weight as a matrix."""
  summed = np.atleast_1d(MUON_DIMENSIONS[name].reduction_axis)
  first, last = int(summed[0]), int(summed[-1]) + 1
  return shape[:first], math.prod(shape[first:last]), math.prod(shape[last:])


def merge(model: Transformer, trained: dict, alpha: float) -> Transformer:
  """Returns the model with the adapters added to its weights, and the trained head."""
  adapters = trained["adapters"]

  def add(path, weight):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    names = names[:-1] if names[-1] == "value" else names
    adapter = adapters.get(".".join(names))
    if adapter is None:
      return weight
    a, b = adapter["a"][...], adapter["b"][...]
    change = (alpha / a.shape[-1]) * jnp.einsum("...IR,...RO->...IO", a, b)
    return weight + change.reshape(weight.shape)

  merged = jax.tree_util.tree_map_with_path(add, model)
  if "head" in trained:
    merged.head = trained["head"]
  return merged
