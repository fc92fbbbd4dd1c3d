"""Training speed: flaxlm, the alternatives that users have, and the limit.

  python tests/benchmarks/train_speed.py --nanogpt=CLONE      # all sizes: 15 minutes
  python tests/benchmarks/train_speed.py --sizes char --turns 3 --json=speed.json

Each trainer is its own process (peers.py) that computes in its turn and otherwise
sleeps, so that all see the same machine and nothing compiles at the same time. The
order changes every turn; medians are shown. FLOPs per token = 6 * matrix weights + 12 *
layers * width * length: the full attention square, as published figures count it.
"""

import argparse
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import common
import peers

TORCH_PEERS = (
  "nanoGPT", "nanoGPT compiled", "transformers eager", "transformers sdpa",
)  # fmt: skip


def flops_per_token(size: str) -> int:
  at = peers.SIZES[size]
  matrices = 12 * at.layers * at.width**2 + at.vocabulary * at.width
  return 6 * matrices + 12 * at.layers * at.width * at.length


class Peer:
  """A process that runs the number of steps that a line on its stdin gives."""

  def __init__(self, name: str, size: str, path: str = ""):
    extra = peers.KEEP_MEMORY if "allocator" in name else {}
    self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 until `end`
    self.process = subprocess.Popen(
      [sys.executable, peers.__file__, name, size, f"--path={path}"],
      env=os.environ | extra, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=self.said, text=True,
    )  # fmt: skip
    self.name = name
    self.first_step = self.answer()
    self.per_step = self.steps(1)

  def answer(self) -> float:
    line = self.process.stdout.readline()
    if not line:
      code = self.process.wait()
      self.said.seek(0)
      raise RuntimeError(f"{self.name} ended with {code}\n{self.said.read()[-2000:]}")
    return float(line)

  def steps(self, number: int) -> float:
    self.process.stdin.write(f"{number}\n")
    self.process.stdin.flush()
    return self.answer()

  def memory(self) -> int:
    """Returns the peak bytes in use on a GPU."""
    self.process.stdin.write("memory\n")
    self.process.stdin.flush()
    return int(self.answer())

  def turn(self, seconds: float) -> float:
    """Computes for about `seconds`; returns steps per second."""
    number = max(round(seconds / self.per_step), 1)
    taken = self.steps(number)
    self.per_step = taken / number
    return 1 / self.per_step

  def end(self) -> None:
    self.process.stdin.close()
    self.process.wait()
    self.said.close()


