"""The JSON reader: hostile and damaged texts are refused in one sentence."""

import json
import time

import pytest

from flaxlm import json_files
from flaxlm.errors import DataError

REFUSED = {
  "too deep for Python": ("[" * 100_000 + "]" * 100_000, "nested more than"),
  "too deep for us": ('{"a":' * 200 + "1" + "}" * 200, "nested more than"),
  "objects too deep": ('{"a":' * 100_000, "nested more than"),
  "no UTF-8": (b'{"a": "\xff"}', "no UTF-8 at byte 7"),
  "UTF-16": ('{"a": 1}'.encode("utf-16"), "no UTF-8 at byte 0"),
  "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
  "half of a pair": ('{"a": "\\ud800"}', "surrogate"),
  "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
  "NaN": ('{"a": NaN}', "NaN, which is not finite"),
  "infinity": ('{"a": -Infinity}', "not finite"),
  "infinity by size": ('{"a": 1e999}', "1e999, which is not finite"),
  "a huge number": ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
  "an array": ("[1]", "an array"),
  "arrays without end": ('{"a":[' + "[]," * 4_000_001 + "1]}", "objects and arrays"),
  "a number": ("5", "a whole number"),
  "null": ("null", "null"),
  "nothing": ("", "Expecting value"),
  "cut": ('{"a": [1, 2', "Expecting"),
  "more after it": ('{"a": 1} x', "Extra data"),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_json_object_is_refused_by_the_file(tmp_path, case):
  text, reason = REFUSED[case]
  file = tmp_path / "x.json"
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(DataError, match=reason) as caught:
    json_files.read_json(file)
  assert str(file) in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_is_read_up_to_the_limit(tmp_path):
  (tmp_path / "x.json").write_text(json.dumps({"a": "b" * 100}))
  assert json_files.read_json(tmp_path / "x.json", limit=200)["a"] == "b" * 100
  with pytest.raises(DataError, match="more than 50 bytes"):
    json_files.read_json(tmp_path / "x.json", limit=50)
  started = time.monotonic()
  with pytest.raises(DataError, match="more than"), open("/dev/zero", "rb") as endless:
    json_files.read_json(endless.name, limit=1 << 20)
  assert time.monotonic() - started < 5


def test_plain_values_come_back():
  value = {"a": [1, -2.5, None, True, "\N{GRINNING FACE}"], "b": {"c": {}}}
  assert json_files.parse_json(json.dumps(value), "x") == value
  deep = '{"a":' * json_files.MAX_DEPTH + "1" + "}" * json_files.MAX_DEPTH
  assert "a" in json_files.parse_json(deep, "x")
  assert json_files.parse_json('{"a": NaN}', "x", finite=False)["a"] != 0
  assert json_files.parse_json('{"a": 18446744073709551615}', "x")["a"] == 2**64 - 1
  no_limit = json.dumps({"model_max_length": int(1e30)})  # as transformers saves it
  assert json_files.parse_json(no_limit, "x")["model_max_length"] == int(1e30)


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"none": int}, "none"),
    ({"a": str}, "a cannot"),
    ({"flag": int}, "flag"),
    ({"whole": bool}, "whole"),
    ({"b.c": list}, r"b\.c"),
    ({"b.c.d": int}, r"b\.c\.d"),
    ({"a.b": int}, r"a\.b"),
  ],
)
def test_fields_have_their_types(fields, named):
  text = '{"a": 1.5, "whole": 3, "flag": true, "b": {"c": {}}}'
  good = {"a": float, "whole": float, "flag": bool, "b": dict, "b.c": dict}
  json_files.parse_json(text, "x.json", good)
  with pytest.raises(DataError, match=f"x.json: {named}"):
    json_files.parse_json(text, "x.json", fields)
