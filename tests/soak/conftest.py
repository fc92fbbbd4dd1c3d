"""What the soaks share: a seed that another run can be given, and one tiny project."""

import os
import random
import time

import pytest

from tests import test_end_to_end as runs

SEED = "FLAXLM_SOAK_SEED"


@pytest.fixture
def rng(request) -> random.Random:
  """Random numbers that are others each day; FLAXLM_SOAK_SEED repeats those of one."""
  seed = os.environ.get(SEED) or time.strftime("%Y%m%d")
  print(f"repeat this soak with {SEED}={seed}")  # pytest shows it if the test fails
  return random.Random(f"{seed} {request.node.name}")


@pytest.fixture(scope="session")
def project(tmp_path_factory):
  """A prepared store, its config file, and one uninterrupted run of it."""
  home = tmp_path_factory.mktemp("soak")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    runs.make_project(home)
    yield home
