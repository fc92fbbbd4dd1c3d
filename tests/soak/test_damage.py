"""500 random damages to what flaxlm keeps: each is noticed, or it changes no number.

A door is a function that reads a copy of some files and returns what they mean. After
one file was damaged it must raise an error for users, which fits a terminal, or return
the same: a file that this reader does not need, or a change that means nothing, such as
white space in JSON. `rng` in conftest.py says how to repeat a soak.
"""

import contextlib
import functools
import pathlib
import shutil
import traceback

import numpy as np
import pytest

from flaxlm import errors
from flaxlm.config.load import config_to_json, load_config
from flaxlm.data.store.build import build_store
from flaxlm.data.store.shards import Store
from flaxlm.interop.export_run import export_model
from flaxlm.interop.huggingface import read_model
from flaxlm.interop.import_run import read_tokenizer
from flaxlm.models.trees import named_leaves
from flaxlm.parallel.mesh import one_device
from flaxlm.runs.directory import load_run_config
from flaxlm.runs.records import read_log
from flaxlm.runs.weights import restore_model
from flaxlm.tokenizer.files import load_tokenizer
from tests import test_end_to_end as runs

pytestmark = pytest.mark.slow

TEXT = "def main(x):\n  return 17 * x, 'naïve 漢字'  # a test"
EXIT_CODES = (2, 65, 66, 73, 74)


def damage(data: bytes, rng) -> tuple[str, bytes | None]:
  """Returns (what was done, the damaged bytes, or None if the file is gone)."""
  while True:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 8, 64, 512, 4096))
    chunk = data[at : at + size]
    kind = rng.choice(
      (
        "bit",
        "byte",
        "cut",
        "deleted",
        "doubled",
        "lost",
        "zeroed",
        "moved",
        "appended",
      )
    )
    if kind == "bit":
      new = data[:at] + bytes(b ^ 1 << rng.randrange(8) for b in chunk[:1])
      new += data[at + 1 :]
    elif kind == "byte":
      new = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    elif kind == "cut":
      new = data[:at]
    elif kind == "deleted":
      return kind, None
    elif kind == "doubled":
      new = data[:at] + chunk + data[at:]
    elif kind == "lost":
      new = data[:at] + data[at + size :]
    elif kind == "zeroed":
      new = data[:at] + bytes(len(chunk)) + data[at + size :]
    elif kind == "moved":
      to = rng.randrange(len(data) + 1)
      rest = data[:at] + data[at + size :]
      new = rest[:to] + chunk + rest[to:]
    else:
      new = data + rng.randbytes(size)
    if new != data:
      return f"{kind} {size} at {at} of {len(data)}", new


@pytest.fixture(scope="module")
def places(project, tmp_path_factory):
  """A run with one checkpoint, its store, an unfinished store and an export of it."""
  home = tmp_path_factory.mktemp("damage")
  shutil.copytree(project / "straight", home / "run")
  shutil.rmtree(home / "run/checkpoints/18")
  shutil.copytree(project / "store", home / "store")
  shutil.copytree(project / "store", home / "half")
  for name in ("manifest.json", "words.u1", "words/000000.json"):
    (home / "half" / name).unlink()
  config = load_run_config(home / "run")
  export_model(config, home / "run", home / "export")
  return home


def same_leaves(leaves) -> dict:
  return {name: np.asarray(leaf).tobytes() for name, leaf in leaves.items()}


def open_run(home: pathlib.Path):
  """The config, weights and tokenizer with which a run is evaluated and decodes."""
  workdir = home / "run"
  config = load_run_config(workdir)
  rules = config.mesh.rules.to_dict()
  model, meta = restore_model(workdir, config, one_device(), rules)
  tokenizer = load_tokenizer(workdir)
  return (
    config_to_json(config),
    meta,
    same_leaves(named_leaves(model)),
    tokenizer.encode(TEXT),
    tokenizer.sha256,
  )


def open_store(path: pathlib.Path):
  """All tokens of a store, where documents begin, and its tokenizer."""
  store = Store(str(path))
  found = [store.tokenizer, store.continues_word.tobytes(), store.fingerprint]
  for source in ("code", "words"):
    for split in ("train", "validation"):
      stream = store.stream(source, split)
      found.append(stream.read(0, stream.num_tokens).tobytes())
      found.append(stream.document_starts(0, stream.num_tokens).tobytes())
  return found


def finish_store(home: pathlib.Path, project: pathlib.Path):
  """An interrupted preparation, once it has been finished."""
  copy = home / "finished"
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(home / "half", copy)
  config = load_config(project / "config.py", [f"data.store={copy}"])
  build_store(config.data, config.tokenizer, lambda line: None)
  return open_store(copy)


