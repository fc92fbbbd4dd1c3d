"""The table of attention backends: what each can compute, and which one `auto` takes.

No JAX here: a config is refused, with the reason, before anything slow is imported.
All that the package knows about a backend is in its row; nothing else lists them.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from flaxlm.errors import UserError
from flaxlm.files import write_atomically
from flaxlm.json_files import check_fields, read_json

LANES = 128  # tokens in the smallest block that splash works on


class Case(NamedTuple):
  """What a backend is asked to compute, for whole rows."""

  platform: str  # cpu | gpu | tpu; "" where it is not known yet
  dtype: str
  L: int  # queries per row
  M: int  # keys per row
  head_dim: int
  softcap: float = 0.0
  prefix: bool = False  # some tokens are visible from both sides
  sinks: bool = False
  cached: bool = False  # the keys of a cache precede those of the queries


class Backend(NamedTuple):
  """One way to compute attention.

  `needs` maps each requirement, in words that name the key to change, to whether the
  case meets it.
  """

  name: str
  needs: Callable[[Case], dict[str, bool]] = lambda case: {}
  fused_on: str = ""  # the platform whose one fused kernel this is
  form_of: str = ""  # the choice that becomes this kernel for some shapes
  keeps_scores: bool = False  # stores L x M numbers per head for the backward pass
  traces_anywhere: bool = False  # also where it cannot run: `plan` needs that
  per_device: bool = False  # opaque to the compiler: each device runs its own shard
  splits_rows: bool = False  # each device holds a part of every row
  timed: bool = True  # the doctor measures its speed
  trusted: bool = False  # `auto` takes it where the doctor has not run


def _needs_of_cudnn(case: Case) -> dict[str, bool]:
  """What jax.nn.dot_product_attention accepts in jax 0.10."""
  L, M, H = case.L, case.M, case.head_dim
  return {
    f"an NVIDIA GPU, and this is a {case.platform}": case.platform in ("", "gpu"),
    "16 bits: config.model.dtype=bfloat16": case.dtype in ("bfloat16", "float16"),
    "no soft cap: config.model.attention_softcap=0": not case.softcap,
    "no sinks: config.model.attention_sinks=False": not case.sinks,
    f"config.model.head_dim={H} to be 8, 16, ... 128": H % 8 == 0 and H <= 128,
    f"an even number of tokens per row: config.data.seq_len={L}": L % 2 == M % 2 == 0,
  }


def _needs_of_splash(case: Case) -> dict[str, bool]:
  """What jax.experimental.pallas.ops.tpu.splash_attention accepts in jax 0.10."""
  L, M, H = case.L, case.M, case.head_dim
  return {
    f"a TPU, and this is a {case.platform}": case.platform in ("", "tpu"),
    "no prefix that is visible from both sides: another config.objective.kind": (
      not case.prefix
    ),
    f"rows of a multiple of {LANES} tokens: config.data.seq_len={L}": (
      L == M and L % LANES == 0
    ),
    f"config.model.head_dim={H} to be a multiple of 64": H % 64 == 0,
    "whole rows, without a cache": not case.cached,
  }


def _needs_of_ring(case: Case) -> dict[str, bool]:
  return {"whole rows, without a cache": not case.cached}


BACKENDS = {
  backend.name: backend
  for backend in (
    Backend("reference", keeps_scores=True, timed=False),
    # Computed by one of the next two: see `kernel_of`.
    Backend("xla", keeps_scores=True),
    Backend("dense", form_of="xla", keeps_scores=True),
    Backend("chunked", form_of="xla", per_device=True),
    Backend("cudnn", _needs_of_cudnn, "gpu"),
    Backend(
      "splash",
      _needs_of_splash,
      "tpu",
      traces_anywhere=True,
      per_device=True,
      trusted=True,
    ),
    Backend("ring", _needs_of_ring, per_device=True, splits_rows=True, timed=False),
  )
}
_FORMS = tuple(b.name for b in BACKENDS.values() if b.form_of)
# The values of config.model.attention.
ATTENTION_CHOICES = ("auto", *(name for name in BACKENDS if name not in _FORMS))
# What computes: every backend but those that others are a form of.
KERNELS = tuple(
  name for name in BACKENDS if all(b.form_of != name for b in BACKENDS.values())
)
# The fused kernel of each platform.
FUSED = {b.fused_on: b.name for b in BACKENDS.values() if b.fused_on}
# The backend for rows that are split over the mesh axis `context`.
CONTEXT_PARALLEL = next(b.name for b in BACKENDS.values() if b.splits_rows)


def find_backend(name: str) -> Backend:
  """Returns the row of a backend.

  Raises:
    UserError: no backend has this name.
  """
  if name not in BACKENDS:
    needed = f"one of {' '.join((*ATTENTION_CHOICES, *_FORMS))}"
    raise UserError("this attention backend does not exist", name, needed)
  return BACKENDS[name]


def why_not(name: str, case: Case) -> str | None:
  """Returns the first requirement that `case` does not meet, or None.

  `auto` has none: it takes a backend that can compute the case.

  Raises:
    UserError: no backend has this name.
  """
  if name == "auto":
    return None
  needs = find_backend(name).needs(case)
  return next((need for need, met in needs.items() if not met), None)


def refuse_case(name: str, case: Case) -> None:
  """Raises UserError if the backend cannot compute this, or does not exist."""
  if reason := why_not(name, case):
    what = f"attention={name} cannot compute this"
    raise UserError(what, needed=reason, hint="config.model.attention=auto")


def kernel_of(name: str, chunks_pay: bool) -> str:
  """Returns the kernel of a backend: xla has two, every other backend is its own."""
  if name != "xla":
    return find_backend(name).name
  return "chunked" if chunks_pay else "dense"


def backend_with_cache(name: str) -> str:
  """Returns the backend for decoding: XLA's, or the definition if that was chosen."""
  return name if name == "reference" else "xla"


