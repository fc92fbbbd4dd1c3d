"""The training loop, on one page; what it prepares and reports is below it.

Two habits keep the device busy and the run safe: the numbers of a step are read only
after the next one has been dispatched (but on a CPU, where steps do not overlap), and a
checkpoint is saved before anything that could fail.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import psutil

from flaxlm import config as configs
from flaxlm import weights
from flaxlm.data.feed import Feed
from flaxlm.data.store import write_atomically
from flaxlm.data.tokenizer_files import file_name
from flaxlm.errors import DataError, Preempted
from flaxlm.models.flops import flops_per_token
from flaxlm.parallel import hosts
from flaxlm.parallel.hardware import peak_flops
from flaxlm.parallel.mesh import axis_sizes, make_mesh
from flaxlm.parallel.pipeline import bubble
from flaxlm.parallel.sharding import bytes_per_device
from flaxlm.planning.calibrate import expected_seconds
from flaxlm.program import KERNEL, build, settle_attention, use_config_mesh
from flaxlm.training import lora
from flaxlm.training import metrics as reports
from flaxlm.training.checkpoint import Checkpointer
from flaxlm.training.evaluation import evaluate, make_eval_step
from flaxlm.training.guards import BadSteps, RunLock, StopSignal, Watchdog
from flaxlm.training.scores import score
from flaxlm.training.state import shardings_of


def train(config, workdir: pathlib.Path, stop: StopSignal) -> None:
  """Trains to config.num_steps, from the newest checkpoint in `workdir` if any.

  Raises:
    Preempted: a signal asked for a stop; the state is saved.
    UserError: in its other kinds, for what the user can mend.
  """
  allocator = hosts.keep_freed_memory()
  seconds = config.mesh.start_seconds
  hosts.join(config.mesh.multihost, seconds, lambda: stop.requested)
  with contextlib.ExitStack() as stack:
    compiled = stack.enter_context(count_programs())
    fate = stack.enter_context(hosts.OneFate())
    knobs = {f"config.{key}": value for key, value in configs.flatten(config).items()}
    hosts.agree("the start", hosts.facts() | knobs, seconds)
    mesh = make_mesh(**axis_sizes(config.mesh))
    config.task.chat_template = weights.template_path(config)
    feed = Feed(config, mesh, weights.tokenizer_path(config))
    if feed.examples:  # kept with the run, so that classes keep their numbers
      config.task.labels = feed.examples.label_names
    data = {"data": feed.fingerprint, "the tokenizer (sha256)": feed.tokenizer_sha256}
    asked, kernel = config.model.attention, settle_attention(config, mesh, workdir)
    hosts.agree("the data", data | {"the attention kernel": kernel}, seconds)
    program = build(config, mesh)
    target, train_step = program.target, program.train_step
    stack.enter_context(use_config_mesh(config, mesh))
    if jax.process_index() == 0:
      stack.enter_context(RunLock(workdir))
    watchdog = stack.enter_context(Watchdog(config.guards.hang_seconds))
    checkpoints = stack.enter_context(
      Checkpointer(workdir / "checkpoints", **config.checkpoint)
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
    summarize(config, workdir, target, feed, mesh, first_step, allocator)
    # Killed between a checkpoint and its evaluation, a run owes that evaluation still.
    owed = evaluation_is_due(config, feed, first_step) and not reports.is_logged(
      workdir / "metrics.jsonl", first_step, "eval"
    )
    if first_step >= config.num_steps and not owed:
      say(f"nothing to do: step {first_step} of {config.num_steps} is reached")
      return

    eval_step = jax.jit(make_eval_step())
    progress = stack.enter_context(
      Progress(config, workdir, first_step, mesh, compiled)
    )
    profiler = stack.enter_context(Profiler(config.log, workdir))
    evaluated = jax.jit(program.assemble)
    assess = functools.partial(
      evaluate_and_log, feed, eval_step, progress, stop, watchdog
    )
    if owed:
      assess(first_step, evaluated(state.eval_model, base))

    say("compiling the training step ...")
    batches = progress.waiting_for(feed.read_train(first_step))
    for step, batch in enumerate(batches, first_step + 1):
      profiler.at(step)
      state, metrics = train_step(state, batch, base)
      progress.add(step, metrics)
      checkpoints.poll()
      watchdog.beat()
      last, stopping = step == config.num_steps, stop.should_stop(step)
      if last or stopping or checkpoints.is_due(step):
        progress.flush()
        checkpoints.save(step, state, describe(config, feed, step))
      if not stopping and evaluation_is_due(config, feed, step):
        stopping = not assess(step, evaluated(state.eval_model, base))
        if stopping:  # a signal came during evaluation
          checkpoints.save(step, state, describe(config, feed, step))
      if stopping:
        raise Preempted(
          f"stopped after step {step} of {config.num_steps}\n"
          f"  saved:  {workdir}/checkpoints/{step}\n"
          "  next:   the same command continues from there"
        )
  say(f"done: {workdir}/checkpoints/{config.num_steps}, {workdir}/metrics.jsonl")


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


def scorer(feed: Feed):
  """What turns predicted labels into metrics, or None where words are predicted."""
  if feed.examples is None or feed.examples.kind == "chat":
    return None
  examples = feed.validation.examples

  def score_all(chosen, scores):
    predictions, references = examples.scored(chosen, scores)
    return score(examples.kind, predictions, references, examples.label_names)

  return score_all


def evaluation_is_due(config, feed: Feed, step: int) -> bool:
  if feed.validation is None or step == 0:
    return False
  every = config.eval.every
  return step == config.num_steps or (every > 0 and step % every == 0)


def say(line: str) -> None:
  if jax.process_index() == 0:
    print(line, flush=True)


def describe(config, feed: Feed, step: int) -> dict:
  """What a checkpoint says of itself."""
  return {
    "step": step,
    "tokens": step * config.data.batch_size * config.data.seq_len,
    "data_fingerprint": feed.fingerprint,
    "tokenizer_sha256": feed.tokenizer_sha256,
    "config": json.loads(configs.to_json(config)),
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
  before = configs.flatten(configs.from_json(json.dumps(meta["config"])))
  for key, value in configs.flatten(config).items():
    if key in before and value != before[key]:
      say(f"changed since step {meta['step']}: config.{key} {before[key]} -> {value}")
  return state


def store_run(workdir: pathlib.Path, config, feed: Feed, asked: str, kernel: str):
  """Keeps the config and the tokenizer with the run: later doors need nothing else."""
  if jax.process_index() == 0:
    if config.model.attention != asked:
      write_atomically(workdir / KERNEL, kernel.encode())
    kept = config.copy_and_resolve_references()
    kept.model.attention = asked  # other machines have other kernels
    write_atomically(workdir / "config.json", configs.to_json(kept).encode())
    if feed.chat_template:
      template = feed.chat_template.source.encode()
      write_atomically(workdir / weights.TEMPLATE, template)
    if feed.tokenizer:
      write_atomically(workdir / file_name(feed.tokenizer), feed.tokenizer)


def summarize(config, workdir, target, feed: Feed, mesh, first_step, allocator) -> None:
  """Prints the card of the run: what will be computed, on what, from what."""
  if jax.process_index():
    return
  model, data = config.model, config.data
  text, epochs = feed.describe()
  whole = weights.abstract_model(config)
  tables = (whole.embed, whole.positions, whole.segment_types, whole.unembed)
  total, embedded = count(whole), count(tables)
  trained = f"; trained: {count(target.model):,} weights" if config.lora.rank else ""
  reports.print_summary(
    model=f"{model.num_layers} layers, {model.embed_dim} wide, "
    f"{model.num_heads} heads, context {data.seq_len}, {model.positions} positions, "
    f"{model.norm}, {model.activation}, {model.dtype}, attention {model.attention}"
    f"{trained}",
    parameters={"layers": total - embedded, "embeddings": embedded},
    tokens_per_step=data.batch_size * data.seq_len,
    num_steps=config.num_steps,
    flops_per_token=flops_per_token(model, data.seq_len),
    mesh={axis: n for axis, n in mesh.shape.items() if n > 1} or {"data": 1},
    pipeline=schedule(config.mesh, mesh.shape["stage"]),
    device_kind=jax.devices()[0].device_kind,
    bytes_per_device={
      "parameters": bytes_per_device(target.model),
      "optimizer": bytes_per_device(target.opt_state),
    },
    data=text,
    epochs=epochs,
    tokenizer=f"{feed.tokenizer_sha256[:12] or 'none'}, vocabulary {model.vocab_size}",
    workdir=workdir,
    resume=f"from step {first_step}" if first_step else "new run",
    xla=allocator if jax.default_backend() == "cpu" else "",
  )


def schedule(knobs, stages: int) -> str:
  """The pipeline of config.mesh in words; "" if there is none."""
  if stages == 1:
    return ""
  micro, rounds = knobs.microbatches or stages, knobs.stage_repeats
  idle = bubble(stages, micro, rounds)
  return f"{micro} microbatches, {rounds} rounds of {stages} stages: {idle:.1%} bubble"


def count(tree) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def count_programs() -> Iterator[collections.Counter]:
  """Counts how many programs are asked of JAX's cache, and how many it has."""
  events = collections.Counter()

  def count(event: str, **_) -> None:
    events[event.rpartition("/")[2]] += 1

  jax.monitoring.register_event_listener(count)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_listener(count)


