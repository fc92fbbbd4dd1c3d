"""The lines of a run's `metrics.jsonl`: each is a JSON object with a check of its own.

The check is the CRC-32 of what stands before it in its line. A damaged line is never
read; the next start of the run names it and leaves it out.
"""

import contextlib
import json
import pathlib
import sys
import zlib
from collections.abc import Iterator

from flaxlm.files import open_atomically
from flaxlm.json_files import parse_json

_CHECK = b', "crc32": "'  # eight hexadecimal digits follow, and the end of the object
_MAX_LINE = 1 << 20  # bytes


def format_record(record: dict) -> bytes:
  """Returns the line of a record, with its check; its values must be JSON's."""
  body = json.dumps(record, allow_nan=False)[:-1].encode()
  return body + _CHECK + f'{zlib.crc32(body):08x}"}}\n'.encode()


def read_log(path: pathlib.Path, damaged: list[int]) -> Iterator[tuple]:
  """Yields (line, its record) of a `metrics.jsonl`, each step once of a kind.

  A torn last line, which a kill may leave, is passed over in silence. Older versions
  wrote no checks, so lines before the first check need none.

  Args:
    damaged: the numbers of damaged and repeated lines are added to it, from 1.
  """
  seen, checked = set(), False
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n"):
        return
      record, has_check = _parse(line)
      key = record and (record["step"], record.get("kind"))
      if record is None or (checked and not has_check) or key in seen:
        damaged.append(number)
        continue
      checked |= has_check
      seen.add(key)
      yield line, record


def _parse(line: bytes) -> tuple[dict | None, bool]:
  """Returns (the record of a line, whether it has a check); None if it is damaged."""
  body, found, end = line.rpartition(_CHECK)
  if found and end != f'{zlib.crc32(body):08x}"}}\n'.encode():
    return None, True
  with contextlib.suppress(ValueError):
    record = parse_json(line, "a line", {"step": int}, _MAX_LINE)
    record.pop("crc32", None)
    return (record if record["step"] >= 0 else None), bool(found)
  return None, bool(found)


def drop_lines_after(path: pathlib.Path, first_step: int) -> None:
  """Removes from `metrics.jsonl` the steps that will be logged again.

  A run that starts at step 0 keeps no lines. A torn last line, which a kill may leave,
  is removed too, and damaged lines, which are named on stderr.
  """
  if not path.exists():
    return
  damaged: list[int] = []
  with open_atomically(path) as new:
    for line, record in read_log(path, damaged):
      if 0 < first_step >= record["step"]:
        new.write(line)
  if damaged:
    shown = ", ".join(map(str, damaged[:8])) + ", ..." * (len(damaged) > 8)
    print(
      f"flaxlm: warning: {path}: {len(damaged)} damaged lines are left out: {shown}",
      file=sys.stderr,
    )


def is_logged(path: pathlib.Path, step: int, kind: str) -> bool:
  """Says whether `metrics.jsonl` has a line of this step and kind."""
  if not path.exists():
    return False
  records = (record for _, record in read_log(path, []))
  return any((r["step"], r.get("kind")) == (step, kind) for r in records)
