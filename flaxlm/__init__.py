"""flaxlm: language models in JAX/Flax, from raw text to a checkpoint people use."""

__version__ = "0.1.0"


def load(path, step: int | None = None, mesh=None):
  """Loads a trained model to ask; returns a `LanguageModel`. See flaxlm/LIBRARY.md.

  Args:
    path: a run (`runs/a`), one of its checkpoints (`runs/a/checkpoints/500`), or a
      directory with a Hugging Face model.
    step: of the checkpoint; None is the newest.
    mesh: the devices (`jax.sharding.Mesh`); None is the first device.
  """
  from flaxlm.open_model import load_model  # JAX is imported only now

  return load_model(path, step, mesh)
