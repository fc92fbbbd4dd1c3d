"""A step reuses what the last one freed: the kernel need not zero new pages."""

import subprocess
import sys

import pytest

# Arrays above glibc's largest threshold (32 MiB), which it would map again each time.
SCRIPT = """
import resource, statistics, sys
from flaxlm import machine
if sys.argv[1] == "keep":
  assert machine.keep_freed_memory() == "allocator: glibc keeps freed memory"
import jax, jax.numpy as jnp
weight = jnp.ones((100, 100))
add = lambda x: x + jnp.sin(jnp.roll(jnp.cos(x), 1) @ weight)
step = jax.jit(add, donate_argnums=0)
x = jnp.ones((100_000, 100))
faults = [0]
for _ in range(15):
  x = step(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(after - before for before, after in zip(faults, faults[1:])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what is asked")
def test_steps_touch_no_new_pages():
  def faults(how):
    command = [sys.executable, "-c", SCRIPT, how]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)

  assert faults("keep") < 0.05 * faults("leave")
