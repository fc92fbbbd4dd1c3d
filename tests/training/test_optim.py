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


@pytest.mark.faults
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 1), (3, 3)])
def test_the_shortest_runs_have_a_rate(schedule, num_steps, warmup_steps):
  length = {"num_steps": num_steps, "warmup_steps": warmup_steps}
  rate = make_schedule(schedule=schedule, **SCHEDULE | length)
  rates = [float(rate(step)) for step in range(num_steps + 1)]
  assert all(0 < r <= 1 for r in rates) and max(rates) == 1.0
  rate = make_schedule(
    schedule=schedule, **SCHEDULE | length | {"peak_learning_rate": 0.0}
  )
  assert [float(rate(step)) for step in range(num_steps + 1)] == [0.0] * (num_steps + 1)
