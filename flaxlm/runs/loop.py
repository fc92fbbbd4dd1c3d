"""The training loop: everything that a run needs is built, and then there is one `for`.

Two habits keep the device busy and the run safe. The numbers of a step are read only
after the next step has been dispatched (except on a CPU, where steps do not overlap).
A checkpoint is saved before anything that could fail.
"""

import contextlib
import pathlib
from collections.abc import Callable
from functools import partial

import jax

from flaxlm import machine
from flaxlm.config.tree import flatten
from flaxlm.data.feed import Feed
from flaxlm.errors import Preempted
from flaxlm.parallel.agreement import agree, local_facts
from flaxlm.parallel.joining import join_processes
from flaxlm.parallel.mesh import axis_sizes, make_mesh
from flaxlm.parallel.one_fate import OneFate
from flaxlm.parallel.replicas import Replicas
from flaxlm.runs.begin import describe_checkpoint, initial_state
from flaxlm.runs.directory import RunFiles, RunLock
from flaxlm.runs.held_out import make_scorer
from flaxlm.runs.program import Program, build_program, open_feed, use_config_mesh
from flaxlm.runs.progress import Profiler, TrainingProgress, count_programs, say
from flaxlm.runs.records import is_logged
from flaxlm.runs.resolve import describe_kernel, resolve, store_run
from flaxlm.runs.saving import Saves
from flaxlm.runs.summary import print_run_card
from flaxlm.runs.weights import class_labels, template_path, tokenizer_path
from flaxlm.training.checkpoint import Checkpointer
from flaxlm.training.evaluation import evaluate, make_eval_step
from flaxlm.training.guards import StopSignal, Watchdog


def train(
  config,
  workdir: pathlib.Path,
  stop: StopSignal,
  predict: Callable | None = None,
  open_tasks: Callable | None = None,
) -> None:
  """Trains to config.num_steps, from the newest checkpoint in `workdir` if any.

  Args:
    predict: returns the seconds that a step should take, from (config, mesh); they are
      logged beside the measured ones.
    open_tasks: returns what scores the model on config.eval.tasks, from (config, the
      bytes of the tokenizer); needed only if there are such tasks.
  Raises:
    Preempted: a signal asked for a stop; the state is saved.
    UserError: any other kind, for what the user can mend.
  """
  files, allocator = RunFiles(workdir), machine.keep_freed_memory()
  seconds = config.mesh.start_seconds
  join_processes(config.mesh.multihost, seconds, lambda: stop.requested)
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    compiled = enter(count_programs())
    fate = enter(OneFate())
    knobs = {f"config.{key}": value for key, value in flatten(config).items()}
    agree("the start", local_facts() | knobs, seconds)
    mesh = make_mesh(**axis_sizes(config.mesh))
    sources = tokenizer_path(config), template_path(config)
    feed = open_feed(config, mesh, *sources, labels=class_labels(config))
    asked, config = config, resolve(config, mesh, feed, files.kernel)
    data = {"data": feed.fingerprint, "the tokenizer (sha256)": feed.tokenizer_sha256}
    kernel = {"the attention kernel": describe_kernel(config.model.attention, mesh)}
    agree("the data", data | kernel, seconds)
    assert open_tasks or not config.eval.tasks, "tasks need `open_tasks`"
    tasks = open_tasks(config, feed.tokenizer) if config.eval.tasks else None
    program = build_program(config, mesh)
    enter(use_config_mesh(config, mesh))
    if jax.process_index() == 0:
      enter(RunLock(workdir))
    watchdog = enter(Watchdog(config.guards.hang_seconds))
    checkpoints = enter(Checkpointer(files.checkpoints, **config.checkpoint))
    stack.push(fate.end_if_failed)  # before the checkpoints wait for other processes
    start = initial_state(config, mesh, program, feed, checkpoints)
    state, base, first_step = start.state, start.base, start.step
    # A run that was killed between a checkpoint and its evaluation makes up for it.
    owed = evaluation_is_due(config, feed, first_step)
    owed = owed and not is_logged(files.metrics, first_step, "eval")
    done = first_step >= config.num_steps and not owed
    store_run(files, asked, config, mesh, feed, done)
    print_run_card(config, workdir, program.target, feed, mesh, first_step, allocator)
    if done:
      say(f"nothing to do: step {first_step} of {config.num_steps} is reached")
      return
    expected = predict and predict(config, mesh)
    told = first_step, compiled, expected, start.rows
    progress = enter(TrainingProgress(config, workdir, *told))
    profiler = enter(Profiler(config.log, files.profile))
    start = start.with_files(workdir)
    saves = Saves(checkpoints, partial(describe_checkpoint, config, feed, start))
    replicas = Replicas(config.guards.compare_every, mesh)
    evaluate_after = make_evaluation(program, feed, progress, stop, watchdog, tasks)
    if owed and not evaluate_after(first_step, state, base):
      raise stopped(files, config, first_step)

    say("compiling the training step ...")
    batches = feed.read_train(first_step, config.num_steps, start.rows)
    batches = progress.waiting_for(batches)
    for step, batch in enumerate(batches, first_step + 1):
      profiler.at(step)
      state, metrics = program.train_step(state, batch, base)
      held = {"the weights": state.model, "the batch": batch, "the count": state.step}
      replicas.after(step, held)
      progress.add(step, metrics)
      saves.poll()
      watchdog.beat()
      last, stopping = step == config.num_steps, stop.should_stop(step)
      if last or stopping:
        progress.flush()
        saves.finish(step, state)  # before anything that could fail
      elif saves.is_due(step):
        progress.flush()
        saves.begin(step, state)
      if not stopping and evaluation_is_due(config, feed, step):
        stopping = not evaluate_after(step, state, base)
        if stopping:  # a signal came during the evaluation
          saves.finish(step, state)
      if stopping:
        raise stopped(files, config, step)
  say(f"done: {files.checkpoints / str(config.num_steps)}, {files.metrics}")


def stopped(files: RunFiles, config, step: int) -> Preempted:
  """Returns the error that ends a run whose state after `step` is saved."""
  return Preempted(
    f"stopped after step {step} of {config.num_steps}\n"
    f"  saved:  {files.checkpoints / str(step)}\n"
    "  next:   the same command continues from there"
  )


def make_evaluation(
  program: Program,
  feed: Feed,
  progress: TrainingProgress,
  stop: StopSignal,
  watchdog: Watchdog,
  tasks: Callable | None = None,
) -> Callable[..., bool]:
  """Returns `evaluate_after(step, state, base)`, which logs the held-out numbers.

  It returns False, and logs nothing, if a signal came before it was done.
  """
  assemble, eval_step = jax.jit(program.assemble), jax.jit(make_eval_step())

  def evaluate_after(step: int, state, base) -> bool:
    model, result = assemble(state.eval_model, base), {}
    with progress.paused(step):
      if feed.validation is not None:
        result = evaluate(
          model,
          feed.read_validation(),
          eval_step,
          feed.bytes_per_token(),
          stop.should_stop,
          watchdog.beat,
          make_scorer(feed),
        )
      if tasks is not None and result is not None:
        scores = tasks(model, stop.should_stop, watchdog.beat)
        result = None if scores is None else result | scores
    if result is not None:
      progress.writer.log(step, result, kind="eval")
    return result is not None

  return evaluate_after


def evaluation_is_due(config, feed: Feed, step: int) -> bool:
  """Says whether the model is evaluated after `step`: on time, or at the end."""
  if (feed.validation is None and not config.eval.tasks) or step == 0:
    return False
  every = config.eval.every
  return step == config.num_steps or (every > 0 and step % every == 0)
