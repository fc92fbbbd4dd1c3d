"""Import a model from Hugging Face's files, or export one to them.

  python -m flaxlm.convert import --from=downloads/SmolLM2-135M --workdir=runs/smollm2
  python -m flaxlm.convert export --workdir=runs/smollm2 --to=exports/smollm2

--from is a directory with config.json and weights, or the name of a model on the hub,
where huggingface_hub is installed and there is a network. What is imported is a run at
step 0: other runs start from it (--config.init_from=runs/smollm2), and other commands
read it. What is exported is loaded by `transformers` with from_pretrained.
"""

import pathlib

from flaxlm import cli
from flaxlm.errors import ConfigError
from flaxlm.interop.export_run import export_model
from flaxlm.interop.import_run import find_source, import_model
from flaxlm.runs.directory import load_run_config


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "convert")
  parser.add_argument("direction", choices=("import", "export"))
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--from", dest="source", help="import: what to read")
  parser.add_argument(
    "--skip", action="append", default=[], metavar="PATTERN",
    help="import: leave out tensors whose name matches; repeatable",
  )  # fmt: skip
  parser.add_argument(
    "--no_tokenizer", action="store_true", help="import: weights and config alone"
  )
  parser.add_argument("--to", help="export: a new or empty directory")
  parser.add_argument("--step", type=int, help="export: default: the newest checkpoint")
  parser.add_argument("--dtype", default="float32", help="or bfloat16, float16")
  parser.add_argument("--family", default="", help="export: default: one that fits")
  args, overrides = cli.parse_arguments(parser, argv)
  workdir = pathlib.Path(args.workdir)
  needed = args.source if args.direction == "import" else args.to
  if not needed:
    name = "--from" if args.direction == "import" else "--to"
    raise ConfigError(name, "nothing", "a directory", f"{name}=models/a")
  if args.direction == "import":
    source = find_source(args.source)
    import_model(source, workdir, tuple(args.skip), overrides, not args.no_tokenizer)
  else:
    config = load_run_config(workdir, overrides)
    export_model(config, workdir, pathlib.Path(args.to), args)


if __name__ == "__main__":
  cli.run_command(main)
