"""Stub programs that record how the launchers call them, and other helpers."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SECRETS = {"HF_TOKEN": "hf_qwertyuiop", "WANDB_API_KEY": "wandb_asdfghjkl"}
ODD = '--workdir=runs/it\'s "a" $HOME `id`; touch canary & \\'
# Appends its arguments to calls.jsonl, then prints and exits as answers.json says:
# {"a regular expression": [[output, exit code], ...]}, of which the last repeats.
STUB = """#!{python}
import json, pathlib, re, sys
home, call = pathlib.Path(__file__).parent, [pathlib.Path(__file__).name, *sys.argv[1:]]
with (home / "calls.jsonl").open("a") as f: f.write(json.dumps(call) + "\\n")
answers = json.loads((home / "answers.json").read_text())
for pattern, replies in answers.items():
  if re.search(pattern, " ".join(call)):
    output, code = replies[0]
    if len(replies) > 1: answers[pattern] = replies[1:]
    (home / "answers.json").write_text(json.dumps(answers))
    print(output, file=sys.stderr if code else sys.stdout)
    sys.exit(code)
"""


class Stubs:
  def __init__(self, home):
    self.home = home / "stubs"
    self.home.mkdir()
    self.answer()
    for name in ("gcloud", "sbatch", "srun", "scontrol", "sky", "kubectl", "xpk"):
      self.write(name, STUB.format(python=sys.executable))

  def write(self, name, text):
    (self.home / name).write_text(text)
    (self.home / name).chmod(0o755)

  def answer(self, **answers):
    replies = {k: [v] if isinstance(v, tuple) else v for k, v in answers.items()}
    (self.home / "answers.json").write_text(json.dumps(replies))

  def calls(self):
    path = self.home / "calls.jsonl"
    return (
      [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    )

  def environment(self, **changes):
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", *SECRETS)}
    path = f"{self.home}:{sys.prefix}/bin:{os.environ['PATH']}"
    env = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "JAX_PLATFORMS": "cpu"}
    return keep | env | {"PYTHONPATH": str(ROOT), "POLL_SECONDS": "0"} | changes

  def run(self, script, *arguments, code=0, cwd=ROOT, **env):
    done = subprocess.run(
      ["bash", str(LAUNCH / script), *map(str, arguments)],
      cwd=cwd, env=self.environment(**env), text=True, timeout=200,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}"
    return done.stdout


def commands(printed):
  """Returns the commands that --print shows, as lists of words."""
  lines = [line for line in printed.splitlines() if line and line[0] != "#"]
  return [shlex.split(line) for line in lines]


def flags(hardware, slices=1, **env):
  show = 'for n in XLA_FLAGS LIBTPU_INIT_ARGS; do echo "$n=${!n:-}"; done'
  script = f'source launch/xla_flags.sh "$0" "$1"; {show}'
  command = ["bash", "-euc", script, hardware, str(slices)]
  plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    command, cwd=ROOT, env=plain | env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  lines = dict(line.split("=", 1) for line in done.stdout.splitlines())
  return lines["XLA_FLAGS"], lines["LIBTPU_INIT_ARGS"]
