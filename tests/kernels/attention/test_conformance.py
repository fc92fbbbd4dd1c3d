"""Every backend against the definition in float64; not one bit leaks."""

import functools
import importlib.util
import json

import jax
import numpy as np
import pytest

from flaxlm.errors import UserError
from flaxlm.kernels.attention import choice, conformance
from flaxlm.kernels.attention.conformance import (
  LAYOUTS,
  MASKS,
  Mask,
  check_all,
  check_backend,
  kernels,
)

LENGTH = 160  # blocks of 80 (chunked), 20 (ring)


def assert_conform(results):
  assert results and not [result for result in results if not result.conforms]


def runs_on_a_cpu(backend):
  row = choice.find_backend(backend)
  case = conformance.case_of(MASKS[0], "float32", LENGTH, "cpu")
  return row.timed and choice.why_not(backend, case) is None


# Half of the cases here, the others with the slow tests: one dtype per mask first.
HALVES = pytest.mark.parametrize(
  "half", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["half", "other half"]
)


@HALVES
@pytest.mark.parametrize(
  "backend", [name for name in choice.KERNELS if runs_on_a_cpu(name)]
)
def test_it_conforms(backend, half):
  cases = [
    case
    for case in conformance.cases(backend, LENGTH, "cpu")
    if (MASKS.index(case[0]) + (case[1] == "float32")) % 2 != half
  ]
  assert_conform(check_all(kernels(backend), cases))


def test_the_reference_conforms():
  cases = [(MASKS[0], "bfloat16", "MHA", LENGTH), (MASKS[-1], "float32", "GQA", LENGTH)]
  assert_conform(check_all(kernels("reference"), cases))


@HALVES
def test_a_ring_of_four_conforms(half):
  names = list(LAYOUTS)
  cases = [
    (mask, "float32", names[i % 3], LENGTH)
    for i, mask in enumerate(MASKS)
    if mask.packed
  ]
  cases = [*cases[half::2], (MASKS[-1], "bfloat16", "GQA", LENGTH)]
  assert_conform(check_all(kernels("ring"), cases))


def test_the_tpu_kernel_conforms_where_it_is_interpreted():
  cases = [
    (MASKS[-1], "float32", "GQA", 256),
    (Mask(causal=False, packed=True), "bfloat16", "MHA", 256),
  ]
  assert_conform(check_all(kernels("splash", interpret=True), cases))


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_the_tpu_kernel_compiles_for_a_tpu():
  from flaxlm.parallel.hardware import parse_hardware
  from flaxlm.planning.compile import topology

  (device, *_) = topology(parse_hardware("v5e:2x2"))
  sharding = jax.sharding.SingleDeviceSharding(device)
  for mask, dtype, layout in (
    (MASKS[-1], "bfloat16", "GQA"),
    (Mask(causal=False, packed=True), "float32", "MQA"),
  ):
    given = conformance.inputs(mask, dtype, layout, 256)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), given
    )
    kernel = functools.partial(kernels("splash"), mask=mask)
    run = jax.jit(functools.partial(conformance.pull, kernel))
    text = run.trace(shapes).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # out, dkv, dq


def leaky(given, mask):
  """A kernel whose documents see each other a little, too little for a tolerance."""
  right = kernels("dense")
  wrong = right(given._replace(segments_BL=None), mask)
  return right(given, mask) + 1e-9 * wrong


def off_by_one(given, mask):
  return kernels("dense")(given, mask._replace(window=mask.window + 1))


def test_what_leaks_or_is_wrong_is_found():
  result = check_backend(leaky, Mask(packed=True), "float32", "GQA", LENGTH)
  assert result.error < result.tolerance and not result.conforms
  assert "first in second: gradient of k" in result.leaks
  result = check_backend(
    off_by_one, Mask(packed=True, window=50), "float32", "GQA", LENGTH
  )
  assert result.error > 10 * result.tolerance and not result.leaks
  future = check_backend(
    lambda given, mask: kernels("dense")(given, mask._replace(causal=False)),
    Mask(), "float32", "MHA", LENGTH,
  )  # fmt: skip
  assert "the future: output" in future.leaks


