"""An installed wheel works like the clone, without it.

It runs beside a user's own `configs` package that fails when it is imported, and where
TensorFlow cannot be imported either.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from flaxlm import __version__
from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
SMALL = """
  num_steps=3 optim.warmup_steps=1 log.every=1 checkpoint.every=3
  data.store=store data.loader=numpy data.seq_len=16 data.batch_size=2
  data.sources.main.kind=text data.sources.main.path=*.txt data.split=tail
  tokenizer.vocab_size=300 model.num_layers=1 model.unroll=1 model.embed_dim=16
  model.head_dim=8 model.mlp_dim=16 log.tensorboard=false
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """A wheel built from a copy of the sources, so that the clone stays clean."""
  sources = tmp_path_factory.mktemp("sources")
  for name in ("flaxlm", "configs"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, sources / name, ignore=ignored)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, sources / name)
  pip("wheel", ".", "--no-build-isolation", "-w", "dist", cwd=sources)
  (built,) = (sources / "dist").iterdir()
  return built


def pip(command: str, *arguments, cwd: pathlib.Path) -> None:
  subprocess.run(
    [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments],
    cwd=cwd, check=True,
  )  # fmt: skip


def test_the_wheel_holds_the_package_alone(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.split("/")[0] for name in names} == {
    "flaxlm", f"flaxlm-{__version__}.dist-info"
  }  # fmt: skip
  shipped = {f"flaxlm/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
  code = {str(path.relative_to(ROOT)) for path in (ROOT / "flaxlm").rglob("*.py")}
  data = {  # task files and the page of the server
    str(path.relative_to(ROOT))
    for kind in ("json", "html")
    for path in (ROOT / "flaxlm").rglob(f"*.{kind}")
  }
  assert "flaxlm/evals/task_files/blimp.json" in data
  own = {name for name in names if name.startswith("flaxlm/")}
  assert own == shipped | code | data
  (folder,) = {name.split("/")[0] for name in names} - {"flaxlm"}
  metadata = zipfile.ZipFile(wheel).read(f"{folder}/METADATA").decode()
  assert "License-Expression: Apache-2.0" in metadata and "# flaxlm" in metadata
  needed = [x for x in metadata.splitlines() if x.startswith("Requires-Dist")]
  assert not [x for x in needed if "pytest" in x and "extra" not in x]


def test_it_trains_where_there_is_neither_a_clone_nor_tensorflow(wheel, tmp_path):
  site, home = tmp_path / "site", tmp_path / "home"
  pip("install", "--target", str(site), str(wheel), cwd=tmp_path)
  (home / "configs").mkdir(parents=True)
  (home / "configs/__init__.py").write_text("raise RuntimeError('the user's own')")
  (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 999)
  for name in ("tensorflow", "tensorflow_datasets"):
    (home / "absent" / name).mkdir(parents=True)
    text = f"raise ImportError('{name} is not here')"
    (home / "absent" / name / "__init__.py").write_text(text)
  # A user's config that builds on one of ours.
  (home / "mine.py").write_text(
    "from flaxlm.configs import quickstart\n\ndef get_config():\n"
    "  config = quickstart.get_config()\n  config.seed = 7\n  return config\n"
  )
  env = quick.environment(PYTHONPATH=f"{home}/absent:{site}")

  def run(*command) -> str:
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

  knobs = [f"--config.{text}" for text in SMALL.split()]
  program = str(site / "bin/flaxlm")
  assert "  prepare " in run(sys.executable, "-m", "flaxlm")
  run(program, "prepare", "--config=quickstart", *knobs)
  run(program, "train", "--config=mine.py", "--workdir=run", *knobs)
  lines = (home / "run/metrics.jsonl").read_text().splitlines()
  steps = [x for x in map(json.loads, lines) if x["kind"] == "train"]
  assert [record["step"] for record in steps] == [1, 2, 3]
  assert json.loads((home / "run/config.json").read_text())["seed"] == 7
  generate = [sys.executable, "-m", "flaxlm.generate", "--workdir=run"]
  assert run(*generate, "--prompt=The quick", "--max_tokens=8")
  code = "import flaxlm; print(flaxlm.__file__)"
  assert run(sys.executable, "-c", code).strip() == str(site / "flaxlm/__init__.py")
