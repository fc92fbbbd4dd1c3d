"""Which kernel computes attention: what each one can do, and which one `auto` takes.

No JAX here: a config is refused, with the reason, before anything slow is imported.
"""

import json
import os
import pathlib
from typing import NamedTuple

BACKENDS = ("reference", "xla", "cudnn", "splash", "ring")
FORMS = ("dense", "chunked")  # of xla, by shape: no knob
FUSED = {"gpu": "cudnn", "tpu": "splash"}  # the kernel of the platform's maker
LANES = 128  # splash works on so many tokens at least


class Case(NamedTuple):
  """What is asked of a kernel, for whole rows."""

  platform: str  # cpu | gpu | tpu; "" where it is not known yet
  dtype: str
  L: int  # queries a row
  M: int  # keys a row
  head_dim: int
  softcap: float = 0.0
  prefix: bool = False  # some tokens are seen from both sides
  sinks: bool = False
  cached: bool = False  # queries come after the keys of a cache


def why_not(backend: str, case: Case) -> str | None:
  """Returns what `backend` needs and `case` lacks, with its key; None if it can.

  `reference` and `xla` can compute all; `splash` and `cudnn` see what the makers of the
  kernels allow (jax 0.10: pallas.ops.tpu.splash_attention, jax.nn).
  """
  L, M, H = case.L, case.M, case.head_dim
  at_home = case.platform == "" or FUSED.get(case.platform) == backend
  if backend == "cudnn":
    needs = {
      f"an NVIDIA GPU, and this is a {case.platform}": at_home,
      "16 bits: config.model.dtype=bfloat16": case.dtype in ("bfloat16", "float16"),
      "no soft cap: config.model.attention_softcap=0": not case.softcap,
      "no sinks: config.model.attention_sinks=False": not case.sinks,
      f"config.model.head_dim={H} to be 8, 16, ... 128": H % 8 == 0 and H <= 128,
      f"an even number of tokens a row: config.data.seq_len={L}": L % 2 == M % 2 == 0,
    }
  elif backend == "splash":
    needs = {
      f"a TPU, and this is a {case.platform}": at_home,
      "no prefix that is seen from both sides: another config.objective.kind": (
        not case.prefix
      ),
      f"rows of a multiple of {LANES} tokens: config.data.seq_len={L}": (
        L == M and L % LANES == 0
      ),
      f"config.model.head_dim={H} to be a multiple of 64": H % 64 == 0,
      "whole rows, without a cache": not case.cached,
    }
  elif backend == "ring":
    needs = {"whole rows, without a cache": not case.cached}
  else:
    known = (*BACKENDS, *FORMS)
    needs = {f"to be one of {' '.join(BACKENDS)}": backend in known}
  return next((need for need, met in needs.items() if not met), None)


def choose_backend(case: Case, measured: dict) -> str:
  """What `auto` means for `case`, where the doctor has `measured` this kind of device.

  The kernel of the platform's maker where it can compute this, and was not found slower
  at the nearest length or wrong. cuDNN must have been found right on this card first:
  its masks have had bugs that depend on card and version, and a mask that leaks is
  worse than a slow step. Splash is what all of Google's users run, and is interpreted
  against the reference in our tests.
  """
  fused = FUSED.get(case.platform)
  if fused is None or why_not(fused, case):
    return "xla"
  found = measured.get(fused)
  if found is None:
    return "splash" if fused == "splash" else "xla"
  if not found["conforms"]:
    return "xla"
  plain = [measured[form]["tflops"] for form in FORMS if form in measured]
  nearest = min(found["tflops"], key=lambda L: abs(int(L) - case.L))
  fastest = max((form[nearest] for form in plain), default=0.0)
  return fused if found["tflops"][nearest] >= fastest else "xla"


def cache_path() -> pathlib.Path:
  """Where `python -m flaxlm.doctor` keeps what it measured, for this user."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "flaxlm" / "attention.json"


def load_measured(device_kind: str, version: str) -> dict:
  """What the doctor found on such a device with this version of JAX: {backend: ...}.

  Each has `conforms`, and `tflops` by the length of a row. {} if it did not run, or if
  the file is not one of its.
  """
  try:
    found = json.loads(cache_path().read_text())[f"{device_kind}, jax {version}"]
    return {name: found[name] for name in (*BACKENDS, *FORMS) if name in found}
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def save_measured(device_kind: str, version: str, found: dict) -> pathlib.Path:
  """Adds what the doctor found to the file, and returns its path."""
  path = cache_path()
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    known = dict(json.loads(path.read_text()))
  except (OSError, ValueError, TypeError):
    known = {}
  known[f"{device_kind}, jax {version}"] = found
  part = path.with_name(f"{path.name}.{os.getpid()}")
  part.write_text(json.dumps(known, indent=1) + "\n")
  part.replace(path)  # another process may read it now
  return path
