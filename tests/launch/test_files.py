"""The files of launch/ are clean and complete; compilers know their flags."""

import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from tests.launch.stubs import LAUNCH, ROOT, SECRETS, flags


@pytest.mark.skipif(
  not (pathlib.Path(sys.executable).parent / "shellcheck").exists(), reason="pip: dev"
)
def test_scripts_are_clean():
  shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
  scripts = sorted(str(path) for path in LAUNCH.glob("*.sh"))
  command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *scripts]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_docker_copies_what_exists_and_pins_its_base():
  lines = (LAUNCH / "Dockerfile").read_text().splitlines()
  (base,) = [line.split()[1] for line in lines if line.startswith("FROM")]
  assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+\S*", base)
  copied = [w for x in lines if x.startswith("COPY") for w in x.split()[1:-1]]
  kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
  assert set(copied) == {line[1:] for line in kept if line.startswith("!")}
  assert all((ROOT / name).exists() for name in copied)
  setup = (ROOT / "setup.py").read_text()
  assert all(f'"{extra}": [' in setup for extra in ("tpu", "cuda", "gcs"))


def test_sky_recovers_what_was_preempted_and_nothing_else():
  job = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  recovery = job["resources"]["job_recovery"]
  assert recovery["recover_on_exit_codes"] == [75]
  assert recovery["max_restarts_on_errors"] == 0
  assert set(SECRETS) == set(job["secrets"]) and not any(job["secrets"].values())
  assert job["file_mounts"]["/bucket"] == {"source": "${BUCKET}", "mode": "MOUNT"}


def test_flags_go_where_they_are_understood():
  for hardware in ("v4", "v5e", "v5p", "v6e"):
    xla, tpu = flags(hardware, 2)
    assert not xla and tpu.startswith("--xla_")  # jaxlib would abort on them
  for hardware in ("h100", "h200", "b200"):
    xla, tpu = flags(hardware)
    assert not tpu and all(flag.startswith("--xla_gpu_") for flag in xla.split())
  assert flags("cpu") == ("", "")


def test_the_users_flags_come_last():
  assert flags("h100", XLA_FLAGS="--mine=1")[0].endswith("=true --mine=1")
  assert flags("v4", LIBTPU_INIT_ARGS="--mine=1")[1].endswith("=true --mine=1")
  assert flags("v6e", LIBTPU_INIT_ARGS="--mine=1")[1] == "--mine=1"
  assert flags("cpu", XLA_FLAGS="--mine=1")[0] == "--mine=1"


def test_every_flag_has_its_reason():
  lines = [x.strip() for x in (LAUNCH / "xla_flags.sh").read_text().splitlines()]
  for before, line in itertools.pairwise(lines):
    if re.search(r"_(tpu|gpu)\+=|export XLA_PYTHON", line):
      assert before.startswith(("#", "_gpu+=")), line
  found = "\n".join(lines)
  assert found.count("+=(--") >= 5


def test_unknown_hardware_is_refused():
  command = ["bash", "-c", "source launch/xla_flags.sh v99; echo on"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and "v99" in done.stderr and not done.stdout


def test_jaxlib_knows_the_flags_for_gpus():
  code = "import jax; print(jax.numpy.ones(2).sum())"
  env = os.environ | {"XLA_FLAGS": flags("h100")[0], "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr  # an unknown flag ends the process


COMPILE = """
import sys
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
name, slices = sys.argv[1], int(sys.argv[2])
more = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
more |= {"num_slices": slices} if slices > 1 else {}
topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
mesh = Mesh(np.array(topology.devices).reshape(-1), ("fsdp",))
split = NamedSharding(mesh, P("fsdp"))
x = jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=split)
step = jax.jit(jax.grad(lambda w, x: (x @ w).astype("float32").sum()))
step.trace(x, x).lower(lowering_platforms=("tpu",)).compile()
"""


@pytest.mark.parametrize(
  "hardware, topology, slices",
  [
    ("v5e", "v5e:2x2", 1),
    ("v5p", "v5p:2x2x1", 2),
    pytest.param("v4", "v4:2x2x1", 1, marks=pytest.mark.slow),
    pytest.param("v4", "v4:2x2x1", 2, marks=pytest.mark.slow),
    pytest.param("v5e", "v5e:2x2", 2, marks=pytest.mark.slow),
    pytest.param("v5p", "v5p:2x2x1", 1, marks=pytest.mark.slow),
    pytest.param("v6e", "v6e:2x2", 1, marks=pytest.mark.slow),
    pytest.param("v6e", "v6e:2x2", 2, marks=pytest.mark.slow),
  ],
)
def test_libtpu_knows_the_flags_for_tpus_and_compiles(hardware, topology, slices):
  pytest.importorskip("libtpu")
  env = os.environ | {
    "LIBTPU_INIT_ARGS": flags(hardware, slices)[1], "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
  }  # fmt: skip
  command = [sys.executable, "-c", COMPILE, topology, str(slices)]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-600:]


@pytest.fixture
def audit():
  spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.faults
def test_the_audit_finds_a_planted_secret_and_does_not_print_it(audit):
  key = "-----BEGIN RSA " + "PRIVATE KEY-----"
  planted = {"a": f"x\n{key}", "b": "hf_" + "a1" * 20, "c": "s3://me:" + "pw@b/x"}
  clean = {"d": "sk-learn-is-a-library-of-models", "e": "hf_hub_download, ghp_ and @"}
  found = audit.secrets((planted | clean).items())
  assert found == ["secret: a, line 2", "secret: b, line 1", "secret: c, line 1"]


@pytest.mark.faults
def test_the_audit_names_a_known_vulnerability_and_survives_no_network(
  audit, monkeypatch, capsys
):
  vulnerable = {"id": "PYSEC-1", "fix_versions": ["2"]}
  packages = [{"name": "a", "version": "1", "vulns": [vulnerable]}, {"name": "b"}]

  def answer(text):
    done = subprocess.CompletedProcess([], 1, text, "")
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: done)
    return audit.vulnerabilities()

  text = json.dumps({"dependencies": packages})
  assert answer(text) == ["pip-audit: a 1: PYSEC-1, mended in 2"]
  assert answer("") == [] and "not scanned" in capsys.readouterr().out
