"""Data: speed of tokenising, against the sentencepiece library, and of the loader.

  python tests/benchmarks/data_speed.py [--text=corpus.txt] [--json=data.json]

The peer is the library's own batch call on the same documents with the same model, in
turns, first on one thread and then on all cores. `prepare` is all of flaxlm.prepare:
reading files, splitting, tokenising, checking that texts round-trip, and writing a
store. Without --text, documents are the sources of the Python standard library. The
loader makes the quickstart's batches from that store, on one core, without a model.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import common  # makes this clone importable
import sentencepiece

from flaxlm.config import base
from flaxlm.data.batches.packed import Batches
from flaxlm.data.batches.read_ahead import read_ahead
from flaxlm.data.store import build
from flaxlm.data.store.shards import Store
from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
MOST = 8 << 20  # characters per turn


def read_documents(path: str | None) -> list[str]:
  if path:
    return pathlib.Path(path).read_text("utf-8").split("\n\n")
  files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
  return [file.read_text("utf-8", "replace") for file in files]


def tokenising(documents: list[str], kind: str, turns: int) -> list[dict]:
  """Measures MB/s of encode_batch and of the library, on one thread and on all."""
  lines = sample_lines(documents, 1 << 20)
  model = train_tokenizer(lines, kind, 8192)
  ours = Tokenizer(model)
  theirs = sentencepiece.SentencePieceProcessor()
  theirs.LoadFromSerializedProto(model)
  megabytes = sum(len(text.encode()) for text in documents) / 1e6
  rows = []
  for threads in sorted({1, CORES}):
    calls = {
      "sentencepiece": lambda n=threads: theirs.encode(documents, num_threads=n),
      "flaxlm": lambda n=threads: ours.encode_batch(documents, n),
    }
    seconds = {who: [] for who in calls}
    for _ in range(turns):
      for who, call in calls.items():
        start = time.perf_counter()
        call()
        seconds[who].append(time.perf_counter() - start)
    rates = {who: megabytes / statistics.median(s) for who, s in seconds.items()}
    row = {"tokenizer": kind, "threads": threads}
    row |= {f"{who} MB/s": rate for who, rate in rates.items()}
    rows.append(row | {"ratio": rates["flaxlm"] / rates["sentencepiece"]})
  return rows


def prepare(documents: list[str], folder: pathlib.Path) -> build.Report:
  """Makes a store of these documents, as flaxlm.prepare does."""
  (folder / "texts").mkdir()
  for number, text in enumerate(documents):
    (folder / "texts" / f"{number:06}.txt").write_text(text, "utf-8")
  config = base.get_config()
  config.data.store = str(folder / "store")
  config.tokenizer.vocab_size = 8192
  source = config.data.sources.main
  source.kind, source.path = "text", f"{folder}/texts/*.txt"
  return build.build_store(config.data, config.tokenizer, lambda line: None)


def loader_tokens_per_second(store: Store, loader: str) -> float:
  """Times one thread that makes the quickstart's batches, without a model."""
  seq_len, batch_size = 128, 16
  streams = {name: store.stream(name, "train") for name in store.manifest["sources"]}
  batches = Batches(
    streams, [1.0] * len(streams), seq_len, batch_size, 0, store.vocab_size,
    store.pad_id,
  )  # fmt: skip
  num_batches = 2000
  for i, _ in enumerate(read_ahead(batches, range(20 + num_batches), loader, 1, 4)):
    if i == 19:  # warm
      start = time.perf_counter()
  return num_batches * seq_len * batch_size / (time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--text", help="a UTF-8 file; empty lines split documents")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  documents, size = [], 0
  for text in read_documents(args.text):
    documents.append(text)
    size += len(text)
    if size > MOST:
      break
  rows = [
    row
    for kind in ("bpe", "unigram")
    for row in tokenising(documents, kind, args.turns)
  ]
  with tempfile.TemporaryDirectory() as folder:
    report = prepare(documents, pathlib.Path(folder))
    others = [{"of": f"prepare, {CORES} cores", "MB/s": report.rate}]
    if hasattr(os, "sched_setaffinity"):
      cores = os.sched_getaffinity(0)
      os.sched_setaffinity(0, {min(cores)})
    others += [
      {"of": f"loader {loader}, one core",
       "tokens/s": loader_tokens_per_second(report.store, loader)}
      for loader in ("tfdata", "numpy")
    ]  # fmt: skip
    if hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(0, cores)
  text = f"{len(documents):,} documents, {size / 1e6:.1f} M characters"
  common.report(f"data: {text}", rows, args.json, others=others)
  print()
  common.print_table(others)


if __name__ == "__main__":
  main()
