"""Evaluate a trained model on the held-out split of a token store.

  python -m flaxlm.evaluate --workdir=runs/quickstart
  python -m flaxlm.evaluate --workdir=runs/quickstart --config.data.store=data/other

Prints the loss (nats per token), perplexity and bits per byte, beside those of a model
that knows only token frequencies. The same checkpoint and store always give the same
numbers.
"""

import json
import pathlib

from flaxlm import cli, machine
from flaxlm.runs.directory import load_run_config


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "evaluate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  args, overrides = cli.parse_arguments(parser, argv)
  config = load_run_config(args.workdir, overrides)
  # JAX is imported only now: --help and a wrong key have been answered.
  from flaxlm.runs.held_out import evaluate_run

  machine.keep_freed_memory()
  result = evaluate_run(config, pathlib.Path(args.workdir), args.step)
  if args.json:
    print(json.dumps(result))
    return
  print(_describe_result(result))


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
