"""Resolves the config of a run, once: knobs that its machine and its data decide.

Three knobs may be open in the config that a user gives. `task.labels` become those of
the data, `task.chat_template` that of the run to start from, and `model.attention=auto`
the fastest kernel that the doctor measured on this machine. The result is immutable.
A run stores it with the attention that was asked for, since another machine has other
kernels, and names the kernel in a file of its own.
"""

import pathlib

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from flaxlm.config.load import seal_config
from flaxlm.config.rules import attention_case
from flaxlm.data.feed import Feed
from flaxlm.files import write_atomically, writing
from flaxlm.kernels.attention import choice
from flaxlm.runs.directory import RunFiles, keep_originals, load_run_config
from flaxlm.tokenizer.files import file_name


def resolve(
  asked: ConfigDict, mesh: jax.sharding.Mesh, feed: Feed, kernel_file: pathlib.Path
) -> FrozenConfigDict:
  """Returns the config to train with; `asked` is not changed.

  Args:
    mesh: of the machine to train on.
    feed: the data, opened with `asked`.
    kernel_file: names the attention kernel that this run began with, if it exists.
  """
  config = asked.copy_and_resolve_references()
  config.task.chat_template = feed.template_path
  if feed.examples:  # stored with the run, so that classes keep their numbers
    config.task.labels = feed.examples.label_names
  config.model.attention = choose_attention(asked, mesh, kernel_file)
  return FrozenConfigDict(config)


def choose_attention(
  config: ConfigDict, mesh: jax.sharding.Mesh, kernel_file: pathlib.Path
) -> str:
  """Returns the kernel for attention=auto where the doctor's measurements decide it.

  A resumed run keeps the kernel that it began with, whatever the doctor has measured
  since. Where nothing is measured, "auto" stays: it means one kernel there.
  """
  device, attention = mesh.devices.flat[0], config.model.attention
  if attention != "auto" or device.platform not in choice.FUSED:
    return attention
  begun = (
    kernel_file.read_text(errors="replace").strip() if kernel_file.is_file() else ""
  )
  kernel = begun.rpartition(": ")[2]
  if begun == describe_kernel(kernel, mesh) and kernel in choice.ATTENTION_CHOICES:
    return kernel
  measured = choice.load_measured(device.device_kind, jax.__version__)
  return choice.choose_backend(attention_case(config, device.platform), measured)


def describe_kernel(attention: str, mesh: jax.sharding.Mesh) -> str:
  """Returns the line of the kernel file: the kernel, and the machine it was chosen on.

  The choice holds for this kind of device and this version of JAX alone.
  """
  device = mesh.devices.flat[0]
  return f"{device.device_kind}, jax {jax.__version__}: {attention}"


def store_run(
  files: RunFiles,
  asked: ConfigDict,
  config: FrozenConfigDict,
  mesh: jax.sharding.Mesh,
  feed: Feed,
  done: bool = False,
) -> None:
  """Writes the config, tokenizer and template: later commands need no other files.

  A run that is `done` keeps the config that it was trained with.

  Raises:
    OutputError, StorageError: a file cannot be written.
    DataError: the config of a run that is done was damaged, or edited.
  """
  if jax.process_index() != 0:
    return
  with writing(f"--workdir={files.workdir}"):
    _write_files(files, asked, config, mesh, feed, done)
  if done:
    load_run_config(files.workdir)


def _write_files(files, asked, config, mesh, feed: Feed, done: bool) -> None:
  if config.model.attention != asked.model.attention:
    kernel = describe_kernel(config.model.attention, mesh)
    write_atomically(files.kernel, kernel + "\n")
  stored = asked.copy_and_resolve_references()
  stored.task.update(config.task)
  if not (done and files.config.is_file()):
    write_atomically(files.config, seal_config(stored))
  if feed.chat_template:
    write_atomically(files.chat_template, feed.chat_template.source)
  if feed.tokenizer:
    write_atomically(files.workdir / file_name(feed.tokenizer), feed.tokenizer)
  keep_originals(files, "" if done else config.init_from)
