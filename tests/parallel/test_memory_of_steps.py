"""What a step frees is what the next one takes: the kernel zeroes no page for it."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from flaxlm.parallel import hosts
if sys.argv[1] == "keep":
  assert hosts.keep_freed_memory() == "allocator: glibc keeps freed memory"
import jax, jax.numpy as jnp
step = jax.jit(lambda x: x + jnp.sin(jnp.roll(jnp.cos(x), 1) @ x), donate_argnums=0)
x = jnp.ones((2000, 2000))
for i in range(8):
  x = step(x)
  if i == 3:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
jax.block_until_ready(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what is asked")
def test_steps_touch_no_new_pages():
  def faults(how):
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)

  assert faults("keep") < 0.05 * faults("leave")
