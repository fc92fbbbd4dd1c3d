"""Flags for quick compilation: tests spend more time compiling than computing."""

import os

# One LLVM module per program, and the emitters that compile a fusion in half the time.
# Only jaxlib knows these flags: libtpu aborts a process that has them in XLA_FLAGS.
EMITTERS = (
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# LLVM's optimisations take as long as most tests and speed up none of them.
UNOPTIMIZED = "--xla_backend_optimization_level=0"


def environment(devices: int = 1, **changes) -> dict[str, str]:
  """Returns environment variables with which a process compiles quickly on CPU."""
  count = f"--xla_force_host_platform_device_count={devices}"
  return os.environ | {"XLA_FLAGS": f"{UNOPTIMIZED} {EMITTERS} {count}"} | changes
