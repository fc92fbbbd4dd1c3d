"""A run's directory: the names of its files, its lock, and the readers of its files.

No JAX here: commands read a stored config before anything slow is imported. The format
of a checkpoint is described in training/checkpoint.py.
"""

import json
import os
import pathlib
import shlex
import shutil
import socket
import sys
import time
from typing import Self

from ml_collections import ConfigDict

from flaxlm.config.load import apply_overrides, config_from_json
from flaxlm.errors import MissingInputError, OutputError, printable
from flaxlm.files import rename, write_atomically
from flaxlm.json_files import read_json
from flaxlm.runs import binding
from flaxlm.training.manifest import newest_meta


class RunFiles:
  """The path of everything that a run keeps in its directory.

  The tokenizer is there too, under the name of its format: see tokenizer/files.py.
  """

  def __init__(self, workdir: str | os.PathLike):
    self.workdir = workdir = pathlib.Path(workdir)
    self.config = workdir / "config.json"
    self.chat_template = workdir / "chat_template.jinja"  # of chats alone
    self.kernel = workdir / "attention.txt"  # the one that was chosen: see resolve.py
    self.checkpoints = workdir / "checkpoints"
    self.metrics = workdir / "metrics.jsonl"
    self.tensorboard = workdir / "tensorboard"
    self.profile = workdir / "profile"
    self.evals = workdir / "evals"  # results of tasks: see evals/saved.py
    self.originals = workdir / "huggingface"  # small files of an imported model
    self.lock = workdir / ".lock"
    self.owner = workdir / "owner.json"  # of the process that holds the lock


def load_run_config(
  workdir: str | os.PathLike, overrides: list[str] = ()
) -> ConfigDict:
  """Returns the config that the run in `workdir` stored, with overrides applied.

  Overrides that change what the weights compute are named on stderr.

  Raises:
    MissingInputError: there is no run.
    DataError: a file of the run is damaged, or is not that of its checkpoints.
  """
  files = RunFiles(workdir)
  meta = newest_meta(files.checkpoints)
  config = _read_config(files, meta)
  if meta is not None:
    binding.check_files(files.workdir, meta)
  before = binding.of_the_model(config)
  config = apply_overrides(config, overrides)
  for line in binding.differences(binding.of_the_model(config), before):
    print(f"flaxlm: warning: {printable(line)}", file=sys.stderr)
  return config


def _read_config(files: RunFiles, meta: dict | None) -> ConfigDict:
  """Returns the stored config; that of the newest checkpoint if the file is missing."""
  path, trained = files.config, binding.trained_config(meta or {})
  if not path.is_file():
    if trained is None:
      raise MissingInputError(
        f"--workdir={files.workdir} holds no run",
        f"{path.absolute()} (missing)",
        "a directory that `python -m flaxlm.train --workdir=...` wrote",
      )
    print(
      f"flaxlm: {path} is missing: the config of checkpoint {meta['step']} is used",
      file=sys.stderr,
    )
    return trained
  try:
    config = config_from_json(path.read_bytes(), (), path)
  except ValueError as error:
    if trained is None:
      raise
    found = binding.describe_edit(path.read_bytes(), meta) or str(error)
    raise binding.not_of_this_run(path, found.splitlines()[0], meta) from error
  if meta is not None:
    binding.check_stored(path, config, meta)
  return config


def hash_kept(workdir: str | os.PathLike) -> dict[str, str]:
  """Returns {name: sha256} of the small files that a run keeps beside its tokenizer.

  A checkpoint names them, and `load_run_config` compares them.
  """
  files = RunFiles(workdir)
  paths = [files.chat_template, *files.originals.glob("*")]
  return {
    str(path.relative_to(files.workdir)): binding.file_sha256(path)
    for path in sorted(paths)
    if path.is_file()
  }


def find_originals(config, workdir: pathlib.Path) -> pathlib.Path | None:
  """Returns the original's files, kept by this run or the one that it started from."""
  while not (RunFiles(workdir).originals / "config.json").is_file():
    if not config.init_from:
      return None
    workdir = split_address(config.init_from)[0]
    config = load_run_config(workdir)
  return RunFiles(workdir).originals


def keep_originals(files: RunFiles, init_from: str) -> None:
  """Copies the original's small files to a run that starts from another run.

  They say which tokens end a text, and are exported again: the other run may be gone.
  """
  if not init_from or files.originals.exists():
    return
  workdir = split_address(init_from)[0]
  originals = find_originals(load_run_config(workdir), workdir)
  if originals:
    draft = files.originals.with_name(f"{files.originals.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(originals, draft)
    rename(draft, files.originals)


def split_address(address: str) -> tuple[pathlib.Path, int | None]:
  """Returns (directory of the run, step or None) of `runs/x[/checkpoints/STEP]`."""
  path = pathlib.Path(address).expanduser()
  files = RunFiles(path.parent.parent)
  if path.parent == files.checkpoints and path.name.isdigit():
    return files.workdir, int(path.name)
  return path, None


class RunLock:
  """Locks `workdir` for one run; the operating system unlocks it if the process dies.

  Raises:
    OutputError: the directory cannot be written, or another run holds it.
  """

  def __init__(self, workdir: str | os.PathLike):
    self.files = RunFiles(workdir)

  def __enter__(self) -> Self:
    import filelock

    workdir = self.files.workdir
    if "://" in str(workdir) or str(workdir).startswith("gs:/"):
      raise self._refuse(
        "a remote address", "mount the bucket (gcsfuse) and give its path"
      )
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      self._lock = filelock.FileLock(self.files.lock, timeout=0)
      self._lock.acquire()
    except filelock.Timeout:
      raise self._refuse(
        self._describe_owner(), "wait for that run, or stop it"
      ) from None
    except (OSError, NotImplementedError) as error:
      reason = getattr(error, "strerror", None) or str(error)
      raise self._refuse(reason, "another --workdir, or other permissions") from None
    try:
      self._write_owner()
    except OSError as error:
      self._lock.release()
      raise self._refuse(error.strerror, "free space, or another --workdir") from None
    return self

  def __exit__(self, *_) -> None:
    self.files.owner.unlink(missing_ok=True)
    self._lock.release()

  def _refuse(self, given: str, hint: str) -> OutputError:
    return OutputError(
      f"--workdir={self.files.workdir} cannot be used",
      given,
      "a local directory that no other run writes",
      hint,
    )

  def _write_owner(self) -> None:
    owner = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "started": time.strftime("%Y-%m-%d %H:%M:%S"),
      "command": shlex.join(sys.orig_argv),
    }
    write_atomically(self.files.owner, json.dumps(owner, indent=2) + "\n")

  def _describe_owner(self) -> str:
    # The owner writes its file just after it takes the lock: give it a moment.
    for _ in range(5):
      try:
        fields = dict.fromkeys(("host", "started", "command"), str)
        owner = read_json(self.files.owner, fields | {"pid": int})
        return (
          f"in use by process {owner['pid']} on {owner['host']} "
          f"since {owner['started']}: " + printable(owner["command"], 120)
        )
      except (OSError, ValueError):
        time.sleep(0.1)
    return "in use by another run"
