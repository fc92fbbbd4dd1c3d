"""Prepare the token store of a config: train its tokenizer, tokenise its sources.

  python -m flaxlm.prepare --config=configs/quickstart.py
  python -m flaxlm.prepare --config=configs/base.py --config.data.store=data/mine \\
    --config.data.sources.main.kind=text \\
    --config.data.sources.main.path='texts/**/*.txt'

The same command continues after a kill. If the store is complete, it only says so.
"""

import sys
import time

from flaxlm import cli
from flaxlm.config.load import load_config


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "prepare")
  cli.add_config(parser, "a config file", required=True)
  args, overrides = cli.parse_arguments(parser, argv)
  settings = load_config(args.config, overrides, args.allow)

  from flaxlm.data.store import build  # after --help has been answered

  start = time.perf_counter()
  report = build.build_store(settings.data, settings.tokenizer, _log)
  print(store_summary(report, time.perf_counter() - start))


def _log(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def store_summary(report, seconds: float) -> str:
  """Returns the table of sources and the lines under it."""
  from flaxlm.data.store.manifest import IN_BOTH_SPLITS

  store, tokenizer = report.store, report.tokenizer
  row = "{:<18}{:>12}{:>10}{:>16}{:>14}".format
  lines = [row("source", "documents", "MB", "tokens", "bytes/token")]
  for name, entry in store.manifest["sources"].items():
    for split in ("train", "validation"):
      part = entry[split]
      ratio = part["bytes"] / part["tokens"] if part["tokens"] else 0
      lines.append(row(f"{name} {split}", f"{part['documents']:,}",
                       f"{part['bytes'] / 1e6:.2f}", f"{part['tokens']:,}",
                       f"{ratio:.2f}"))  # fmt: skip
    problems = dict(entry["problems"])
    if overlap := problems.pop(IN_BOTH_SPLITS, 0):
      of = entry["validation"]["documents"]
      lines.append(
        f"  warning: {overlap:,} of {of:,} validation documents are training "
        "documents too"
      )
    lines += [f"  {count:,} x {what}" for what, count in problems.items()]
  loss = tokenizer.loss or "unknown characters"
  lines.append(f"tokenizer: {tokenizer.vocab_size:,} pieces, {tokenizer.sha256[:12]}")
  if report.checked and report.changed:
    lines.append(
      f"warning: not lossless, {report.changed} of {report.checked} texts come back "
      f"changed ({loss})"
    )
  elif report.checked:
    lines.append(f"lossless: {report.checked} texts round-trip")
  speed = f", tokenised at {report.rate:.1f} MB/s" if report.rate else ""
  lines.append(f"store: {store.path} ({seconds:.1f} s{speed})")
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run_command(main)
