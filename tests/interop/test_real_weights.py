"""Real weights: runs tests/benchmarks/real_weights.py."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "real_weights.py"
MODELS = ("minilm", "antiberty heavy", "antiberty light", "sapiens vh", "sapiens vl",
          "smollm2")  # fmt: skip


@pytest.mark.slow
def test_real_models_compute_what_they_compute_in_transformers():
  for library in ("torch", "transformers", "gguf", "accelerate"):
    pytest.importorskip(library, reason=f"real weights need {library}")
  # As a user would run it: on one device, with the compiler's optimisations.
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, SCRIPT]
  result = subprocess.run(command, capture_output=True, text=True, env=env)
  if result.returncode == 69:
    pytest.skip(result.stderr[-300:])
  assert result.returncode == 0, result.stderr[-3000:]
  for name in MODELS:
    assert f"{name} features" in result.stdout, result.stdout
  assert "smollm2 answers" in result.stdout and "smollm2 continued" in result.stdout
