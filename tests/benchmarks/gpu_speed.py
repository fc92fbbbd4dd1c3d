"""Training speed on one GPU: flaxlm, compiled PyTorch trainers and the chip's limit.

  python tests/benchmarks/gpu_speed.py --nanogpt=CLONE [--sizes gpt2_124m_1k llama_1b]
  python tests/benchmarks/gpu_speed.py --quick          # tiny sizes, on a CPU as well

Each trainer is its own process (peers.py). They run one after the other, because their
weights do not fit together; medians of turns are shown. All have float32 weights and
bfloat16 products. MFU counts 6 FLOPs per matrix weight and token plus the visible half
of attention (flaxlm/models/cost.py), relative to the data sheet's dense bfloat16 rate;
"of matmul" is relative to a product of two 8192 x 8192 matrices in this run. `python -m
flaxlm.doctor` runs first, because `attention=auto` uses what it finds.
"""

import argparse
import statistics
import subprocess
import sys

import common
import peers
import train_speed

from flaxlm.models.cost import flops_per_token


def names_here(size: str, args) -> list[str]:
  names = [name for name in args.only or peers.GPU_PROGRAMS if "matmul" not in name]
  without = ()
  if not args.nanogpt or peers.ALL_SIZES[size].kv_heads:
    without += ("nanoGPT",)
  if not common.version("torch"):
    without += ("nanoGPT", "transformers")
  return [name for name in names if not name.startswith(without)]


def rates(name: str, size: str, args) -> tuple[list[float], int, float]:
  """Returns (steps per second in each turn, peak bytes, seconds to the first step)."""
  peer = train_speed.Peer(name, size, args.nanogpt)
  try:
    peer.turn(args.seconds)  # warms up
    found = [peer.turn(args.seconds) for _ in range(args.turns)]
    return found, peer.memory(), peer.first_step
  finally:
    peer.end()


def limit(args) -> float:
  """Returns the FLOP/s of a product of large matrices in the faster library."""
  names = ["matmul jax"] + ["matmul torch"] * bool(common.version("torch"))
  found = [statistics.median(rates(name, args.sizes[0], args)[0]) for name in names]
  return max(found) * 2 * peers.matrix_of(args.sizes[0]) ** 3


def measure(size: str, args, most: float, peak: float | None) -> list[dict]:
  at, rows = peers.ALL_SIZES[size], []
  per_token = flops_per_token(peers.config_of(size).model, at.length)
  for name in names_here(size, args):
    row = {"size": size, "trainer": name}
    rows.append(row)
    try:
      found, memory, first_step = rates(name, size, args)
    except RuntimeError as error:
      row["failed"] = reason(str(error))
      print(f"{size}: {error}", file=sys.stderr)
      continue
    tokens = statistics.median(found) * at.length * at.batch
    row |= {
      "tokens/s": tokens, "of best PyTorch": None,
      "MFU": tokens * per_token / peak if peak else None,
      "of matmul": tokens * per_token / most, "GiB": memory / 2**30 or None,
      "first step s": first_step,
    }  # fmt: skip
  rivals = [row["tokens/s"] for row in rows if "tokens/s" in row and is_rival(row)]
  for row in rows:
    if rivals and "tokens/s" in row:
      row["of best PyTorch"] = row["tokens/s"] / max(rivals)
  return sorted(rows, key=lambda row: -row.get("tokens/s", 0))


def is_rival(row: dict) -> bool:
  return not row["trainer"].startswith("flaxlm")


def reason(said: str) -> str:
  """Returns "out of memory", or the last line that the trainer printed."""
  text = said.lower()
  if "out of memory" in text or "resource_exhausted" in text:
    return "out of memory"
  return said.strip().splitlines()[-1][-60:]


def chip() -> tuple[str, float | None]:
  """Returns the GPU's name and bfloat16 FLOP/s, without allocating its memory."""
  from flaxlm.parallel.hardware import CHIPS, DEVICE_KINDS, OTHER_PEAKS

  command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  try:
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return "", None
  name = said.splitlines()[0].strip()
  row = CHIPS.get(DEVICE_KINDS.get(name, ""))
  return name, row.bf16_flops if row else OTHER_PEAKS.get(name)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes = list(peers.GPU_SIZES)
  parser.add_argument("--sizes", nargs="*", default=sizes, choices=sizes)
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=5.0, help="per turn of a peer")
  parser.add_argument("--nanogpt", default="", help="a clone of nanoGPT")
  parser.add_argument("--only", nargs="*", choices=list(peers.GPU_PROGRAMS))
  parser.add_argument("--quick", action="store_true", help="no PyTorch, tiny sizes")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  name, peak = chip()
  if args.quick:
    args.sizes, args.turns, args.seconds = list(peers.TINY_SIZES), 1, 0.2
    args.only = args.only or ["flaxlm", "flaxlm fp8"]
  elif not name:
    sys.exit("gpu_speed.py: nvidia-smi finds no GPU; --quick runs on a CPU")
  else:
    subprocess.run([sys.executable, "-m", "flaxlm.doctor"], check=False)
  most = limit(args)
  rows = [row for size in args.sizes for row in measure(size, args, most, peak)]
  title = f"training on {name or 'a CPU'}: {most / 1e12:.3g} TFLOP/s in a product"
  common.report(title, rows, args.json, device=name, peak=peak, product=most)


if __name__ == "__main__":
  sys.exit(main())
