"""Import a model from Hugging Face's files, or export one to them.

  python -m flaxlm.convert import --from=downloads/SmolLM2-135M --workdir=runs/smollm2
  python -m flaxlm.convert export --workdir=runs/smollm2 --to=exports/smollm2

--from is a directory with config.json and weights, or a model's name on the hub, which
needs huggingface_hub and a network. The imported model is a run at step 0: other runs
can start from it (--config.init_from=runs/smollm2), and the other commands read it. An
exported model loads in `transformers` with from_pretrained.
"""

import pathlib
import re

from flaxlm import cli
from flaxlm.errors import ConfigError
from flaxlm.runs.directory import load_run_config


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "convert")
  parser.add_argument("direction", choices=("import", "export"))
  parser.add_argument("--workdir", required=True, help="the run's directory")
  parser.add_argument(
    "--from", dest="source", metavar="SOURCE",
    help="import: the directory or hub model to read",
  )  # fmt: skip
  parser.add_argument(
    "--skip", action="append", default=[], metavar="PATTERN",
    help="import: leave out tensors whose name matches; may be repeated",
  )  # fmt: skip
  parser.add_argument(
    "--architecture", default="", metavar="NAME",
    help="import: the model class of the weights, if config.json names another",
  )  # fmt: skip
  parser.add_argument(
    "--no_tokenizer", action="store_true", help="import: only the weights and config"
  )
  parser.add_argument("--to", help="export: a new or empty directory")
  parser.add_argument("--step", type=int, help="export: default: the newest checkpoint")
  parser.add_argument(
    "--dtype", default="float32",
    help="export: float32 (default), bfloat16 or float16",
  )  # fmt: skip
  parser.add_argument(
    "--family", default="",
    help="export: model_type in config.json; default: the first that fits",
  )  # fmt: skip
  args, overrides = cli.parse_arguments(parser, argv)
  workdir = pathlib.Path(args.workdir)
  if args.direction == "import":
    if not args.source:
      raise ConfigError("--from", "nothing", "a directory", "--from=models/a")
    for pattern in args.skip:
      try:
        re.compile(pattern)
      except re.error as error:
        needed = f"a regular expression ({error})"
        raise ConfigError("--skip", pattern, needed, r"--skip='^cls\.'") from None
    from flaxlm.interop.import_run import find_source, import_model

    source = find_source(args.source)
    import_model(
      source, workdir, tuple(args.skip), overrides, not args.no_tokenizer,
      args.architecture,
    )  # fmt: skip
  else:
    if not args.to:
      raise ConfigError("--to", "nothing", "a directory", "--to=models/a")
    from flaxlm.interop.export_run import export_model

    config = load_run_config(workdir, overrides)
    out = pathlib.Path(args.to)
    export_model(config, workdir, out, args.step, args.dtype, args.family)


if __name__ == "__main__":
  cli.run_command(main)
