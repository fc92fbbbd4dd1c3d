"""flaxlm: language models in JAX/Flax, from raw text to a checkpoint people use."""

__version__ = "0.1.0"
