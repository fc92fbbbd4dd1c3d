"""Write text with a trained model.

  python -m flaxlm.generate --workdir=runs/quickstart --prompt="def main("

One prompt is streamed as it is written; several --prompt or --num_samples are computed
together. Without --prompt the model begins a document of its own.
"""

from flaxlm import cli, machine
from flaxlm.errors import ConfigError
from flaxlm.inference.text import write_text
from flaxlm.runs.directory import load_run_config


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "generate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--prompt", action="append", help="text to continue; repeatable")
  parser.add_argument("--num_samples", type=int, default=1, help="texts a prompt")
  parser.add_argument("--max_tokens", type=int, default=200, help="new tokens a text")
  parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
  parser.add_argument("--top_k", type=int, default=0, help="0 is all tokens")
  parser.add_argument("--top_p", type=float, default=0.95, help="1 is all tokens")
  parser.add_argument("--seed", type=int, default=0)
  args, overrides = cli.parse_arguments(parser, argv)
  for name in ("num_samples", "max_tokens"):
    if getattr(args, name) < 1:
      raise ConfigError(f"--{name}", getattr(args, name), "a whole number from 1 up")
  config = load_run_config(args.workdir, overrides)

  machine.keep_freed_memory()
  write_text(config, args)


if __name__ == "__main__":
  cli.run_command(main)