class MaxText:
  """MaxText's own trainer, stopped between turns; each step is a line of its log.

  `python` is from an environment with MaxText, which needs another Python than flaxlm.
  Its GPT-3 block is the closest to GPT-2. All settings not named here are defaults.
  """

  name = "MaxText"

  def __init__(self, size: str, python: str):
    at = peers.SIZES[size]
    knobs = dict(
      run_name="speed", base_output_directory="runs/bench/maxtext", hardware="cpu",
      skip_jax_distributed_system="true",  # on CPUs it would look for a cluster
      dataset_type="synthetic", enable_checkpointing="false", steps=10**6,
      decoder_block="gpt3", base_num_decoder_layers=at.layers, base_emb_dim=at.width,
      base_num_query_heads=at.heads, base_num_kv_heads=at.heads,
      head_dim=at.width // at.heads, base_mlp_dim=4 * at.width,
      mlp_activations="['gelu']", vocab_size=at.vocabulary,
      trainable_position_size=at.length, logits_via_embedding="true", dtype="float32",
      attention="dot_product", per_device_batch_size=at.batch,
      max_target_length=at.length, enable_dropout="false",
    )  # fmt: skip
    start = time.perf_counter()
    self.process = subprocess.Popen(
      [python, "-m", "maxtext.trainers.pre_train.train"]
      + [f"{key}={value}" for key, value in knobs.items()],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    self.wait_for_step()
    self.first_step = time.perf_counter() - start
    self.process.send_signal(signal.SIGSTOP)

  def wait_for_step(self) -> None:
    for line in self.process.stdout:
      if "completed step:" in line:
        return
    raise RuntimeError(f"MaxText ended with code {self.process.wait()}")

  def turn(self, seconds: float) -> float:
    self.process.send_signal(signal.SIGCONT)
    for _ in range(3):  # steps already logged or running when it was stopped
      self.wait_for_step()
    start, number = time.perf_counter(), 0
    while number == 0 or time.perf_counter() - start < seconds:
      self.wait_for_step()
      number += 1
    rate = number / (time.perf_counter() - start)
    self.process.send_signal(signal.SIGSTOP)
    return rate

  def end(self) -> None:
    self.process.kill()
    self.process.wait()


def present(args) -> tuple[list[str], list[str]]:
  """Returns (names of programs that can run here, messages about the others)."""
  names, absent = ["flaxlm", "matmul jax"], []
  has_torch = importlib.util.find_spec("torch") is not None
  if has_torch:
    names.append("matmul torch")
  else:
    absent.append("PyTorch is not installed: its trainers were not run")
  if has_torch and args.nanogpt:
    names += [name for name in peers.PROGRAMS if name.startswith("nanoGPT")]
  elif has_torch:
    absent.append("nanoGPT was not run: give --nanogpt=CLONE (karpathy/nanoGPT)")
  if has_torch and importlib.util.find_spec("transformers"):
    names += [name for name in peers.PROGRAMS if name.startswith("transformers")]
  else:
    absent.append("transformers is not installed")
  if not args.maxtext:
    absent.append("MaxText was not run: give --maxtext=PYTHON, which has it installed")
  return [name for name in names if not args.only or name in args.only], absent


def measure(size: str, names: list[str], args) -> list[dict]:
  """Gives each program its turns; returns a row per trainer, fastest first."""
  running = [Peer(name, size, args.nanogpt) for name in names]
  if args.maxtext:
    running.append(MaxText(size, args.maxtext))
  rates = {peer.name: [] for peer in running}
  try:
    for i in range(args.turns + 1):
      order = running[i % len(running) :] + running[: i % len(running)]
      for peer in order[:: -1 if i % 2 else 1]:
        rate = peer.turn(args.seconds)
        if i:  # the first turn warms up
          rates[peer.name].append(rate)
  finally:
    for peer in running:
      peer.end()
  return table(size, rates, {peer.name: peer.first_step for peer in running})


def table(size: str, rates: dict, first_steps: dict) -> list[dict]:
  medians = {name: statistics.median(rate) for name, rate in rates.items()}
  gflops = 2 * peers.matrix_of(size) ** 3 / 1e9
  limit = max(medians[name] * gflops for name in medians if name.startswith("matmul"))
  rivals = [name for name in TORCH_PEERS if name in medians]
  best = max(rivals, key=medians.get, default=None)
  at = peers.SIZES[size]
  rows = []
  for name in sorted(medians, key=medians.get, reverse=True):
    if name.startswith("matmul"):
      continue
    tokens = medians[name] * at.length * at.batch
    share = tokens * flops_per_token(size) / 1e9 / limit
    pairs = zip(rates[name], rates[best], strict=True) if best else ()
    ratios = [mine / other for mine, other in pairs]
    rows.append({
      "size": size,
      "trainer": name,
      "tokens/s": tokens,
      "of best PyTorch": statistics.median(ratios) if ratios else None,
      "of matmul": share,
      "matmul GFLOP/s": limit,
      "first step s": first_steps[name],
    })  # fmt: skip
  return rows


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes = list(peers.SIZES)
  parser.add_argument("--sizes", nargs="*", default=sizes, choices=sizes)
  parser.add_argument("--turns", type=int, default=9)
  parser.add_argument("--seconds", type=float, default=2.0, help="per turn of a peer")
  parser.add_argument("--nanogpt", default="", help="a clone of nanoGPT")
  parser.add_argument("--maxtext", default="", help="a Python that has MaxText")
  parser.add_argument("--only", nargs="*", choices=list(peers.PROGRAMS))
  parser.add_argument("--quick", action="store_true", help="no PyTorch, small sizes")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  if args.quick:
    args.sizes, args.turns, args.seconds = ["char", "baby"], 3, 1.0
    args.only = args.only or ["flaxlm", "matmul jax"]
  names, absent = present(args)
  rows = []
  for size in args.sizes:
    rows += measure(size, names, args)
  common.report("training, tokens per second", rows, args.json, absent=absent)
  print("\n".join(absent))


if __name__ == "__main__":
  sys.exit(main())
