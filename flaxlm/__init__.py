"""flaxlm: language models in JAX/Flax, from raw text to a checkpoint people use."""
