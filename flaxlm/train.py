"""Train a model from a prepared token store.

  python -m flaxlm.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m flaxlm.train --config=configs/gpt3_175b.py --describe

The same command continues a run that was stopped or killed; without --config it uses
the config stored in the run. Exit codes: 0 done, 2 config, 65 data, 66 missing input,
73 the directory cannot be used, 74 storage, 75 stopped and saved (run it again), 85
hang, 86 numerics. The loop is in flaxlm/runs/loop.py.
"""

import pathlib

from flaxlm import cli
from flaxlm.config.load import load_config
from flaxlm.errors import ConfigError
from flaxlm.runs.directory import load_run_config
from flaxlm.training.guards import StopSignal


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "train")
  cli.add_config(parser, "a config file; default: the one stored in --workdir")
  parser.add_argument("--workdir", help="directory of the run")
  parser.add_argument(
    "--describe", action="store_true", help="print the table of weights and stop"
  )
  args, overrides = cli.parse_arguments(parser, argv)
  if not args.workdir and not (args.describe and args.config):
    needed = "a new directory or one of a run (--describe needs only --config)"
    raise ConfigError("--workdir", "nothing", needed, "runs/a")
  if args.config:
    config = load_config(args.config, overrides, args.allow)
  else:
    config = load_run_config(args.workdir, overrides)
  if args.describe:
    from flaxlm.runs.describe import weight_table

    print(weight_table(config))
    return
  with StopSignal() as stop:  # from here on a signal is never lost
    # JAX takes seconds to import.
    from flaxlm.evals.in_loop import open_tasks
    from flaxlm.planning.calibrate import expected_seconds
    from flaxlm.runs.loop import train

    train(config, pathlib.Path(args.workdir), stop, expected_seconds, open_tasks)


if __name__ == "__main__":
  cli.run_command(main)