def test_what_is_asked_of_a_backend_is_what_it_refuses():
  case = choice.Case("gpu", "bfloat16", 1024, 1024, 64)
  assert choice.why_not("cudnn", case) is None
  for change, reason in {
    ("platform", "cpu"): "an NVIDIA GPU",
    ("dtype", "float32"): "config.model.dtype",
    ("softcap", 1.0): "config.model.attention_softcap",
    ("sinks", True): "config.model.attention_sinks",
    ("head_dim", 160): "config.model.head_dim",
    ("L", 1023): "config.data.seq_len",
  }.items():
    changed = case._replace(**dict([change]))
    assert reason in choice.why_not("cudnn", changed)
  tpu = case._replace(platform="tpu")
  assert choice.why_not("splash", tpu) is None
  for change, reason in {
    ("platform", "gpu"): "a TPU",
    ("prefix", True): "prefix",
    ("L", 1000): "config.data.seq_len",
    ("head_dim", 80): "config.model.head_dim",
    ("cached", True): "cache",
  }.items():
    assert reason in choice.why_not("splash", tpu._replace(**dict([change])))
  with pytest.raises(UserError, match="given:  flash\n  needed: one of auto reference"):
    choice.why_not("flash", case)
  assert choice.why_not("auto", case._replace(sinks=True, cached=True)) is None


def test_auto_goes_by_platform_shape_and_measurement(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  gpu = choice.Case("gpu", "bfloat16", 1024, 1024, 64)
  tpu = gpu._replace(platform="tpu")
  assert choice.load_measured("H", "1") == {}
  assert choice.choose_backend(gpu, {}) == "xla"  # not proven right on this card
  assert choice.choose_backend(tpu, {}) == "splash"
  assert choice.choose_backend(tpu._replace(L=1000, M=1000), {}) == "xla"

  def row(slow, fast, conforms=True):
    return {"conforms": conforms, "tflops": {"1024": slow, "8192": fast}}

  found = {"cudnn": row(1.0, 9.0), "dense": row(2.0, 1.0), "chunked": row(0.5, 2.0)}
  choice.save_measured("H", "1", found)
  choice.save_measured("I", "1", {})
  measured = choice.load_measured("H", "1")
  assert measured == found and choice.load_measured("H", "2") == {}
  assert choice.choose_backend(gpu, measured) == "xla"
  assert choice.choose_backend(gpu._replace(L=9000, M=9000), measured) == "cudnn"
  assert choice.choose_backend(gpu._replace(L=9000, softcap=1.0), measured) == "xla"
  wrong = measured | {"cudnn": row(9.0, 9.0, conforms=False)}
  assert choice.choose_backend(gpu, wrong) == "xla"
  damaged = [{"cudnn": 5}, {"cudnn": {"conforms": 1, "tflops": {}}}, 5, {"cudnn": None}]
  damaged += [{"dense": row("x", 1)}, {"dense": {"conforms": True, "tflops": {"x": 1}}}]
  texts = [json.dumps({"H, jax 1": value}) for value in damaged]
  for text in ("not json", "[" * 10**5, *texts):
    choice.cache_path().write_text(text)
    assert choice.load_measured("H", "1") == {}


def test_the_definition_is_the_definition():
  # One query is computed by hand; gradients are checked by finite differences.
  mask = MASKS[-1]
  given = conformance.inputs(mask, "float32", "GQA", 60)
  out, _, dk, _, dsinks = conformance.exact(given, mask)
  seen = given.segments_BL[0] == 2
  seen &= np.arange(60) <= 40
  q, k, v = (x[0].astype(np.float64) for x in given[:3])
  q, k, v = q[40, 3], k[seen, 1], v[seen, 1]
  powers = np.exp(2.0 * np.tanh(k @ q / 8 / 2.0))
  expected = powers @ v / (powers.sum() + np.exp(given.sinks_N[3]))
  np.testing.assert_allclose(out[0, 40, 3], expected, rtol=1e-5)

  def loss(place, step):
    moved = getattr(given, place).astype(np.float64)
    index = (0, 30, 1, 5) if moved.ndim == 4 else (3,)
    moved[index] += step
    changed = given._replace(**{place: moved})
    return (conformance.exact(changed, mask)[0] * given.dout_BLNH).sum()

  for place, slope in (("k_BMKH", dk[0, 30, 1, 5]), ("sinks_N", dsinks[3])):
    found = (loss(place, 1e-5) - loss(place, -1e-5)) / 2e-5
    assert found == pytest.approx(slope, rel=1e-5)
