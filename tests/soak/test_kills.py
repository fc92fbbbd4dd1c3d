"""Kills and signals at random moments change nothing but the time that a run takes.

The moments are drawn over phases that are seen from outside, by what a process prints
and by the files that it makes; how long each phase lasts is measured in a run that is
left alone. `rng` in conftest.py says how to repeat a soak.
"""

import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from flaxlm.training.manifest import find_damage
from tests import test_end_to_end as runs

pytestmark = pytest.mark.slow

STEPS, EVALUATED = 192, 8  # more steps than fifteen interrupted runs reach
CONFIG = (
  f"--config.num_steps={STEPS}",
  f"--config.eval.every={EVALUATED}",
  "--config.checkpoint.every=4",
)
PHASES = ("compile", "step", "save", "publish", "evaluation")
SECONDS = 60  # from a signal to the end of the process, at most


class Watched:
  """A command whose output goes to a file, and the run directory that it writes."""

  def __init__(self, workdir: pathlib.Path, *command: str, **env: str):
    self.checkpoints = workdir / "checkpoints"
    self.path = workdir.with_name(f"{workdir.name}.log")
    with self.path.open("w") as log:
      self.process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=runs.ROOT, env=runs.environment(**env), stdout=log, stderr=log,
      )  # fmt: skip

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.kill()
    self.process.wait()

  @property
  def said(self) -> str:
    return self.path.read_text(errors="replace")

  def steps(self, kind: str = "") -> list[int]:
    """Returns the steps that it has printed: of training, or of evaluations."""
    return [
      int(n) for n in re.findall(rf"(?m)^step +(\d+)/\d+ +{kind or 'loss'}", self.said)
    ]

  def wait_for(self, condition, seconds: float = 120) -> bool:
    """Waits until `condition()`; returns False if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
      if self.process.poll() is not None:
        return condition()
      assert time.monotonic() < deadline, f"it takes too long\n{self.said}"
      time.sleep(0.001)
    return True


def in_phase(run: Watched, phase: str) -> bool:
  """Says whether the training process is in a phase now, as seen from outside."""
  if phase == "compile":
    return "compiling the training step" in run.said and not run.steps()
  if phase == "step":
    return bool(run.steps())
  if phase == "save":
    return any(run.checkpoints.glob("*.unfinished"))
  if phase == "publish":
    return any(run.checkpoints.glob("*.unfinished/MANIFEST.json*"))
  if phase == "evaluation":
    steps = run.steps()
    due = bool(steps) and steps[-1] % EVALUATED == 0
    return due and steps[-1] not in run.steps("eval")
  raise AssertionError(phase)


def train(project, workdir: pathlib.Path, **env: str) -> Watched:
  command = "flaxlm.train", f"--config={project}/config.py", f"--workdir={workdir}"
  return Watched(workdir, *command, *CONFIG, **env)


@pytest.fixture(scope="module")
def straight(project):
  """An uninterrupted run, and how long each of its phases lasted, in seconds."""
  seconds = {}
  cold = {"XDG_CACHE_HOME": str(project / "no-programs")}
  with train(project, project / "alone", **cold) as run:
    for phase in PHASES:
      assert run.wait_for(lambda: in_phase(run, phase)), run.said  # noqa: B023
      start = time.monotonic()
      first = run.steps()
      if phase == "step":
        run.wait_for(lambda: run.steps() != first)  # noqa: B023
      else:
        run.wait_for(lambda: not in_phase(run, phase))  # noqa: B023
      seconds[phase] = time.monotonic() - start
    assert run.process.wait(300) == 0, run.said
  print({phase: round(s, 3) for phase, s in seconds.items()})
  return project / "alone", seconds


def interrupt(project, workdir, phase, seconds, rng, number) -> tuple[Watched, int]:
  """Starts or continues the run, and sends a signal in `phase`; returns it, ended.

  The number of steps before it is random too, and the moment in the phase.
  """
  env = {}
  if phase == "compile":  # kept, so that a torn entry of the cache is met again
    env = {"XDG_CACHE_HOME": f"{workdir}-programs"}
  with train(project, workdir, **env) as run:
    assert run.wait_for(lambda: in_phase(run, "compile") or run.steps()), run.said
    count = 0 if phase == "compile" else rng.randint(1, 5)
    run.wait_for(lambda: len(run.steps()) >= count)
    run.wait_for(lambda: in_phase(run, phase))
    moment = time.monotonic() + rng.uniform(0, seconds[phase])
    while time.monotonic() < moment and in_phase(run, phase):
      time.sleep(0.001)
    run.process.send_signal(number)
    start = time.monotonic()
    code = run.process.wait(SECONDS)
    print(
      f"{phase}: exit {code} after {time.monotonic() - start:.2f} s", run.steps()[-1:]
    )
    return run, code


def shuffled_phases(rng) -> list[str]:
  phases = [*PHASES] * 3
  rng.shuffle(phases)
  return phases


def finish(project, workdir, expected) -> None:
  """Lets the run end by itself and compares it with the one that was left alone."""
  with train(project, workdir) as run:
    assert run.process.wait(300) == 0, run.said
  runs.assert_same_run(expected, workdir, step=STEPS)
  assert [step for step, kind in runs.logged(workdir) if kind == "train"] == [
    *range(1, STEPS + 1)
  ]


@pytest.mark.faults
def test_fifteen_kills(project, straight, tmp_path, rng):
  workdir = tmp_path / "run"
  for phase in shuffled_phases(rng):
    run, code = interrupt(project, workdir, phase, straight[1], rng, signal.SIGKILL)
    assert code == -signal.SIGKILL, run.said
    assert "Traceback" not in run.said
  finish(project, workdir, straight[0])
  assert not [path for path in (workdir / "checkpoints").iterdir() if "." in path.name]


@pytest.mark.faults
def test_fifteen_signals(project, straight, tmp_path, rng):
  workdir = tmp_path / "run"
  for phase in shuffled_phases(rng):
    run, code = interrupt(project, workdir, phase, straight[1], rng, signal.SIGTERM)
    assert code == 75, run.said
    step = int(re.search(r"stopped after step (\d+) of", run.said)[1])
    assert find_damage(run.checkpoints / str(step)) is None, run.said
    # Each evaluation before the last step is there, and whole.
    rows = runs.logged(workdir)
    due = [*range(EVALUATED, step, EVALUATED)]
    found = [row for row, kind in rows if kind == "eval"]
    assert found in (due, [*due, step])
    assert all(
      rows[row, "eval"].keys() == {"loss", "bits_per_byte", "tokens"} for row in found
    )
  finish(project, workdir, straight[0])
