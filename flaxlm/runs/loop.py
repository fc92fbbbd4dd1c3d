"""The training loop, on one page; what it prepares and reports is below it.

Two habits keep the device busy and the run safe: the numbers of a step are read only
after the next one has been dispatched (but on a CPU, where steps do not overlap), and a
checkpoint is saved before anything that could fail.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flaxlm import machine
from flaxlm.config.load import config_from_json, config_to_json
from flaxlm.config.tree import flatten
from flaxlm.data.feed import Feed
from flaxlm.errors import DataError, Preempted
from flaxlm.files import write_atomically
from flaxlm.parallel.agreement import agree, local_facts
from flaxlm.parallel.joining import join_processes
from flaxlm.parallel.mesh import axis_sizes, make_mesh
from flaxlm.parallel.one_fate import OneFate
from flaxlm.runs import directory, weights
from flaxlm.runs.directory import RunFiles, RunLock
from flaxlm.runs.held_out import scorer
from flaxlm.runs.program import (
  build_program,
  open_feed,
  settle_attention,
  use_config_mesh,
)
from flaxlm.runs.progress import Profiler, TrainingProgress, count_programs, say
from flaxlm.runs.summary import print_run_card
from flaxlm.tokenizer.files import file_name
from flaxlm.training import lora
from flaxlm.training.checkpoint import Checkpointer
from flaxlm.training.evaluation import evaluate, make_eval_step
from flaxlm.training.guards import StopSignal, Watchdog
from flaxlm.training.state import shardings_of


def train(
  config, workdir: pathlib.Path, stop: StopSignal, predict: Callable | None = None
) -> None:
  """Trains to config.num_steps, from the newest checkpoint in `workdir` if any.

  Args:
    predict: the seconds that a step should take, of (config, mesh); they are logged.
  Raises:
    Preempted: a signal asked for a stop; the state is saved.
    UserError: in its other kinds, for what the user can mend.
  """
  files, allocator = RunFiles(workdir), machine.keep_freed_memory()
  seconds = config.mesh.start_seconds
  join_processes(config.mesh.multihost, seconds, lambda: stop.requested)
  with contextlib.ExitStack() as stack:
    compiled = stack.enter_context(count_programs())
    fate = stack.enter_context(OneFate())
    knobs = {f"config.{key}": value for key, value in flatten(config).items()}
    agree("the start", local_facts() | knobs, seconds)
    mesh = make_mesh(**axis_sizes(config.mesh))
    config.task.chat_template = weights.template_path(config)
    feed = open_feed(config, mesh, weights.tokenizer_path(config))
    if feed.examples:  # kept with the run, so that classes keep their numbers
      config.task.labels = feed.examples.label_names
    data = {"data": feed.fingerprint, "the tokenizer (sha256)": feed.tokenizer_sha256}
    asked, kernel = config.model.attention, settle_attention(config, mesh, workdir)
    agree("the data", data | {"the attention kernel": kernel}, seconds)
    program = build_program(config, mesh)
    target, train_step = program.target, program.train_step
    stack.enter_context(use_config_mesh(config, mesh))
    if jax.process_index() == 0:
      stack.enter_context(RunLock(workdir))
    watchdog = stack.enter_context(Watchdog(config.guards.hang_seconds))
    checkpoints = stack.enter_context(
      Checkpointer(files.checkpoints, **config.checkpoint)
    )
    stack.push(fate.end_if_failed)  # before the checkpoints wait for other processes
    state = restore(checkpoints, target, feed, config)
    fresh = state is None
    if fresh:
      state = program.init(jax.random.key(config.seed))
    base = None
    if config.init_from and (fresh or config.lora.rank):
      state, base = start_from(config, state, target, feed, mesh, fresh)
    first_step = int(state.step)
    store_run(workdir, config, feed, asked, kernel)
    print_run_card(config, workdir, target, feed, mesh, first_step, allocator)
    # Killed between a checkpoint and its evaluation, a run owes that evaluation still.
    logged = directory.is_logged(files.metrics, first_step, "eval")
    owed = evaluation_is_due(config, feed, first_step) and not logged
    if first_step >= config.num_steps and not owed:
      say(f"nothing to do: step {first_step} of {config.num_steps} is reached")
      return

    eval_step = jax.jit(make_eval_step())
    expected = predict and predict(config, mesh)
    progress = stack.enter_context(
      TrainingProgress(config, workdir, first_step, compiled, expected)
    )
    profiler = stack.enter_context(Profiler(config.log, workdir))
    evaluated = jax.jit(program.assemble)
    assess = functools.partial(
      evaluate_and_log, feed, eval_step, progress, stop, watchdog
    )
    if owed:
      assess(first_step, evaluated(state.eval_model, base))

    say("compiling the training step ...")
    batches = progress.waiting_for(feed.read_train(first_step, config.num_steps))
    for step, batch in enumerate(batches, first_step + 1):
      profiler.at(step)
      state, metrics = train_step(state, batch, base)
      progress.add(step, metrics)
      checkpoints.poll()
      watchdog.beat()
      last, stopping = step == config.num_steps, stop.should_stop(step)
      if last or stopping or checkpoints.is_due(step):
        progress.flush()
        checkpoints.save(step, state, describe_checkpoint(config, feed, step))
      if not stopping and evaluation_is_due(config, feed, step):
        stopping = not assess(step, evaluated(state.eval_model, base))
        if stopping:  # a signal came during evaluation
          checkpoints.save(step, state, describe_checkpoint(config, feed, step))
      if stopping:
        raise Preempted(
          f"stopped after step {step} of {config.num_steps}\n"
          f"  saved:  {files.checkpoints / str(step)}\n"
          "  next:   the same command continues from there"
        )
  say(f"done: {files.checkpoints / str(config.num_steps)}, {files.metrics}")


def evaluate_and_log(feed, eval_step, progress, stop, watchdog, step, model) -> bool:
  """Evaluates the model after `step`; False if a signal came before it was done."""
  with progress.paused(step):
    result = evaluate(
      model,
      feed.read_validation(),
      eval_step,
      feed.bytes_per_token(),
      stop.should_stop,
      watchdog.beat,
      scorer(feed),
    )
  if result is not None:
    progress.writer.log(step, result, kind="eval")
  return result is not None


def evaluation_is_due(config, feed: Feed, step: int) -> bool:
  if feed.validation is None or step == 0:
    return False
  every = config.eval.every
  return step == config.num_steps or (every > 0 and step % every == 0)


def describe_checkpoint(config, feed: Feed, step: int) -> dict:
  """What a checkpoint says of itself."""
  return {
    "step": step,
    "tokens": step * config.data.batch_size * config.data.seq_len,
    "data_fingerprint": feed.fingerprint,
    "tokenizer_sha256": feed.tokenizer_sha256,
    "config": json.loads(config_to_json(config)),
  }


def start_from(config, state, target, feed: Feed, mesh, fresh: bool):
  """Puts the weights of config.init_from into a fresh state: (state, frozen base)."""
  rules = config.mesh.rules.to_dict()
  model, meta = weights.initial_model(config, mesh, rules)
  hashes = {meta["tokenizer_sha256"], feed.tokenizer_sha256} - {""}
  if len(hashes) > 1:
    raise DataError(
      "the data was made with another tokenizer than the model's\n"
      f"  given:  {feed.tokenizer_sha256[:12]}\n"
      f"  needed: {meta['tokenizer_sha256'][:12]}, of {config.init_from}\n"
      f"  try:    --config.tokenizer.path={config.init_from} when you prepare the data"
    )
  for what in ("new", "left"):
    if meta[what] and fresh:
      words = {"new": "initialised, not in", "left": "not needed from"}[what]
      say(f"{words} {config.init_from}: {' '.join(meta[what])}")
  base = None
  if config.lora.rank:
    base, adapt = model, functools.partial(lora.init, **config.lora, seed=config.seed)
    model = jax.jit(adapt, out_shardings=shardings_of(target.model))(base)
  if not fresh:
    return state, base
  ema = None if state.ema is None else jax.tree.map(jnp.copy, model)
  return dataclasses.replace(state, model=model, ema=ema), base


def restore(checkpoints: Checkpointer, target, feed: Feed, config):
  """Returns the newest valid state, or None for a new run; refuses other data."""
  restored = checkpoints.restore_latest(target)
  if restored is None:
    return None
  state, meta = restored
  if meta["data_fingerprint"] != feed.fingerprint:
    raise DataError(
      "the run was started with other data\n"
      f"  given:  {config.data.store}, fingerprint {feed.fingerprint[:12]}\n"
      f"  needed: fingerprint {meta['data_fingerprint'][:12]}, as in its checkpoints\n"
      "  try:    the config.data.store of that run, or another --workdir"
    )
  before = flatten(config_from_json(json.dumps(meta["config"])))
  for key, value in flatten(config).items():
    if key in before and value != before[key]:
      say(f"changed since step {meta['step']}: config.{key} {before[key]} -> {value}")
  return state


def store_run(workdir: pathlib.Path, config, feed: Feed, asked: str, kernel: str):
  """Keeps the config and the tokenizer with the run: later commands need no more."""
  if jax.process_index() == 0:
    files = RunFiles(workdir)
    if config.model.attention != asked:
      write_atomically(files.kernel, kernel)
    kept = config.copy_and_resolve_references()
    kept.model.attention = asked  # other machines have other kernels
    write_atomically(files.config, config_to_json(kept))
    if feed.chat_template:
      write_atomically(files.chat_template, feed.chat_template.source)
    if feed.tokenizer:
      write_atomically(workdir / file_name(feed.tokenizer), feed.tokenizer)
