"""Configs for the tests of the data room."""

import pytest

from flaxlm.config import base


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
