"""A calibration is measured, stored, read back and used; bad files are named."""

import json
import math

import pytest

from flaxlm.errors import ConfigError, MissingInputError
from flaxlm.parallel import AXES
from flaxlm.parallel.mesh import make_mesh
from flaxlm.planning import calibrate, microbenchmarks
from flaxlm.planning.operations import operations
from flaxlm.planning.roofline import predict

ONE = dict.fromkeys(AXES, 1)


@pytest.fixture
def quick(monkeypatch):
  """Small matrices stand for the machine's peak and its memory."""
  monkeypatch.setattr(calibrate, "SQUARE_KEY", ("matmul", 1, 64, 64, 64, "float32"))
  monkeypatch.setattr(calibrate, "COPY_KEY", ("norm", 64, 64, "float32"))


def test_a_machine_is_measured_stored_and_used(tiny, quick, tmp_path):
  measured = calibrate.measure([tiny], budget=0.0)
  keys = {tuple(row[:-1]) for row in measured["seconds"]}
  for op in operations(tiny, ONE, flash=False):
    assert calibrate.measurement_key(op, tiny.model.dtype) in keys
  path = tmp_path / "machine.json"
  calibrate.save_calibration(measured, path)
  machine = calibrate.load_calibration(path)
  assert machine == calibrate.measured_hardware(measured)
  assert machine.num_chips == 8 and machine.chip.link_bandwidth > 0
  found = predict(tiny, ONE | {"data": 8}, machine)
  assert 0 < found.low < found.mid < found.high < math.inf
  tiny.log.calibration = str(path)
  assert calibrate.expected_seconds(tiny, make_mesh()) == found.mid
  # Eight devices share this machine's cores, so each is as slow as all together.
  alone = calibrate.measured_hardware(measured | {"num_devices": 1})
  key = calibrate.SQUARE_KEY
  assert machine.calibration.seconds[key] == 8 * alone.calibration.seconds[key]


def test_an_unknown_machine_predicts_nothing(tiny, tmp_path):
  tiny.log.calibration = str(tmp_path / "none.json")
  assert calibrate.expected_seconds(tiny, make_mesh()) is None


WHOLE = {
  "device_kind": "cpu",
  "platform": "cpu",
  "num_devices": 1,
  "link_bandwidth": None,
  "dispatch_seconds": 1e-5,
  "seconds": [[*calibrate.SQUARE_KEY, 1e-3], [*calibrate.COPY_KEY, 1e-3]],
}
WRONG = [
  {"num_devices": 0},
  {"num_devices": "8"},
  {"platform": 5},
  {"link_bandwidth": "x"},
  {"dispatch_seconds": -1},
  {"seconds": [5]},
  {"seconds": [[[], 1.0]]},
  {"seconds": [[*calibrate.SQUARE_KEY, 0], [*calibrate.COPY_KEY, 1e-3]]},
  {"seconds": [[*calibrate.SQUARE_KEY, "x"]]},
]


def test_a_whole_file_is_read(tmp_path):
  (tmp_path / "machine.json").write_text(json.dumps(WHOLE))
  assert calibrate.load_calibration(tmp_path / "machine.json").num_chips == 1


@pytest.mark.parametrize(
  "text",
  ["", "[]", "{}", '{"num_devices": 1}', *(json.dumps(WHOLE | x) for x in WRONG)],
)
def test_a_bad_file_is_named(tmp_path, text):
  path = tmp_path / "machine.json"
  with pytest.raises(MissingInputError, match="--calibrate"):
    calibrate.load_calibration(path)
  path.write_text(text)
  with pytest.raises(ConfigError, match=r"machine\.json"):
    calibrate.load_calibration(path)


@pytest.mark.parametrize(
  ("kind", "dims"),
  [
    ("matmul", (1, 4, 6, 8)), ("matmul", (2, 4, 6, 8)),
    ("attention", (2, 4, 8, 4, 2, 8)), ("norm", (4, 8)), ("rotary", (4, 2, 8)),
    ("activation", (4, 8)), ("gated", (4, 8)), ("logits", (4, 9)),
    ("embedding", (4, 9, 8)), ("dispatch", (4, 8)), ("optimizer", (16,)),
    ("weights", (16,)),
  ],
)  # fmt: skip
def test_every_operation_has_a_probe(kind, dims):
  for dtype in ("float32", "bfloat16"):
    function, args = microbenchmarks.prepare(kind, dims, dtype)
    assert microbenchmarks.measure_seconds(function, args, 0.0) > 0
