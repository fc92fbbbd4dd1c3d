"""What a run reports of its steps."""

import collections
import json

import numpy as np
import pytest

from flaxlm.errors import NumericsError
from flaxlm.runs.progress import TrainingProgress


def numbers(loss, bad=False, skipped=0):
  values = {"loss": loss, "grad_norm": loss, "learning_rate": 0.1}
  return {n: np.float32(x) for n, x in values.items()} | {
    "bad": np.bool_(bad),
    "skipped": np.int32(skipped),
  }


@pytest.mark.faults
def test_the_rows_of_a_bad_step_are_logged(tiny, tmp_path):
  tiny.guards.max_bad_steps, tiny.log.every = 2, 100
  # 5 steps read 44 rows, as some had another batch size than 8.
  counts = collections.Counter()
  with TrainingProgress(tiny, tmp_path, 5, counts, None, 44) as progress:
    progress.add(6, numbers(2.0))
    progress.add(7, numbers(np.inf, bad=True, skipped=1))
    progress.add(8, numbers(2.0, skipped=1))
    progress.add(9, numbers(np.nan, bad=True, skipped=2))
    with pytest.raises(NumericsError, match=r"9 \(loss nan\), 10 \(loss inf\)"):
      progress.add(10, numbers(np.inf, bad=True, skipped=3))
      progress.flush()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  bad = [(r["step"], r["loss"], r["first_row"]) for r in records if r["kind"] == "bad"]
  assert bad == [(7, "inf", 52), (9, "nan", 68), (10, "inf", 76)]
  assert all(r["rows"] == 8 for r in records if r["kind"] == "bad")
