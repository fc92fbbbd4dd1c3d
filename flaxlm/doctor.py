"""Show what this machine has, and which attention kernels are right and fast on it.

  python -m flaxlm.doctor

Prints versions, devices and memory. Compares every attention backend that can run here
with the definition for every mask, changes tokens that must not be seen, and measures
the speed. The results are kept for this user and kind of device, and `attention=auto`
follows them. Takes less than a minute. Exit codes: 0 all that run conform, 1 one does
not.
"""

import json
import os
import platform
import sys

from flaxlm import cli, files, machine


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "doctor")
  parser.epilog = None  # no config is read
  parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
  args = parser.parse_args(argv)
  if args.json:
    files.check_output(args.json, f"--json={args.json}")
  found = {"machine": _describe_machine()}
  for name, value in found["machine"].items():
    print(f"{name:12}  {value}", flush=True)
  found["attention"] = _check_attention()
  if args.json:
    text = json.dumps(found, indent=1) + "\n"
    files.write_output(args.json, text, f"--json={args.json}")
  if not all(row["conforms"] for row in found["attention"].values() if row["checked"]):
    sys.exit(1)


def _describe_machine() -> dict[str, str]:
  """Returns versions, devices and memory, in words."""
  import jax
  import jaxlib

  from flaxlm.machine import host_memory

  devices, gib = jax.devices(), 2**30
  statistics = devices[0].memory_stats() or {}
  memory = f"{host_memory() / gib:.1f} GiB on the host"
  if "bytes_limit" in statistics:
    memory = f"{statistics['bytes_limit'] / gib:.1f} GiB per device, {memory}"
  return {
    "python": f"{platform.python_version()}, {platform.platform()}",
    "jax": f"{jax.__version__}, jaxlib {jaxlib.__version__}",
    "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    "memory": memory,
    "cores": f"{os.cpu_count()}",
    "allocator": machine.keep_freed_memory().removeprefix("allocator: "),
    "programs": f"kept in {jax.config.jax_compilation_cache_dir or 'no directory'}",
  }


def _check_attention() -> dict[str, dict]:
  """Checks and times each backend; prints one line for each, and what failed."""
  import jax

  from flaxlm.kernels.attention import choice, conformance

  device, measured = jax.devices()[0], {}
  print(
    f"\n{'attention':10} {'masks':>9}  largest error / tolerance; TFLOP/s "
    "forward + backward (causal FLOPs) by tokens per row"
  )
  for backend in choice.KERNELS:
    row = measured[backend] = conformance.examine(backend, device.platform)
    if not row["checked"]:
      print(f"{backend:10} {'-':>9}  cannot run: it needs {row['needs']}", flush=True)
      continue
    speed = "  ".join(f"{L}: {x:.3g}" for L, x in row["tflops"].items())
    score = f"{row['checked'] - len(row['failed'])}/{row['checked']}"
    print(f"{backend:10} {score:>9}  {row['error']:.0%}  {speed}", flush=True)
    print("".join(f"  FAILED {text}\n" for text in row["failed"]), end="")
  right = {name: row for name, row in measured.items() if row["checked"]}
  path = choice.save_measured(device.device_kind, jax.__version__, right)
  print(f"\nattention=auto on {device.device_kind} follows {path}")
  return measured


if __name__ == "__main__":
  cli.run_command(main)
