"""Decoding speed against transformers' generate() on the same weights.

  pip install torch transformers                   # a CPU build of torch will do
  python tests/benchmarks/decoding.py
  python tests/benchmarks/decoding.py --sizes gpt2_124m --batch 1 --json=decoding.json

Random weights go from transformers through flaxlm.interop. Prompts have 32 tokens, and
128 are generated, greedily, in float32. All take turns, so that they see the same
machine; medians are shown. The peers are what users of transformers choose from: eager,
sdpa (the default), and sdpa with a compiled static cache. Each token reads every weight
once, for all rows of a batch. So the share of the limit is bytes per second over the
rate at which this machine reads memory; it can pass 100% if weights fit in the cache.

All must write the same tokens. Where float32 rounding decides between two tokens, the
texts differ from there on; the number of equal tokens before that is shown.
"""

import argparse
import concurrent.futures
import os
import statistics
import tempfile
import time

import common  # makes this clone importable

from flaxlm import machine

machine.keep_freed_memory()  # before anything large is allocated

import jax
import numpy as np

from flaxlm.inference.decoding import for_decoding, generate
from flaxlm.inference.sampling import Sampling
from flaxlm.interop.huggingface import make_model, read_model

PROMPT, NEW = 32, 128
# name: (transformers' config class, its arguments)
SIZES = {
  "gpt2_124m": ("GPT2Config", {}),
  "llama_6x384": (
    "LlamaConfig",
    dict(
      vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
      num_key_value_heads=6, intermediate_size=1024, max_position_embeddings=512,
      tie_word_embeddings=True,
    ),
  ),
  "smollm2_135m": (
    "LlamaConfig",
    dict(
      vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
      num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=2048,
      tie_word_embeddings=True, rope_theta=100_000.0,
    ),
  ),
}  # fmt: skip
PEERS = ("eager", "sdpa", "compiled")


def read_rate(megabytes: int = 256) -> float:
  """Returns the GB/s that all cores together read, with a dot product on each."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  parts = [np.ones(megabytes << 18, np.float32) for _ in range(cores)]
  with concurrent.futures.ThreadPoolExecutor(cores) as pool:

    def read():
      start = time.perf_counter()
      list(pool.map(lambda x: np.dot(x, x), parts))
      return cores * megabytes / 953.67 / (time.perf_counter() - start)

    return max(read() for _ in range(7))


def make_peer(name: str):
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  kind, arguments = SIZES[name]
  torch.manual_seed(0)
  no_end = {"bos_token_id": None, "eos_token_id": None}
  config = getattr(transformers, kind)(**arguments, **no_end)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  return model.eval()


def peer_writer(model, how: str):
  """Returns prompts -> new tokens, by generate() as its documentation shows it."""
  import torch

  options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
  if how == "compiled":
    options |= {"cache_implementation": "static"}
    run = torch.compile(model.forward)

  def write(prompts):
    model.set_attn_implementation("eager" if how == "eager" else "sdpa")
    tokens = torch.tensor(prompts)
    plain = model.forward
    if how == "compiled":
      model.forward = run
    try:
      with torch.inference_mode():
        out = model.generate(
          tokens, attention_mask=torch.ones_like(tokens),
          max_new_tokens=NEW, min_new_tokens=NEW, **options,
        )  # fmt: skip
    finally:
      model.forward = plain
    return out[:, PROMPT:].numpy()

  return write


def our_writer(directory):
  imported = read_model(directory)
  model = for_decoding(make_model(imported.fields, imported.leaves))
  allowed = np.ones(model.config.vocab_size, bool)
  greedy = Sampling(temperature=0)

  def write(prompts):
    return np.concatenate(list(generate(model, prompts, NEW, greedy, allowed)), axis=1)

  return write, bytes_per_token(model)


def bytes_per_token(model) -> int:
  """Returns bytes of float32 weights, without tables where a token reads one row."""
  total = sum(x.size for x in jax.tree.leaves(model))
  if model.positions is not None:
    total -= model.positions[...].size
  if model.unembed is not None:
    total -= model.embed[...].size
  return 4 * total


def equal_tokens(ours, theirs) -> float:
  """Returns the mean number of tokens before two texts differ."""
  differ = ours != theirs
  return float(np.where(differ.any(1), differ.argmax(1), ours.shape[1]).mean())


def measure(name: str, batches: list[int], peers: list[str], turns: int) -> list[dict]:
  peer = make_peer(name)
  with tempfile.TemporaryDirectory() as directory:
    peer.save_pretrained(directory)
    ours, weight_bytes = our_writer(directory)
  writers = {"flaxlm": ours} | {how: peer_writer(peer, how) for how in peers}
  rows = []
  for batch in batches:
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, peer.config.vocab_size, (batch, PROMPT)).tolist()
    seconds, first, texts = {}, {}, {}
    for how, write in writers.items():
      start = time.perf_counter()
      try:
        texts[how] = write(prompts)
      except Exception as error:  # what a peer cannot run is reported, not fatal
        if how == "flaxlm":
          raise
        print(f"{name}, {how}: {type(error).__name__} {str(error)[:200]}")
        continue
      first[how], seconds[how] = time.perf_counter() - start, []
    rates = []
    for _ in range(turns):
      rates.append(read_rate())
      for how in seconds:
        start = time.perf_counter()
        writers[how](prompts)
        seconds[how].append(time.perf_counter() - start)
    medians = {how: statistics.median(taken) for how, taken in seconds.items()}
    for how, taken in medians.items():
      rows.append({
        "size": name, "batch": batch, "who": how,
        "tokens/s": batch * NEW / taken,
        "flaxlm is faster by": taken / medians["flaxlm"],
        "of read rate": weight_bytes * NEW / taken / 1e9 / statistics.median(rates),
        "read GB/s": statistics.median(rates),
        "first call s": first[how],
        "equal tokens": equal_tokens(texts["flaxlm"], texts[how]),
      })  # fmt: skip
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
  parser.add_argument("--batch", nargs="*", type=int, default=[1, 16])
  parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  rows = []
  for name in args.sizes:
    rows += measure(name, args.batch, args.peers, args.turns)
  common.report(f"decoding: {PROMPT} tokens in, {NEW} out", rows, args.json)


if __name__ == "__main__":
  main()