def choose_backend(case: Case, measured: dict) -> str:
  """Returns what `auto` means for `case`, given what the doctor measured here.

  That is the platform's fused kernel where it can compute the case, unless the doctor
  found it wrong, or slower at the nearest length. cuDNN must first have been found
  right on this card: its masks have had bugs that depend on card and version, and a
  mask that leaks is worse than a slow step. Splash is trusted: it is widely used, and
  our tests compare it, interpreted, with the reference.
  """
  fused = FUSED.get(case.platform)
  if fused is None or why_not(fused, case):
    return "xla"
  found = measured.get(fused)
  if found is None:
    return fused if BACKENDS[fused].trusted else "xla"
  if not (found["conforms"] and found["tflops"]):
    return "xla"
  plain = [measured[form]["tflops"] for form in _FORMS if form in measured]
  nearest = min(found["tflops"], key=lambda L: abs(int(L) - case.L))
  fastest = max((form.get(nearest, 0.0) for form in plain), default=0.0)
  return fused if found["tflops"][nearest] >= fastest else "xla"


def cache_path() -> pathlib.Path:
  """Returns the file where the doctor keeps this user's measurements."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "flaxlm" / "attention.json"


def load_measured(device_kind: str, version: str) -> dict:
  """Returns what the doctor found on this kind of device and version of JAX, by kernel.

  Each entry has `conforms`, and `tflops` by row length. Returns {} if the doctor has
  not run, or if the file cannot be read.
  """
  try:
    found = read_json(cache_path()).get(f"{device_kind}, jax {version}", {})
    found = {name: found[name] for name in BACKENDS if name in found}
    for name, row in found.items():
      check_fields(row, name, {"conforms": bool, "tflops": dict})
      if not all(L.isdecimal() and speed > 0 for L, speed in row["tflops"].items()):
        return {}
    return found
  except (OSError, ValueError, TypeError):
    return {}


def save_measured(device_kind: str, version: str, found: dict) -> pathlib.Path:
  """Adds what the doctor found to the file, and returns its path."""
  path = cache_path()
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    known = read_json(path)
  except (OSError, ValueError, TypeError):
    known = {}
  known[f"{device_kind}, jax {version}"] = found
  write_atomically(path, json.dumps(known, indent=1) + "\n", shared=True)
  return path
