"""Unknown names are refused; schedules have the right values."""

import pytest

from flaxlm.config import base
from flaxlm.training.optim import make_optimizer, make_schedule

SCHEDULE = {
  "peak_learning_rate": 1.0,
  "num_steps": 100,
  "warmup_steps": 10,
  "decay_fraction": 0.2,
  "end_factor": 0.1,
}


@pytest.mark.parametrize(("key", "value"), [("name", "adam"), ("schedule", "step")])
def test_an_unknown_choice_raises(key, value):
  knobs = base.get_config().optim.to_dict() | {key: value}
  with pytest.raises(ValueError, match=f"no .* '{value}'"):
    make_optimizer(100, **knobs)


@pytest.mark.parametrize(
  ("schedule", "halfway", "last"),
  [
    ("cosine", 0.55, 0.1),
    ("linear", 0.55, 0.1),
    ("wsd", 1.0, 0.1),
    ("constant", 1.0, 1.0),
  ],
)
def test_schedules_reach_their_marks(schedule, halfway, last):
  rate = make_schedule(schedule=schedule, **SCHEDULE)
  assert float(rate(0)) == pytest.approx(0.1) and float(rate(9)) == pytest.approx(1.0)
  assert float(rate(54)) == pytest.approx(halfway)
  assert float(rate(99)) == pytest.approx(last)
  assert (
    float(make_schedule(schedule=schedule, **SCHEDULE | {"warmup_steps": 0})(0)) == 1.0
  )
