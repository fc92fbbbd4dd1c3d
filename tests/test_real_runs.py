"""Runs on real text, minutes long: what the README promises. CI runs them (-m slow)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from flaxlm.data.store.shards import Store
from flaxlm.tokenizer.sentencepiece import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, timeout=900) -> str:
  plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env = plain | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True,
    timeout=timeout,
  )  # fmt: skip
  assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
  return done.stdout


def run_command(name, *arguments) -> str:
  return run(sys.executable, "-m", f"flaxlm.{name}", *arguments)


def test_shakespeare_by_characters_beats_the_published_loss(corpora, tmp_path):
  """nanoGPT publishes 1.88 nats per character, after 2,000 steps of this size."""
  common = (
    "--config=configs/shakespeare_fast.py",
    "--config.num_steps=500",
    f"--config.data.store={tmp_path}/store",
    f"--config.data.sources.main.path={corpora}/from_repos/corpora/tinyshakespeare.txt",
  )
  run_command("prepare", *common)
  store = Store(tmp_path / "store")
  # Its split: the first int(0.9 n) characters train, one token each.
  assert store.stream("main", "train").num_tokens - 2 == 1_003_854
  assert store.stream("main", "validation").num_tokens - 2 == 111_540
  run_command("train", *common, f"--workdir={tmp_path}/run")
  result = json.loads(run_command("evaluate", f"--workdir={tmp_path}/run", "--json"))
  assert result["tokens"] == 111_541 and result["loss"] <= 1.82
  text = run_command("generate", f"--workdir={tmp_path}/run", "--max_tokens=300")
  assert len(text) >= 300 and "\n" in text


POEMS = ("--config.data.sources.main.document=paragraph",)
NOVEL = ("--config.data.split=tail",)  # one document: its tail is for validation
TEXTS = {
  "tang": ("tang_poems_zh_hant.txt", POEMS, 8192, "春"),
  "japanese": ("wagahaiwa_nekodearu_ja.txt", NOVEL, 8000, "吾輩は"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_languages_prepare_train_and_sample(corpora, tmp_path, name):
  file, documents, vocab_size, prompt = TEXTS[name]
  path = corpora / "from_repos/corpora" / file
  common = (
    "--config=configs/quickstart.py",
    f"--config.data.store={tmp_path}/store",
    "--config.data.sources.main.kind=text",
    f"--config.data.sources.main.path={path}",
    *documents,
    f"--config.tokenizer.vocab_size={vocab_size}",
    "--config.num_steps=60",
    "--config.optim.warmup_steps=10",
  )
  assert "lossless" in run_command("prepare", *common)
  tokenizer = Tokenizer(Store(tmp_path / "store").tokenizer)
  text = path.read_text()
  assert tokenizer.decode(tokenizer.encode(text)) == text
  run_command("train", *common, f"--workdir={tmp_path}/run")
  result = json.loads(run_command("evaluate", f"--workdir={tmp_path}/run", "--json"))
  assert result["bits_per_byte"] < result["unigram_bits_per_byte"]
  sample = run_command("generate", f"--workdir={tmp_path}/run", f"--prompt={prompt}")
  assert sample.startswith(prompt) and len(sample) > len(prompt) + 20


@pytest.mark.parametrize("name", ["tfrecord", "array_record"])
def test_c4_trains_from_its_tfds_directory(corpora, tmp_path, name):
  path = corpora / "from_repos/tfds/c4/en/3.0.1"
  if name == "array_record":
    path = f"{path}/c4-{{split}}.array_record*"
  common = (
    "--config=configs/quickstart.py",
    f"--config.data.store={tmp_path}/store",
    "--config.data.sources.main.kind=tfds",
    "--config.data.sources.main.validation_split=validation",
    f"--config.data.sources.main.path={path}",
    "--config.num_steps=60",
    "--config.optim.warmup_steps=10",
  )
  run_command("prepare", *common)
  run_command("train", *common, f"--workdir={tmp_path}/run")
  result = json.loads(run_command("evaluate", f"--workdir={tmp_path}/run", "--json"))
  assert result["bits_per_byte"] < result["unigram_bits_per_byte"]


def test_the_quickstart_keeps_its_promises(tmp_path):
  """Runs on a copy of the tracked files, in the active environment."""
  clone = tmp_path / "clone"
  run("git", "clone", "-q", ROOT, clone)
  env = dict(os.environ, VIRTUAL_ENV=sys.prefix, PYTHONPATH=str(clone))
  env["PATH"] = f"{sys.prefix}/bin:{env['PATH']}"
  env.pop("XLA_FLAGS", None)
  done = subprocess.run(
    ["bash", "launch/quickstart.sh"], cwd=clone, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "lossless" in done.stdout and "everything is in" in done.stdout
  run_dir = clone / "runs/quickstart"
  rows = [
    json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()
  ]
  evaluated = [row for row in rows if row["kind"] == "eval"][-1]
  printed = done.stdout.split("bits per byte ")[1]
  unigram = float(printed.split("alone: ")[1].split(")")[0])
  assert evaluated["bits_per_byte"] < 0.75 * unigram
  again = subprocess.run(
    ["bash", "launch/quickstart.sh"], cwd=clone, env=env, capture_output=True, text=True
  )
  assert again.returncode == 0 and "nothing to do" in again.stdout
