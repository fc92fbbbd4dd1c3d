"""Small texts and configs for the tests of the data room."""

import sysconfig
from pathlib import Path

import pytest

from configs import base
from flaxlm.data import tokenizer


@pytest.fixture(scope="session")
def english() -> str:
  """Half a megabyte of the standard library."""
  root = Path(sysconfig.get_path("stdlib"))
  names = "argparse ast bdb calendar cmd copy csv difflib dis enum inspect typing"
  return "\n".join((root / f"{name}.py").read_text("utf-8") for name in names.split())


@pytest.fixture(scope="session")
def bpe(english) -> tokenizer.Tokenizer:
  lines = tokenizer.sample([english], 1_000_000)
  return tokenizer.Tokenizer(tokenizer.train_tokenizer(lines, "bpe", 1000))


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
