"""The command line: the overview, help without JAX, exit codes, completion."""

import os
import pathlib
import subprocess
import sys

import pytest

import flaxlm
from flaxlm import cli
from flaxlm.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, **env):
  """Runs `python -m …` and waits for it."""
  return subprocess.run(
    [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True,
    env=os.environ | env,
  )  # fmt: skip


def test_the_overview_names_each_command_and_imports_nothing_slow():
  files = (ROOT / "flaxlm").glob("[!_]*.py")
  assert set(COMMANDS) == {f.stem for f in files if "run_command(" in f.read_text()} - {
    "cli"
  }
  times = []
  for _ in range(3):  # the machine may be busy with something else
    before = os.times()
    done = run("flaxlm", "--help")
    after = os.times()
    times.append(sum(after[2:4]) - sum(before[2:4]))  # CPU seconds of the child
  assert min(times) < 0.3
  lines = [line.split() for line in done.stdout.splitlines()]
  assert [x[0] for x in lines if x and x[0] in COMMANDS] == list(COMMANDS)
  code = "import sys, flaxlm.__main__ as m; m.overview(); print(*sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert not {"jax", "ml_collections", "numpy"} & set(done.stdout.split())


def test_one_command_runs_the_others():
  done = run("flaxlm", "evaluate", "--workdir=nowhere")
  assert done.returncode == 66 and "holds no run" in done.stderr
  done = run("flaxlm", "evalaute", "--workdir=nowhere")
  assert done.returncode == 2 and "try:    evaluate" in done.stderr
  assert run("flaxlm", "--version").stdout == f"{flaxlm.__version__}\n"


@pytest.mark.parametrize(
  ("line", "words"),
  [("flaxlm e", {"evaluate"}), ("flaxlm evaluate --st", {"--step"})],
)
def test_a_shell_completes_commands_and_flags(line, words, tmp_path):
  pytest.importorskip("argcomplete", reason="pip: test")
  found = tmp_path / "found"
  run(
    "flaxlm", _ARGCOMPLETE="1", _ARGCOMPLETE_STDOUT_FILENAME=str(found),
    _ARGCOMPLETE_IFS="\n", COMP_LINE=line, COMP_POINT=str(len(line)),
  )  # fmt: skip
  assert {word.strip() for word in found.read_text().split("\n")} == words


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate"])
def test_help_comes_without_jax_or_tensorflow(command):
  code = (
    "import sys, runpy; sys.argv = ['x', '--help']\n"
    f"try: runpy.run_module('flaxlm.{command}', run_name='__main__')\n"
    "except SystemExit: pass\n"
    "slow = {'jax', 'flax', 'tensorflow', 'orbax', 'sentencepiece'}\n"
    "slow &= set(sys.modules)\n"
    "sys.exit(f'imported {slow}' if slow else 0)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert f"flaxlm.{command}" in done.stdout and "--config.optim" in done.stdout


@pytest.mark.parametrize(
  ("arguments", "code", "message"),
  [
    (
      ["--workdir=x", "--config=configs/base.py", "--config.optim.lr=1"],
      2,
      "config.optim",
    ),
    (["--workdir=x", "--config=configs/base.py", "--steps=1"], 2, "--steps=1"),
    (["--workdir=x", "--config=configs/none.py"], 66, "does not exist"),
    (["--workdir=/nowhere/to/be/found"], 66, "holds no run"),
    (["--config=configs/base.py"], 2, "--workdir"),
  ],
)
def test_the_command_prints_five_lines_and_an_exit_code(arguments, code, message):
  done = run("flaxlm.train", *arguments)
  assert done.returncode == code
  assert message in done.stderr and "Traceback" not in done.stderr
  assert len(done.stderr.strip().splitlines()) <= 5


def test_what_the_system_refuses_is_no_traceback_and_a_bug_is(tmp_path, capsys):
  with pytest.raises(FileNotFoundError) as caught:
    (tmp_path / "\x1b[2J").read_text()
  assert cli._report(caught.value) == 66
  shown = capsys.readouterr().err
  assert "Traceback" not in shown and "\\x1b[2J" in shown and "\x1b" not in shown
  assert cli._report(ValueError("\x1b[2J")) == 70
  shown = capsys.readouterr().err
  assert "ValueError" in shown and "\x1b" not in shown
