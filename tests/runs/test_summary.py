"""A run's card shows what will be trained; on a terminal, in colour."""

import io

import pytest

from flaxlm.runs import summary


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_summary_card(stream, monkeypatch):
  monkeypatch.setenv("COLUMNS", "160")
  monkeypatch.setenv("TERM", "xterm")  # not one without colours
  out = stream()
  summary.print_summary(
    model="6 layers x 384",
    parameters={"blocks": 10_000_000, "embedding": 1_572_864},
    tokens_per_step=4096,
    num_steps=1000,
    flops_per_token=7e7,
    mesh={"data": 4, "fsdp": 2, "tensor": 1},
    device_kind="cpu",
    bytes_per_device={"parameters": 2**20, "optimizer": 2**21},
    data="stdlib [train] 8.1M tokens",
    epochs=0.5,
    tokenizer="bpe 4096",
    workdir="runs/a",
    resume="new run",
    xla="M_MMAP_MAX=0",
    stream=out,
  )
  lines = out.getvalue().splitlines()
  assert len(lines) == 10
  for text in (
    "11,572,864 (blocks 10M, embedding 1.57M)",
    "4,096 per step x 1,000 steps = 4.1M",
    "data 4 x fsdp 2 x tensor 1 on 8 x cpu",
    "parameters 1.0 MiB, optimizer 2.0 MiB",
    "stdlib [train] 8.1M tokens; 0.5 epochs",
    "runs/a (new run)",
    "0.07 GFLOP per token",
  ):
    assert text in out.getvalue()
  assert ("\x1b" in out.getvalue()) == out.isatty()
