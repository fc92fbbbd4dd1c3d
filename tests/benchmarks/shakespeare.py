"""Tiny Shakespeare by characters, timed over whole commands: flaxlm and nanoGPT.

  python tests/benchmarks/shakespeare.py --text=FILE --nanogpt=CLONE     # 6 minutes

nanoGPT runs its published CPU command (2,000 iterations). Then configs/shakespeare_fast
runs twice: until a validation loss of 1.88 nats per character, which nanoGPT publishes,
and for as many steps as fit into nanoGPT's time. Seconds are of whole commands, with
imports, compilation (the cache starts empty) and evaluations. FILE is
github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt. Without nanoGPT, the
second run has the config's number of steps.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import common

CONFIG = "--config=configs/shakespeare_fast.py"
NANOGPT = dict(
  device="cpu", compile=False, eval_iters=20, log_interval=1, block_size=64,
  batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000, lr_decay_iters=2000,
  dropout=0.0,
)  # fmt: skip


def run(*command, cwd=common.ROOT) -> tuple[float, str]:
  """Returns (seconds, standard output)."""
  start = time.perf_counter()
  done = subprocess.run(
    [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
  return time.perf_counter() - start, done.stdout


def nanogpt(clone: str, text: str, folder: pathlib.Path) -> dict:
  shutil.copytree(clone, folder / "nanogpt")
  data = folder / "nanogpt/data/shakespeare_char"
  shutil.copy(text, data / "input.txt")
  run("prepare.py", cwd=data)
  options = [f"--{key}={value}" for key, value in NANOGPT.items()]
  config = "config/train_shakespeare_char.py"
  seconds, said = run("train.py", config, *options, cwd=folder / "nanogpt")
  loss = float(re.findall(r"val loss ([\d.]+)", said)[-1])
  return {"trainer": "nanoGPT", "steps": 2000, "seconds": seconds, "val loss": loss}


def flaxlm(store: str, workdir: pathlib.Path, steps: int) -> dict:
  """Runs `steps` steps, then evaluates once on the whole validation split."""
  seconds, _ = run(
    "-m", "flaxlm.train", CONFIG, f"--config.data.store={store}",
    f"--workdir={workdir}", f"--config.num_steps={steps}",
    f"--config.optim.warmup_steps={min(20, steps)}",
    f"--config.eval.every={steps}", f"--config.checkpoint.every={steps}",
    "--config.log.tensorboard=false",
  )  # fmt: skip
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  loss = [record["loss"] for record in records if record["kind"] == "eval"][-1]
  return {"trainer": "flaxlm", "steps": steps, "seconds": seconds, "val loss": loss}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--text", required=True, help="the text to train on")
  parser.add_argument("--nanogpt", help="a clone of github.com/karpathy/nanoGPT")
  parser.add_argument("--target-steps", type=int, default=330)
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # for programs
    store = str(folder / "store")
    path = pathlib.Path(args.text).resolve()
    run("-m", "flaxlm.prepare", CONFIG, f"--config.data.store={store}",
        f"--config.data.sources.main.path={path}")  # fmt: skip
    rows = [nanogpt(args.nanogpt, args.text, folder)] if args.nanogpt else []
    short = flaxlm(store, folder / "short", args.target_steps)
    steps = 2000
    if rows:
      least = flaxlm(store, folder / "least", 1)["seconds"]  # fixed cost
      pace = (short["seconds"] - least) / (args.target_steps - 1)
      steps = int(0.97 * (rows[0]["seconds"] - least) / pace)
    rows += [short, flaxlm(store, folder / "long", steps)]
  common.report("tiny Shakespeare, whole commands", rows, args.json)


if __name__ == "__main__":
  main()
