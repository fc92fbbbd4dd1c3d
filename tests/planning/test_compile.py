"""The compiled step: its memory and its messages, counted exactly."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flaxlm.errors import ConfigError
from flaxlm.parallel import AXES
from flaxlm.parallel.hardware import parse_hardware
from flaxlm.parallel.mesh import make_mesh
from flaxlm.planning import compile, hlo

HARDWARE = parse_hardware("v5e:2x4")
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def messages(function, spec, mesh, shape):
  """Returns {(kind, axes): (count, bytes)} of a compiled program on the CPU."""
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  text = jax.jit(mapped).lower(jnp.ones(shape)).compile().as_text()
  rows = hlo.collectives(text, dict(mesh.shape), HARDWARE)
  return {(row.kind, row.axes): (row.count, row.bytes) for row in rows}


def test_messages_in_loops_are_counted_exactly():
  mesh = make_mesh(slice=2, data=1, fsdp=2, tensor=2)

  def inner(x, _):
    return jax.lax.psum(x * 1.5, "tensor"), None

  def outer(x, _):
    x, _ = jax.lax.scan(inner, x, None, length=3)
    whole = jax.lax.all_gather(x, "fsdp", tiled=True)
    x += jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True)
    x = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
    return x + jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), None

  def program(x):
    x, _ = jax.lax.scan(outer, x, None, length=5)
    return jax.lax.psum(x, ("slice", "tensor"))

  size = 64 * 16 * 4  # per device
  assert messages(program, P(), mesh, (64, 16)) == {
    ("all-reduce", ("tensor",)): (15, 15 * size),
    ("all-gather", ("fsdp",)): (5, 5 * 2 * size),  # output
    ("reduce-scatter", ("fsdp",)): (5, 5 * 2 * size),  # input
    ("permute", ("tensor",)): (5, 5 * size),
    ("all-to-all", ("fsdp",)): (5, 5 * size),
    ("all-reduce", ("slice", "tensor")): (1, size),
  }


def test_the_link_of_a_message_is_the_slowest_that_it_crosses():
  hardware = parse_hardware("2xv5e:2x2")
  text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %b = f32[8]{0} all-reduce(%a), channel_id=2, replica_groups=[2,4]<=[8]
}
"""
  sizes = dict.fromkeys(AXES, 1) | {"slice": 2, "fsdp": 4}
  rows = hlo.collectives(text, sizes, hardware)
  assert {row.axes: row.link for row in rows} == {("slice",): "dcn", ("fsdp",): "ici"}


def test_parts_of_one_message_count_once_and_pairs_too():
  # As TPUs print them: pieces in fusions share a chain; a start has an end; a
  # reduce-scatter is named by its computation; slices use the host.
  text = """
%start (p: f32[2]) -> f32[8] {
  %g.1 = f32[8]{0} all-gather(%p), replica_groups={{0,1,2,3}}, chain_id="1"
}
%middle (p: f32[2]) -> f32[8] {
  %g.2 = f32[8]{0} all-gather(%p), replica_groups={{0,1,2,3}}, chain_id="1"
}
%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}
}
%limit (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%turn (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = f32[8]{0:T(128)} fusion(%x), kind=kCustom, calls=%start
  %m = f32[8]{0:T(128)} fusion(%s), kind=kOutput, calls=%middle
  %f = f32[2]{0} fusion(%m), kind=kCustom, calls=%all-reduce-scatter.1
  %ps = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,2},{2,3}}
  %pd = f32[4]{0} collective-permute-done(%ps), channel_id=3
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%limit, body=%turn
  %v = (bf16[8]{0}, u32[], token[]) recv(%t), _xla_megascale_transfer_type="ALL_REDUCE"
  %d = (bf16[8]{0}, token[]) recv-done(%v)
}
"""
  sizes = dict.fromkeys(AXES, 1) | {"slice": 2, "fsdp": 4}
  rows = hlo.collectives(text, sizes, parse_hardware("2xv5e:2x2"))
  assert {(row.kind, row.axes): (row.count, row.bytes) for row in rows} == {
    ("all-gather", ("fsdp",)): (6, 6 * 32),
    ("reduce-scatter", ("fsdp",)): (6, 6 * 32),
    ("permute", ("fsdp",)): (6, 6 * 16),
    ("all-reduce", ("slice",)): (1, 16),
  }


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    (
      "replica_groups=mesh['a'=4], device_ids=([2,2]T(1,0)) {'a':(2)2}",
      [[0, 2], [1, 3]],
    ),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(2,3,0,1) {'b'}", [[2, 3], [0, 1]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
  ],
)
def test_groups_are_read_however_xla_writes_them(text, groups):
  np.testing.assert_array_equal(hlo.members(f"%x), channel_id=1, {text}, a=b"), groups)


def test_out_of_memory_is_read_from_the_refusal():
  error = RuntimeError()
  text = (
    "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (36.50G) "
    "exceeds available HBM (15.75G)."
  )
  needed = compile.read_out_of_memory(text, error)
  assert needed == (36.5 * 2**30, 15.75 * 2**30)
  with pytest.raises(RuntimeError):
    compile.read_out_of_memory("INTERNAL: something else", error)


def test_the_text_of_a_program_is_read_from_its_dump():
  lowered = jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(8))
  memory, text = compile.compile_and_read(lowered)
  computations, entry = hlo.parse_hlo(text)
  assert memory.argument_size_in_bytes == 32 and computations[entry]


@needs_libtpu
def test_a_step_compiles_for_tpus_that_are_not_here(tiny):
  tiny.mesh.fsdp = 4
  result = compile.compile_step(tiny, parse_hardware("v5e:2x2"))
  assert result.how == "compiled" and result.fits
  held = result.memory
  # AdamW's two moments; each chip holds all norms and counters.
  assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
  assert held["temporaries"] > held["batch"] == 4 * 2 * 32 * 4  # four int32 arrays
  kinds = {row.kind for row in result.collectives if "fsdp" in row.axes}
  assert "all-gather" in kinds
  assert {row.link for row in result.collectives} == {"ici"}


@needs_libtpu
def test_what_does_not_fit_is_a_result(tiny):
  tiny.tokenizer.vocab_size = 2**20
  tiny.model.embed_dim = 4096
  result = compile.compile_step(tiny, parse_hardware("v5e:2x2"))
  assert not result.fits and result.collectives == []
  # Three float32 arrays of 2^20 x 4096 at the least.
  assert result.peak > 3 * 2**34 > result.available > 15e9


@needs_libtpu
def test_a_slice_that_does_not_exist_is_an_error(tiny):
  with pytest.raises(ConfigError, match="v5e:3x5"):
    compile.compile_step(tiny, parse_hardware("v5e:3x5"))


def test_this_machine_is_compiled_for_and_other_gpus_are_counted(tiny):
  result = compile.compile_step(tiny, parse_hardware("h100x8"))
  assert result.how == "counted" and result.peak > result.memory["parameters"] > 0


def break_down(*_):
  os.abort()


def test_a_compiler_that_breaks_down_takes_nothing_with_it(tiny):
  with pytest.raises(ConfigError, match="a step that libtpu can compile"):
    compile.compile_apart(tiny, HARDWARE, break_down)
  assert compile.compile_apart(tiny, HARDWARE, count_chips) == 8


def count_chips(config, hardware):
  assert jax.default_backend() == "cpu"
  return hardware.num_chips
