"""Messages against calculations by hand: which link, how many bytes, how long."""

import pytest

from configs import gpt2_124m, olmoe_1b_7b
from flaxlm.parallel import AXES
from flaxlm.parallel.hardware import parse_hardware
from flaxlm.planning.collectives import (
  Collective,
  expected_collectives,
  link_of,
  transfer_seconds,
)


def mesh(**sizes):
  return dict.fromkeys(AXES, 1) | sizes


def by_name(config, sizes, hardware):
  rows = expected_collectives(config, sizes, parse_hardware(hardware))
  assert all(row.bytes > 0 and row.count > 0 for row in rows)
  found = {}
  for row in rows:
    found.setdefault((row.kind, row.axes), []).append(row)
  return found


def test_the_slowest_link_counts():
  tpu, gpu = parse_hardware("2xv5e:4x4"), parse_hardware("h100x32")
  sizes = mesh(slice=2, fsdp=8, tensor=2)
  assert link_of(("fsdp",), sizes, tpu) == "ici"
  assert link_of(("slice", "fsdp"), sizes, tpu) == "dcn"
  assert link_of(("tensor",), sizes, gpu) == "nvlink"
  assert link_of(("fsdp",), sizes, gpu) == "ib"  # 16 GPUs, in nodes of 8
  assert link_of(("fsdp",), mesh(data=8, fsdp=4), gpu) == "nvlink"
  assert link_of(("tensor",), mesh(fsdp=4, tensor=8), gpu) == "nvlink"  # a full node
  assert link_of(("fsdp",), mesh(fsdp=8), parse_hardware("h100x8")) == "nvlink"


def test_times_of_rings_by_hand():
  gpu, size = parse_hardware("h100x8"), 450e9
  sizes = mesh(fsdp=8)

  def took(kind, axes=("fsdp",), link="nvlink", hardware=gpu, sizes=sizes):
    return transfer_seconds(Collective(kind, size, 1, axes, link), sizes, hardware)

  # A GPU sends at 450 GB/s all but its own eighth, twice in an all-reduce.
  assert took("all-gather") == pytest.approx(7 / 8, rel=1e-3)
  assert took("all-reduce") == pytest.approx(7 / 4, rel=1e-3)
  assert took("permute") == pytest.approx(1, rel=1e-3)
  assert took("all-gather", sizes=mesh(fsdp=1)) == 0
  # Two nodes: 8 cards of 50 GB/s per node are nearly as fast as NVLink's 450.
  two = parse_hardware("h100x16")
  sizes = mesh(fsdp=16)
  assert took("all-gather", link="ib", hardware=two, sizes=sizes) == pytest.approx(
    15 / 16 * 450 / 400, rel=1e-3
  )
  # One GPU per node uses only its own card.
  sizes = mesh(data=2, tensor=8)
  assert took("all-reduce", ("data",), "ib", two, sizes) == pytest.approx(9, rel=1e-3)
  # On v5p, an axis on one of three dimensions has a third of 600 GB/s, on three, all.
  pod = parse_hardware("v5p:8x8x8")
  one = took("all-gather", ("tensor",), "ici", pod, mesh(fsdp=64, tensor=8))
  assert one == pytest.approx(7 / 8 * 450 / 200, rel=1e-3)
  whole = took("all-gather", ("fsdp",), "ici", pod, mesh(fsdp=512))
  assert whole == pytest.approx(511 / 512 * 450 / 600, rel=1e-3)
  slow = took(
    "all-reduce", ("slice",), "dcn", parse_hardware("2xv5p:8x8x8"), mesh(slice=2)
  )
  assert slow == pytest.approx(450 / 6.25, rel=1e-3)


def test_fsdp_gathers_twice_and_scatters_once():
  config = gpt2_124m.get_config()
  config.model.dtype = "float32"
  found = by_name(config, mesh(fsdp=8), "h100x8")
  layers, table = 12 * 12 * 768**2, (50257 + 1024) * 768
  gathers, scatters = found["all-gather", ("fsdp",)], found["reduce-scatter", ("fsdp",)]
  accumulation = config.step.accumulation_steps
  assert [row.bytes for row in gathers] == [
    2 * 4 * layers * accumulation, 2 * 4 * table * accumulation,
  ]  # fmt: skip
  assert [row.bytes * 2 for row in scatters] == [row.bytes for row in gathers]
  assert found.keys() == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))}
  # Replicas sum their gradients once per step, for any number of passes.
  config.step.accumulation_steps = 2
  (reduce,) = by_name(config, mesh(data=8), "h100x8")["all-reduce", ("data",)]
  assert reduce.bytes == 4 * (layers + table) and reduce.count == 1


def test_each_axis_sends_what_it_should():
  config = gpt2_124m.get_config()
  config.model.remat, config.model.dtype = "none", "float32"
  config.data.batch_size, config.step.accumulation_steps = 8, 1
  stream = 8 * config.data.seq_len * 768 * 4
  found = by_name(config, mesh(tensor=4), "h100x4")
  (gather,) = found["all-gather", ("tensor",)]
  assert gather.bytes == 12 * 4 * stream  # two per layer forward, two backward
  config.model.attention = "ring"
  found = by_name(config, mesh(context=4), "h100x4")
  (ring,) = found["permute", ("context",)]
  assert ring.bytes == 12 * 3 * 3 * 2 * stream / 4  # 3 hops, keys and values
  config.model.attention = "xla"
  assert ("all-to-all", ("context",)) in by_name(config, mesh(context=4), "h100x4")
  config.mesh.microbatches = 4
  found = by_name(config, mesh(stage=2), "h100x2")
  (hop,) = found["permute", ("stage",)]
  assert hop.bytes == 2 * 5 * stream / 4  # 4 microbatches and a bubble, both ways


def test_experts_get_their_tokens_and_send_them_back():
  config = olmoe_1b_7b.get_config()
  config.model.remat, config.step.accumulation_steps = "none", 1
  found = by_name(config, mesh(expert=8), "h100x8")
  (sent,) = found["all-to-all", ("expert",)]
  model, tokens = config.model, config.data.batch_size * config.data.seq_len / 8
  room = model.moe.capacity_factor or 1.0
  pairs = model.moe.experts_per_token * room * tokens
  assert sent.bytes == pytest.approx(
    4
    * model.num_layers
    * pairs
    * model.embed_dim
    * (2 + 2 * (model.dtype != "bfloat16"))
  )
