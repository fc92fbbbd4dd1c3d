"""`prepare`, killed 25 times at random moments: the store is an undisturbed one's."""

import pathlib
import random
import re
import signal
import time

import pytest

from tests.soak.test_kills import Watched

pytestmark = pytest.mark.slow

CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.data.sources = base.sources(
    code=base.source("text", {texts!r} + "/*.py", document="paragraph"),
    words=base.source("text", {texts!r} + "/*.txt", document="line"),
  )
  config.data.validation_fraction = 0.1
  config.data.shard_tokens = 30_000
  config.tokenizer.vocab_size = 600
  config.tokenizer.train_bytes = 500_000
  return config
"""
PHASES = ("tokenizer", "units", "manifest")
WEIGHTS = {"tokenizer": 2, "units": 6, "manifest": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory, english):
  path = tmp_path_factory.mktemp("prepare")
  (path / "texts").mkdir()
  (path / "texts" / "code.py").write_text(english, "utf-8")
  words = random.Random(0)
  for number in range(5):
    lines = (f"line {words.random()} of {number} 漢字" for _ in range(4000))
    (path / "texts" / f"{number}.txt").write_text("\n".join(lines), "utf-8")
  (path / "config.py").write_text(CONFIG.format(texts=str(path / "texts")))
  return path


def prepare(home, store: pathlib.Path) -> Watched:
  command = "flaxlm.prepare", f"--config={home}/config.py"
  return Watched(store, *command, f"--config.data.store={store}")


def phase_of(store: pathlib.Path) -> str:
  """Returns what a preparation does now, as seen from its files."""
  if not (store / "recipe.json").exists():
    return "start"
  if not any(store.glob("tokenizer.*")) or not (store / "code").exists():
    return "tokenizer"
  if (store / "manifest.json").exists():
    return "done"
  return "manifest" if (store / "words.u1").exists() else "units"


def contents(store: pathlib.Path) -> dict[str, bytes]:
  found = [path for path in store.rglob("*") if path.is_file()]
  names = {str(path.relative_to(store)): path.read_bytes() for path in found}
  for own in (".lock", ".seen.json"):  # of the host that prepared the store
    names.pop(own, None)
  return names


@pytest.mark.faults
def test_twenty_five_kills(home, tmp_path, rng):
  seconds, start = {}, time.monotonic()
  with prepare(home, home / "alone") as run:
    last = "start"
    while run.process.poll() is None:
      if (now := phase_of(home / "alone")) != last:
        seconds[last], start, last = time.monotonic() - start, time.monotonic(), now
      time.sleep(0.001)
    assert run.process.wait() == 0, run.said
  print({phase: round(s, 3) for phase, s in seconds.items()})
  expected = contents(home / "alone")
  assert len([name for name in expected if name.endswith(".ids")]) > 20

  kills = stores = 0
  while kills < 25:
    store = tmp_path / f"store-{stores}"
    stores += 1
    for _ in range(9):
      kills += kill(home, store, seconds, rng)
      if phase_of(store) == "done":
        break
    if phase_of(store) != "done":
      with prepare(home, store) as run:
        assert run.process.wait(300) == 0, run.said
    assert contents(store) == expected


def kill(home, store: pathlib.Path, seconds: dict[str, float], rng) -> bool:
  """Begins or continues a store and kills that in a random phase; False: too late."""
  left = PHASES[PHASES.index(phase_of(store)) :] if store.exists() else PHASES
  phase = rng.choices(left, [WEIGHTS[phase] for phase in left])[0]
  reached = (*PHASES[PHASES.index(phase) :], "done")
  with prepare(home, store) as run:
    assert run.wait_for(lambda: re.search("training|continuing", run.said)), run.said
    assert run.wait_for(lambda: phase_of(store) in reached), run.said
    time.sleep(rng.uniform(0, max(0.6 * seconds[phase], 0.2)))
    run.process.send_signal(signal.SIGKILL)
    killed = run.process.wait(60) == -signal.SIGKILL
  print(f"{phase}: {'killed' if killed else 'done'}, {phase_of(store)}")
  return killed
