"""Compiling quickly: tests compile for longer than they compute."""

import os

# One LLVM module per program, and the emitters that compile a fusion in half the time.
# They are jaxlib's own: libtpu ends a process in whose XLA_FLAGS it finds them.
EMITTERS = (
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# LLVM's optimisations take as long as most tests and speed up none of them.
UNOPTIMIZED = "--xla_backend_optimization_level=0"


def environment(devices: int = 1, **changes) -> dict[str, str]:
  """The variables of a started process that compiles quickly for CPU devices."""
  count = f"--xla_force_host_platform_device_count={devices}"
  return os.environ | {"XLA_FLAGS": f"{UNOPTIMIZED} {EMITTERS} {count}"} | changes
