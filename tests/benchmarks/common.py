"""What all benchmarks share: facts about the machine, the table and the JSON."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # configs/ is not part of the installed package
PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "numpy", "sentencepiece", "torch", "transformers",
)  # fmt: skip


def about() -> dict:
  """Returns hardware, versions and commit."""
  return {
    "cpu": cpu_name(),
    "cores": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count(),
    "memory_gib": round(
      os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
    ),
    "load": os.getloadavg()[0],  # includes other processes; near 0 on a quiet machine
    "system": platform.platform(),
    "python": platform.python_version(),
    "versions": {name: version(name) for name in PACKAGES if version(name)},
    "commit": git("rev-parse", "--short", "HEAD") + "+" * bool(git("diff", "HEAD")),
  }


def cpu_name() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [
    line.split(":")[1].strip() for line in lines if line.startswith("model name")
  ]
  wide = any("avx512f" in line for line in lines)
  return (names or [platform.processor()])[0] + " AVX-512" * wide


def version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def git(*arguments: str) -> str:
  """Returns the output of git, or "" outside a clone."""
  done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
  return done.stdout.strip()


def report(title: str, rows: list[dict], json_file: str | None, **more) -> None:
  """Prints `rows` as a table; writes them and `about()` to `json_file`, if given."""
  record = {"benchmark": title, "about": about(), "rows": rows} | more
  if json_file:
    pathlib.Path(json_file).write_text(json.dumps(record, indent=2) + "\n")
  at = record["about"]
  versions = " ".join(f"{name} {number}" for name, number in at["versions"].items())
  print(f"\n{title}")
  print(
    f"{at['cpu']}, {at['cores']} cores, load {at['load']:.1f}; commit {at['commit']}"
  )
  print(versions)
  print_table(rows)


def print_table(rows: list[dict]) -> None:
  if not rows:
    return
  names = list(dict.fromkeys(name for row in rows for name in row))
  texts = [names] + [[show(row.get(name)) for name in names] for row in rows]
  widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
  for text in texts:
    first, *others = (
      f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
      for i, (cell, w) in enumerate(zip(text, widths, strict=True))
    )
    print("  ".join([first, *others]), flush=True)


def show(value) -> str:
  """Formats to three significant digits; "-" stands for a missing value."""
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
  return str(value)
