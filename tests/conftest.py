"""All tests run on 8 simulated CPU devices, offline, with no implicit broadcasting."""

import os
import pathlib
import sysconfig

from tests import processes, quick

processes.mark_children()
os.environ["JAX_PLATFORMS"] = "cpu"
# Processes that tests start must not write to the user's compilation cache.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
own = os.environ.get("XLA_FLAGS", "")
eight = f"{own} --xla_force_host_platform_device_count=8 {quick.UNOPTIMIZED}"
os.environ["XLA_FLAGS"] = f"{eight} {quick.EMITTERS}"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.devices()  # reads XLA_FLAGS, in which libtpu must not find the emitters
os.environ["XLA_FLAGS"] = eight

from flaxlm.config import base

ROOT = pathlib.Path(__file__).parents[1]


def pytest_addoption(parser):
  parser.addoption(
    "--update-golden", action="store_true", help="rewrite tests/golden from this code"
  )
  parser.addoption(
    "--share",
    default="0/1",
    metavar="I/N",
    help="run every N-th test, from the I-th on",
  )


@pytest.hookimpl(trylast=True)  # after -m and -k have selected
def pytest_collection_modifyitems(config, items):
  first, every = map(int, config.getoption("--share").split("/"))
  config.hook.pytest_deselected(
    items=[item for i, item in enumerate(items) if i % every != first]
  )
  items[:] = items[first::every]


@pytest.fixture(scope="session", autouse=True)
def keep_programs(tmp_path_factory):
  """Many test files compile the same programs: each worker has its own cache."""
  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left():
  """Fails the last test of a file if a process that the file started still runs."""
  yield
  assert not (left := processes.end_children()), f"tests here left behind: {left}"


@pytest.fixture(scope="session")
def corpora() -> pathlib.Path:
  """Returns the directory of real texts, which are not in the repository."""
  path = ROOT.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip("the test corpora (../shared/data) are not on this machine")
  return path


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Clears compiled programs, which take gigabytes and are no use to the next file."""
  yield
  jax.clear_caches()


@pytest.fixture
def tiny():
  return tiny_config()


@pytest.fixture(scope="session")
def make_tiny():
  """Returns `tiny_config`, for fixtures that live longer than one test."""
  return tiny_config


def tiny_config():
  """A config whose model compiles in a second: 2 layers, grouped-query attention."""
  config = base.get_config()
  config.num_steps = 20
  config.tokenizer.vocab_size = 64
  config.data.seq_len = 32
  config.data.batch_size = 8
  config.data.loader = "synthetic"
  config.model.num_layers = 2
  config.model.embed_dim = 32
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 8
  config.model.mlp_dim = 64
  config.optim.warmup_steps = 4
  config.log.tensorboard = False
  return config


@pytest.fixture
def text_config(tmp_path):
  """A config over the lines of tmp_path/texts/*.txt, with a character tokenizer."""
  (tmp_path / "texts").mkdir()
  config = base.get_config()
  config.data.store = str(tmp_path / "store")
  config.data.validation_fraction = 0.2
  config.tokenizer.kind = "char"
  config.tokenizer.vocab_size = 400
  source = config.data.sources.main
  source.kind, source.document = "text", "line"
  source.path = str(tmp_path / "texts" / "*.txt")
  return config


@pytest.fixture(scope="session")
def english() -> str:
  """Half a megabyte of the standard library."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  names = "argparse ast bdb calendar cmd copy csv difflib dis enum inspect typing"
  return "\n".join((root / f"{name}.py").read_text("utf-8") for name in names.split())


@pytest.fixture(scope="session")
def bpe(english):
  """A SentencePiece tokenizer of 1,000 pieces, trained on `english`."""
  from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer

  lines = sample_lines([english], 1_000_000)
  return Tokenizer(train_tokenizer(lines, "bpe", 1000))


@pytest.fixture
def one_device():
  """A mesh of only the first device."""
  from flaxlm.parallel.mesh import one_device

  return one_device()
