"""What devices or processes should hold alike is compared, and the odd one is named."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxlm.parallel import replicas
from flaxlm.parallel.mesh import make_mesh
from flaxlm.parallel.processes import PeerError
from flaxlm.parallel.replicas import Replicas, find_difference


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(data=4, fsdp=2, tensor=1)


def place(mesh, spec, changed=None, dtype=np.float32):
  """Returns an array 4 x 6; device number `changed` holds one other bit."""
  whole = np.arange(24).reshape(4, 6).astype(dtype)
  sharding = NamedSharding(mesh, spec)
  parts = []
  for device, index in sharding.addressable_devices_indices_map(whole.shape).items():
    part = whole[index].copy()
    if device.id == changed:
      part.view(np.uint8).reshape(-1)[5] ^= 1
    parts.append(jax.device_put(part, device))
  return jax.make_array_from_single_device_arrays(whole.shape, sharding, parts)


def compare(mesh, **trees):
  checker = Replicas(0, mesh)
  checker.every = 2  # on simulated devices it is off
  for step in (1, 2, 3):
    checker.after(step, trees)
  return checker


def test_it_is_off_where_devices_are_simulated_and_where_there_is_one(mesh, one_device):
  assert Replicas(5, mesh).every == 0 == Replicas(5, one_device).every


@pytest.mark.faults
@pytest.mark.parametrize(
  ("spec", "dtype"),
  [(P(), np.float32), (P("fsdp"), jnp.bfloat16), (P(None, "fsdp"), np.int32)],
)
def test_one_bit_on_one_device_is_found(mesh, spec, dtype):
  compare(mesh, weights=[place(mesh, spec, dtype=dtype), place(mesh, P())])
  with pytest.raises(PeerError) as caught:
    compare(mesh, batch=place(mesh, P()), weights=[place(mesh, spec, 5, dtype)])
  message = str(caught.value)
  assert message.startswith("after step 2, weights") and "cpu:5" in message
  assert len(message.splitlines()) <= 5 and caught.value.exit_code == 75


def test_parts_that_no_other_device_holds_are_not_compared(mesh):
  compare(mesh, weights=place(mesh, P("data", "fsdp"), 5))


def test_the_odd_process_is_named():
  def process(host, **facts):
    return {"host": host, "facts": facts}

  same = process("a", step=4, weights=7)
  assert find_difference({0: same, 1: same, 2: process("c", step=4, other=9)}) == ""
  odd = process("b", step=4, weights=8)
  assert find_difference({0: same, 1: odd, 2: same}) == "weights of process 1 (on b)"
  assert find_difference({0: odd, 1: same, 2: same}) == "weights of process 0 (on b)"
  assert find_difference({0: same, 1: odd}) == "weights of processes 0 and 1 (on a, b)"
  behind = process("b", step=3, weights=7)
  assert find_difference({0: same, 1: behind, 2: same}) == "step of process 1 (on b)"


class Store:
  """JAX's key-value store, for several processes that take turns in this one."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value):
    self.values[key] = value

  def key_value_delete(self, key):
    del self.values[key]

  def key_value_dir_get(self, prefix):
    return [(key, x) for key, x in self.values.items() if key.startswith(prefix)]


@pytest.mark.faults
def test_processes_compare_without_waiting(mesh, monkeypatch):
  store = Store()
  jobs = [
    types.SimpleNamespace(client=store, process_id=i, num_processes=3) for i in range(3)
  ]
  turn = [jobs[0]]
  monkeypatch.setattr(replicas, "current_job", lambda: turn[0])
  monkeypatch.setattr(replicas, "_in_a_job", lambda: True)
  checkers = [Replicas(2, mesh) for _ in jobs]
  good, bad = place(mesh, P()), place(mesh, P()) + jnp.float32(1)
  raised = {}
  for step in range(1, 12):
    for i, checker in enumerate(checkers):
      turn[0] = jobs[i]
      try:
        checker.after(step, {"weights": bad if i == 1 and step >= 8 else good})
      except PeerError as error:
        raised.setdefault(i, (step, str(error)))
    if len(raised) == 3:
      break
  assert step <= 10 and raised.keys() == {0, 1, 2}
  for _, message in raised.values():
    assert "after step 8, weights of process 1 (on" in message
    assert "equal after step 6" in message
  assert len(store.values) <= 6  # old sums are removed
