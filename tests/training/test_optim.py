"""Unknown names are refused, and schedules end where they should."""

import pytest

from flaxlm.config import base
from flaxlm.training.optim import make_optimizer, make_schedule


@pytest.mark.parametrize(("key", "value"), [("name", "adam"), ("schedule", "step")])
def test_an_unknown_choice_raises(key, value):
  knobs = base.get_config().optim.to_dict() | {key: value}
  with pytest.raises(ValueError, match=f"no .* '{value}'"):
    make_optimizer(100, **knobs)


@pytest.mark.parametrize(
  ("schedule", "last"),
  [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)],
)
def test_schedules_warm_up_and_end(schedule, last):
  rate = make_schedule(1.0, schedule, 100, 10, 0.2, 0.1)
  assert rate(0) == pytest.approx(0.1) and rate(9) == pytest.approx(1.0)
  assert rate(99) == pytest.approx(last, abs=1e-6)
