"""Evaluate a trained model: on its held-out data, or on tasks.

  python -m flaxlm.evaluate --workdir=runs/quickstart
  python -m flaxlm.evaluate --workdir=runs/quickstart --config.data.store=data/other
  python -m flaxlm.evaluate --workdir=runs/a --tasks=copa,blimp --task_data=DIR

Without --tasks, this prints the loss (nats per token), perplexity and bits per byte,
beside those of a model that knows only token frequencies. The same checkpoint and store
always give the same numbers.

With --tasks, the model may be a Hugging Face directory too. Each result is a file in
the directory's evals/, and no result is computed twice; flaxlm/evals/README.md lists
the tasks. --watch evaluates each checkpoint of a run while another process trains it.
"""

import argparse
import json
import pathlib

from flaxlm import cli, machine
from flaxlm.errors import ConfigError, DataError, MissingInputError
from flaxlm.runs.directory import RunFiles, load_run_config, split_address

_WATCH_SECONDS = 10.0


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "evaluate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  parser.add_argument("--tasks", help="names or task files, separated by commas")
  parser.add_argument("--task_data", default="", help="directory of the tasks' data")
  parser.add_argument("--limit", type=int, default=0, help="items per task; 0 is all")
  parser.add_argument("--output", help="of results; default: evals/ in --workdir")
  parser.add_argument("--against", help="a model to compare with, item by item")
  parser.add_argument(
    "--watch", action="store_true", help="evaluate checkpoints as they appear"
  )
  args, overrides = cli.parse_arguments(parser, argv)
  _check_flags(args)
  if args.tasks is not None:
    machine.keep_freed_memory()
    _evaluate_tasks(args, overrides)
    return
  config = load_run_config(args.workdir, overrides)
  # JAX is imported only now: --help and a wrong key have been answered.
  from flaxlm.runs.held_out import evaluate_run

  machine.keep_freed_memory()
  result = evaluate_run(config, pathlib.Path(args.workdir), args.step)
  if args.json:
    print(json.dumps(result))
    return
  print(_describe_result(result))


def _check_flags(args: argparse.Namespace) -> None:
  """Raises ConfigError for flags that would have no effect."""
  if args.limit < 0:
    raise ConfigError("--limit", args.limit, "0 (all), or a number of items")
  if args.tasks is None:
    for name in ("task_data", "limit", "output", "against", "watch"):
      if getattr(args, name):
        raise ConfigError(f"--{name}", "no --tasks", "tasks", "--tasks=copa")
  if args.watch and (args.step is not None or args.against):
    needed = "neither --step nor --against: it takes all checkpoints of one run"
    raise ConfigError("--watch", "with one of them", needed)


def _evaluate_tasks(args: argparse.Namespace, overrides: list[str]) -> None:
  from flaxlm.evals.measures import compare_items
  from flaxlm.evals.saved import watch_steps
  from flaxlm.evals.tasks import open_task
  from flaxlm.training.checkpoint import list_steps

  names = [name for name in args.tasks.split(",") if name]
  tasks = [open_task(name, args.task_data, args.limit) for name in names]
  if not tasks:
    raise ConfigError("--tasks", "nothing", "names of tasks", "--tasks=copa,blimp")
  if not args.watch:
    results = _run(args.workdir, args.step, args.output, tasks, overrides, args.json)
    if args.against:
      others = _run(args.against, None, None, tasks, (), args.json)
      for ours, theirs in zip(results, others, strict=True):
        _show_comparison(ours["task"], compare_items(ours, theirs), args.json)
    return
  config, checkpoints = (
    load_run_config(args.workdir),
    RunFiles(args.workdir).checkpoints,
  )
  for step in watch_steps(
    lambda: list_steps(checkpoints), config.num_steps, _WATCH_SECONDS
  ):
    try:
      _run(args.workdir, step, args.output, tasks, overrides, args.json)
    except (DataError, MissingInputError, OSError) as error:
      if (checkpoints / str(step)).exists():
        raise
      print(f"step {step}: deleted before it was evaluated ({type(error).__name__})")


def _run(workdir, step, output, tasks, overrides, as_json: bool) -> list[dict]:
  """Evaluates one model; prints each result when it is there."""
  from flaxlm.evals.saved import evaluate_saved, weights_sha256
  from flaxlm.open_model import load_model
  from flaxlm.parallel.mesh import make_mesh, one_device

  writes = any(task.file.shape == "generate" for task in tasks)
  mesh = one_device() if writes else make_mesh()
  loaded = load_model(workdir, step, mesh, overrides)
  if loaded.tokenizer is None:
    raise ConfigError(
      "--workdir", f"{workdir}, without a tokenizer", "one: tasks are texts"
    )
  weights = weights_sha256(workdir, loaded.step)
  folder = pathlib.Path(output) if output else RunFiles(split_address(workdir)[0]).evals
  results = []
  for result in evaluate_saved(loaded, weights, tasks, folder):
    results.append(result)
    if as_json:
      print(json.dumps({k: v for k, v in result.items() if k != "items"}), flush=True)
    else:
      print(_describe_task(result), flush=True)
  return results


def _describe_task(result: dict) -> str:
  """Returns a line per metric: the model's, its error, and what chance reaches."""
  metrics, chance = result["metrics"], result["chance"]
  step = "" if result["step"] is None else f"step {result['step']}  "
  lines = [f"{step}{result['task']}  n {metrics['n']:,}  ({result['method']})"]
  for name, value in metrics.items():
    if name == "n" or name.endswith("_se"):
      continue
    error = f" ± {metrics[name + '_se']:.4f}" if name + "_se" in metrics else ""
    nulls = [f"{row} {m[name]:.4f}" for row, m in chance.items() if name in m]
    known = f"  (chance: {', '.join(nulls)})" if nulls else ""
    lines.append(f"  {name:16} {value:.4f}{error}{known}")
  for name, what in (
    ("merged_tokens", "joins inside a token"),
    ("cut_contexts", "contexts cut"),
  ):
    if result[name]:
      lines.append(f"  {result[name]:,} {what}")
  return "\n".join(lines)


def _show_comparison(task: str, found: dict, as_json: bool) -> None:
  """Prints the paired differences of two models on a task."""
  if as_json:
    print(json.dumps({"task": task, "differences": found}))
    return
  for name, values in found.items():
    numbers = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
    print(f"{task}  {name}  {numbers}")


def _describe_result(result: dict) -> str:
  """Returns two lines: the loss, and what to compare it with."""
  unit = "token" if "perplexity" in result else "label"
  line = f"step {result['step']}: loss {result['loss']:.4f} nats/{unit}, "
  if "perplexity" in result:
    line += f"perplexity {result['perplexity']:.2f}, "
  line += f"on {result['tokens']:,} {unit}s\n"
  if "bits_per_byte" in result:
    line += (
      f"bits per byte {result['bits_per_byte']:.4f} "
      f"(token frequencies alone: {result['unigram_bits_per_byte']:.4f})"
    )
  elif "unigram_loss" in result:
    line += f"token frequencies alone: {result['unigram_loss']:.4f} nats/token"
  else:
    known = ("step", "loss", "tokens", "perplexity")
    scores = {name: value for name, value in result.items() if name not in known}
    line += "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
  return line.rstrip()


if __name__ == "__main__":
  cli.run_command(main)
