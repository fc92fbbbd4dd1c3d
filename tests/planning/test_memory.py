"""Counted memory, against what XLA allocates."""

import pytest

from flaxlm.kernels import cross_entropy
from flaxlm.parallel.mesh import axis_sizes, make_mesh
from flaxlm.parallel.sharding import bytes_per_device
from flaxlm.planning.memory import expected_memory, kept_bytes
from flaxlm.runs import program


def counted(config):
  mesh = make_mesh(**axis_sizes(config.mesh))
  built = program.build_program(config, mesh)
  return expected_memory(config, built.target, dict(mesh.shape)), built, mesh


@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_is_what_xla_allocates(tiny, remat):
  tiny.model.remat = remat
  tiny.model.num_layers = 6
  tiny.model.embed_dim, tiny.model.mlp_dim, tiny.model.head_dim = 64, 256, 16
  tiny.data.seq_len, tiny.data.batch_size = 128, 32
  tiny.mesh.data, tiny.mesh.fsdp = 2, 4
  found, built, mesh = counted(tiny)
  assert found.parameters == bytes_per_device(built.target.model)
  assert found.optimizer == bytes_per_device(built.target.opt_state)
  with program.use_config_mesh(tiny, mesh):
    batch = program.abstract_batch(tiny, mesh)
    step = built.train_step.lower(built.target, batch, None).compile()
  memory = step.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert found.total == pytest.approx(peak, rel=0.25)


@pytest.mark.slow
def test_experts_of_other_devices_send_all_they_might(tiny):
  tiny.model.moe.num_experts = 4
  tiny.data.seq_len, tiny.data.batch_size = 128, 32
  tiny.mesh.data, tiny.mesh.expert = 2, 4
  found, built, mesh = counted(tiny)
  with program.use_config_mesh(tiny, mesh):
    batch = program.abstract_batch(tiny, mesh)
    step = built.train_step.lower(built.target, batch, None).compile()
  memory = step.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert found.total == pytest.approx(peak, rel=0.3)


def test_each_knob_saves_what_it_should(tiny, monkeypatch):
  tiny.data.batch_size = 128
  whole, *_ = counted(tiny)
  tiny.step.accumulation_steps = 1
  V, D = tiny.model.vocab_size, tiny.model.embed_dim
  monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 128 * V * 4)  # of 512 tokens
  chunked, *_ = counted(tiny)
  assert chunked.logits == whole.logits / 4 + 4 * D * V  # and the gradient's sum
  tiny.mesh.fsdp, tiny.mesh.tensor = 2, 2
  split, *_ = counted(tiny)
  assert split.parameters < whole.parameters / 2
  assert split.gathered > 0 == whole.gathered
  # Rows are split over four groups of chips instead of eight, each token over two.
  assert split.activations == whole.activations


def test_remat_keeps_less_and_named_tensors_more(tiny):
  from flaxlm.models.config import TransformerConfig

  def kept(**changes):
    return kept_bytes(TransformerConfig(**(dict(tiny.model) | changes)), 32)

  none, dots, full = (kept(remat=name) for name in ("none", "dots", "full"))
  assert none > dots > full > 0
  hidden = 32 * tiny.model.mlp_dim * 4 * tiny.model.num_layers
  more = kept(remat="full", keep=("hidden",)) - full
  assert more == 2 * hidden  # gate and up