def open_export(home: pathlib.Path):
  """What an import reads from exported files."""
  found = read_model(home / "export")
  tokenizer = read_tokenizer(home / "export")
  return (
    found.fields,
    same_leaves(found.leaves),
    tokenizer.encode(TEXT),
    tokenizer.bos_id,
    tokenizer.eos_id,
  )


def find_wrong_records(path: pathlib.Path, logged: dict) -> list[dict]:
  """Returns what a reader of the log would take for records that were never logged."""
  damaged: list[int] = []
  records = [record for _, record in read_log(path, damaged)] if path.exists() else []
  keys = [(record["step"], record.get("kind")) for record in records]
  assert len(set(keys)) == len(keys)
  return [
    record
    for key, record in zip(keys, records, strict=True)
    if key not in logged or not record.items() >= logged[key].items()
  ]


def try_door(door, expected) -> str:
  """Returns what is wrong with how a door takes damage; "" if nothing is."""
  try:
    found = door()
  except errors.UserError as error:
    shown = errors.terminal_text(error)
    lines = str(error).splitlines()
    if error.exit_code not in EXIT_CODES:
      return f"exit code {error.exit_code}: {error}"
    if (
      len(lines) > 5
      or max(map(len, lines)) > 600
      or (
        not shown.isprintable()
        and any(not line.isprintable() for line in shown.splitlines())
      )
    ):
      return f"not fit for a terminal: {shown!r}"
    return ""
  except BaseException as error:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}"
  return "" if found == expected else "accepted, with another result"


@contextlib.contextmanager
def damaged(path: pathlib.Path, rng):
  """Damages a file while the block runs; says how."""
  content = path.read_bytes()
  what, new = damage(content, rng)
  if new is None:
    path.unlink()
  else:
    path.write_bytes(new)
  yield f"{path.name} {what}"
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content)


def soak(count: int, folder: pathlib.Path, door, rng, wanted=lambda name: True) -> None:
  """Damages one file of `folder` after the other, `count` times, and tries the door."""
  expected = door()
  files = sorted(p for p in folder.rglob("*") if p.is_file() and wanted(p.name))
  wrong = []
  for number in range(count):
    with damaged(files[number % len(files)], rng) as what:
      if problem := try_door(door, expected):
        wrong.append(f"{what}: {problem}")
  assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
  assert door() == expected


@pytest.mark.faults
def test_checkpoint(places, rng, capsys):
  door = functools.partial(open_run, places)
  soak(100, places / "run/checkpoints", door, rng)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_run_directory(places, rng, capsys, name):
  door = functools.partial(open_run, places)
  soak(50, places / "run", door, rng, lambda found: found == name)


def test_store(places, rng):
  soak(90, places / "store", functools.partial(open_store, places / "store"), rng)


def test_unfinished_store(places, project, rng):
  door = functools.partial(finish_store, places, project)
  soak(60, places / "half", door, rng)


@pytest.mark.faults
def test_export(places, rng):
  soak(100, places / "export", functools.partial(open_export, places), rng)


def test_log(places, rng):
  path = places / "run/metrics.jsonl"
  logged = {(row["step"], row["kind"]): row for _, row in read_log(path, [])}
  assert len(logged) == 26
  door = functools.partial(find_wrong_records, path, logged)
  soak(50, places / "run", door, rng, lambda name: name == path.name)


def run_command(*command) -> tuple[int, str, str]:
  """Returns the exit code of a command, and what it wrote to stdout and stderr."""
  process = runs.start(*command)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


@pytest.mark.parametrize("files", ["checkpoints", "config", "tokenizer", "store"])
def test_by_command(places, files, rng):
  run, store = places / "run", places / "store"
  command = "evaluate", f"--workdir={run}", "--json", f"--config.data.store={store}"
  if files == "checkpoints":
    targets = [path for path in (run / files).rglob("*") if path.is_file()]
  elif files == "config":
    targets = [run / "config.json"]
  elif files == "store":
    targets = [path for path in store.rglob("*") if path.suffix in (".ids", ".json")]
  else:
    targets = [run / "tokenizer.model"]
    command = "generate", f"--workdir={run}", "--max_tokens=8", "--prompt=import "
  code, expected, err = run_command(*command)
  assert code == 0, err
  for _ in range(5):
    with damaged(rng.choice(sorted(targets)), rng) as what:
      code, out, err = run_command(*command)
    assert "Traceback" not in err, f"{what}: {err}"
    if code == 0:
      assert out == expected, f"{what}: {err}"
    else:
      assert code in EXIT_CODES, f"{what}: exit {code}\n{err}"
      assert "flaxlm: " in err and len(err.splitlines()) <= 8, f"{what}: {err}"
