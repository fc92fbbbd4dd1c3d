"""`flaxlm lm-eval`: its own flags, and a cache that belongs to the weights."""

import pytest

from flaxlm import lm_eval
from flaxlm.errors import ConfigError


def test_the_cache_is_named_after_the_weights():
  given = ["--tasks", "a", "--use_cache", "cache/x", "-c=y", "--use_cache=z", "-c", "w"]
  named = lm_eval._name_caches(given, "abc")
  assert named == [
    *("--tasks", "a", "--use_cache", "cache/x-abc", "-c=y-abc", "--use_cache=z-abc"),
    *("-c", "w-abc"),
  ]


@pytest.mark.parametrize("flag", [["--model", "hf"], ["-M=hf"], ["--model=hf"]])
def test_the_model_is_the_run(flag):
  with pytest.raises(ConfigError, match="--workdir: it is the model"):
    lm_eval.main(["--workdir=runs/a", *flag])


@pytest.mark.parametrize("flag", [["--device", "cpu"], ["--max_batch_size=4"]])
def test_what_jax_decides_is_refused(flag):
  with pytest.raises(ConfigError, match="JAX chooses the device"):
    lm_eval.main(["--workdir=runs/a", *flag])
