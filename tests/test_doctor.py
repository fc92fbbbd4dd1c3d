"""The doctor prints its results, stores them for attention=auto, fails on errors."""

import json

import jax
import jax.numpy as jnp
import pytest

from flaxlm import doctor
from flaxlm.kernels.attention import choice, conformance


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  # All cases take most of a minute: kernels/attention/test_conformance.py runs them.
  monkeypatch.setattr(conformance, "MASKS", conformance.MASKS[1:2])
  monkeypatch.setattr(conformance, "LAYOUTS", {"GQA": 2})
  monkeypatch.setattr(conformance, "teraflops", lambda *_: 0.5)
  monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_it_prints_keeps_and_writes_what_it_found(tmp_path, capsys):
  doctor.main(["--json", str(tmp_path / "found.json")])
  said = capsys.readouterr().out
  assert f"jax           {jax.__version__}" in said
  for line in ("dense            2/2", "chunked          2/2", "256: 0.5  512: 0.5"):
    assert line in said
  assert "cannot run: it needs an NVIDIA GPU, and this is a cpu" in said
  assert "cannot run: it needs more than one device" in said
  found = json.loads((tmp_path / "found.json").read_text())
  assert found["attention"]["dense"]["conforms"]
  assert found["attention"]["splash"]["needs"].startswith("a TPU")
  kept = choice.load_measured("cpu", jax.__version__)
  assert set(kept) == {"dense", "chunked", "reference"}
  assert kept["chunked"] == found["attention"]["chunked"]


def test_a_kernel_that_is_wrong_ends_it_with_1(monkeypatch, capsys):
  right = conformance.kernels

  def wrong(backend):
    kernel = right(backend)
    if backend != "chunked":
      return kernel
    return lambda given, mask: kernel(given, mask) + 1e-9 * jnp.mean(given.v_BMKH)

  monkeypatch.setattr(conformance, "kernels", wrong)
  with pytest.raises(SystemExit, match="1"):
    doctor.main([])
  said = capsys.readouterr().out
  assert "chunked          0/2" in said and "FAILED causal packed, float32" in said
  assert "first in second: output" in said
  assert not choice.load_measured("cpu", jax.__version__)["chunked"]["conforms"]