def startup(compiled: collections.Counter) -> str:
  """How long a user waited for the first step, and what of it was compiled anew."""
  seconds = time.time() - psutil.Process().create_time()
  asked, found = compiled["compile_requests_use_cache"], compiled["cache_hits"]
  cache = f"{found} of {asked} programs came from the cache" if asked else "no cache"
  return f"first step {seconds:.1f} s after the command; {cache}"


class Progress:
  """Reads the numbers of each step, one step late; logs every log.every steps."""

  def __init__(self, config, workdir: pathlib.Path, first_step: int, mesh, compiled):
    self.every, self.num_steps = config.log.every, config.num_steps
    self.bad_steps = BadSteps(config.guards.max_bad_steps)
    bfloat16 = config.model.dtype == "bfloat16"
    self.writer = reports.MetricsWriter(
      workdir,
      config.log.tensorboard,
      first_step,
      config.num_steps,
      config.data.batch_size * config.data.seq_len,
      flops_per_token(config.model, config.data.seq_len),
      peak_flops(jax.devices()[0]) if bfloat16 else None,
      expected_seconds(config, mesh),
    )
    self._first_step, self._pending, self._waited = first_step, None, 0.0
    self._compiled = compiled  # of count_programs
    # Without asynchronous dispatch, a step is over when the loop hears of it.
    asynchronous = jax.config.read("jax_cpu_enable_async_dispatch")
    self._late = asynchronous or jax.default_backend() != "cpu"

  def __enter__(self) -> "Progress":
    self.writer.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self.writer.__exit__(*error)

  def waiting_for(self, batches: Iterator) -> Iterator:
    """Passes batches on, and measures how long the loop waits for each."""
    while True:
      start = time.perf_counter()
      batch = next(batches, None)
      self._waited += time.perf_counter() - start
      if batch is None:
        return
      yield batch

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the numbers of a step; reads those of steps that must be over by now."""
    self.flush()
    self._pending = step, metrics
    if not self._late:
      self.flush()

  def flush(self) -> None:
    """Waits for the last step and reads its numbers."""
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = jax.device_get(metrics)
    self.writer.advance(step)
    self.bad_steps.update(step, values.pop("bad"), values["loss"])
    first = step == self._first_step + 1
    if first or step % self.every == 0 or step == self.num_steps:
      if not values["skipped"]:  # the common case needs no column
        del values["skipped"]
      self.writer.log(step, values, "train", self._waited)
      self._waited = 0.0
    if first:  # its time was the compiler's
      say(startup(self._compiled))
      self.writer.restart_clock(step)

  @contextlib.contextmanager
  def paused(self, step: int):
    """Keeps the time of what happens inside out of the speed."""
    self.flush()
    yield
    self.writer.restart_clock(step)


class Profiler:
  """Traces log.profile_num_steps steps from log.profile_step on, for TensorBoard."""

  def __init__(self, log, workdir: pathlib.Path):
    self.first, self.stop = log.profile_step, log.profile_step + log.profile_num_steps
    self.directory = workdir / "profile"
    self.running = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_) -> None:
    if self.running:
      jax.profiler.stop_trace()

  def at(self, step: int) -> None:
    """Starts or stops before step `step`."""
    if self.first and step == self.first:
      jax.profiler.start_trace(str(self.directory))
      self.running = True
    elif self.running and step == self.stop:
      jax.profiler.stop_trace()
      self.running = False
      print(f"profile of steps {self.first} to {self.stop - 1}: {self.directory}")
