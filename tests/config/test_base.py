"""The list of knobs is frozen, so that adding one is a decision.

`pytest tests/config/test_base.py --update-golden` rewrites it; review the change.
"""

import pathlib

import pytest

from flaxlm.config import base
from flaxlm.config.tree import flatten

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/knobs.txt"


def test_every_knob_is_in_the_list_with_the_type_of_its_default(request):
  knobs = flatten(base.get_config())
  text = "".join(f"{key} {type(knobs[key]).__name__}\n" for key in sorted(knobs))
  if request.config.getoption("--update-golden"):
    GOLDEN.write_text(text)
  listed, found = GOLDEN.read_text().splitlines(), text.splitlines()
  new, gone = sorted({*found} - {*listed}), sorted({*listed} - {*found})
  assert not new and not gone, f"new: {new}, gone: {gone}"
  assert listed == found


def test_a_config_is_locked_down_to_its_sources():
  config = base.get_config()
  for group in (config, config.model, config.model.moe, config.data.sources.main):
    with pytest.raises(AttributeError):
      group.no_such_knob = 1


def test_sizes_that_are_equal_by_default_follow_each_other_one_way():
  config = base.get_config()
  config.tokenizer.vocab_size, config.data.seq_len = 96, 48
  assert (config.model.vocab_size, config.model.max_len) == (96, 48)
  config.model.vocab_size, config.model.max_len = 128, 64
  assert (config.tokenizer.vocab_size, config.data.seq_len) == (96, 48)


def test_each_config_is_a_new_one():
  base.get_config().model.num_layers = 99
  base.get_config().data.sources.main.weight = 99.0
  config = base.get_config()
  assert config.model.num_layers == 6 and config.data.sources.main.weight == 1.0
