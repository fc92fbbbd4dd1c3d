"""Launchers that reach other machines, against stubs; what all launchers share."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml

from tests.launch.stubs import LAUNCH, ODD, ROOT, SECRETS, commands, flags

ALL = [
  ("tpu_vm.sh", "--spot --bucket=mine resume NAME us-east5-a v5p-128", ""),
  ("gke.sh", "--image=r/i:1 --bucket=mine submit NAME v5p:4x4x4 --", ""),
  ("sky.sh", "NAME --env BUCKET=gs://mine --", ""),
  ("slurm.sh", "--nodes=2 --job-name=NAME --", ""),
  ("local.sh", "-n 2", ""),
]
ALL = [(script, before.split()) for script, before, _ in ALL]


def call(before, name="a"):
  return [word.replace("NAME", name) for word in before]


@pytest.mark.faults
@pytest.mark.parametrize("script, before", ALL)
def test_print_shows_all_runs_nothing_and_tells_no_secret(stubs, script, before):
  arguments = ["--print", *call(before), "--config=x", ODD]
  for secret in SECRETS.values():
    arguments.append(f"--config.token={secret}")
  printed = stubs.run(script, *arguments, **SECRETS)
  assert stubs.calls() == [] and not (ROOT / "canary").exists()
  assert not any(secret in printed for secret in SECRETS.values())
  assert "<HF_TOKEN>" in printed


@pytest.mark.faults
@pytest.mark.parametrize("script, before", ALL[:3])
@pytest.mark.parametrize(
  "name",
  ["a; touch canary", "$(touch canary)", "-x", "--print", "A", "a b", "", "a\nb"],
)
def test_names_that_a_shell_or_a_program_could_misread_are_refused(
  stubs, script, before, name
):
  printed = stubs.run(script, *call(before, name), "--config=x", code=2)
  assert printed.startswith("flaxlm: ") and len(printed.splitlines()) <= 3
  assert stubs.calls() == [] and not (ROOT / "canary").exists()


TPU = ("a", "us-east5-a", "v5p-128")


def test_tpu_vm_prints_what_it_then_does(stubs):
  arguments = ["--spot", "--bucket=mine", "resume", *TPU, "--config=x", ODD]
  planned = commands(stubs.run("tpu_vm.sh", "--print", *arguments))
  planned = [c for c in planned if c[0] == "gcloud"]
  stubs.answer(**{
    "describe": [("NOT_FOUND", 1), ("WAITING", 0), ("ACTIVE", 0)],
    "host.status": [("none", 0), ("running", 0), ("0", 0)],
  })  # fmt: skip
  stubs.run("tpu_vm.sh", *arguments)
  done = [c for c in stubs.calls() if "describe" not in c and "--worker=0" not in c]
  draft = re.compile(r"^.*/(?=flaxlm\.tgz$)")
  done = [[draft.sub("PRIVATE_DIRECTORY/", word) for word in c] for c in done]
  assert done == [c for c in planned[2:] if "--worker=0" not in c]
  assert planned[1][:5] == ["gcloud", "compute", "tpus", "queued-resources", "delete"]
  (create,) = [c for c in done if "create" in c]
  assert {"--spot", "--runtime-version=v2-alpha-tpuv5", "--node-id=a"} <= set(create)
  (start,) = [c[-1] for c in done if "launch/host.sh" in c[-1]]
  assert "launch/host.sh v5p 1 --config=x" in start and "mesh.multihost=true" in start
  assert ODD in shlex.split(start.removeprefix("--command=").replace("(", " "))


@pytest.mark.faults
def test_tpu_vm_sends_the_code_and_keeps_secrets_out_of_arguments(stubs):
  kept = stubs.home / "kept"
  kept.mkdir()
  copy = f'[ "$4" != scp ] || cp -p "$5" {kept}\necho "$@" >>{kept}/arguments\n'
  stubs.write("gcloud", "#!/usr/bin/env bash\n" + copy)
  printed = stubs.run("tpu_vm.sh", "copy", *TPU, **SECRETS)
  arguments = (kept / "arguments").read_text()
  assert not any(secret in printed + arguments for secret in SECRETS.values())
  assert (kept / "secrets").read_text() == "".join(
    f"{name}={value}\n" for name, value in SECRETS.items()
  )
  assert (kept / "secrets").stat().st_mode & 0o777 == 0o600
  listing = ["tar", "-tzf", str(kept / "flaxlm.tgz")]
  names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
  assert {"setup.py", "flaxlm/train.py", "configs/base.py"} <= set(names.split())
  assert ".git/" not in names and ".venv" not in names


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", "PREEMPTED"])
def test_tpu_vm_makes_a_preempted_machine_again(stubs, state):
  stubs.answer(**{
    "describe": [("ACTIVE", 0)] * 2 + [(state, 0), ("NETWORK", 1), ("ACTIVE", 0)],
    "host.status": [("running", 0), ("", 255), ("none", 0), ("running", 0), ("86", 0)],
  })  # fmt: skip
  printed = stubs.run("tpu_vm.sh", "resume", *TPU, code=86)
  assert state in printed and "exit code 86" in printed
  made = [c[4] for c in stubs.calls() if c[4] in ("create", "delete")]
  assert made == ["delete", "create"]
  assert sum("launch/host.sh" in c[-1] for c in stubs.calls()) == 1


def test_tpu_vm_resumes_what_was_stopped_but_not_what_it_saw_stop(stubs):
  stubs.answer(**{
    "describe": ("READY", 0),
    "host.status": [("75", 0), ("running", 0), ("75", 0)],
  })  # fmt: skip
  stubs.run("tpu_vm.sh", "--now", "resume", *TPU, code=75)
  assert sum("launch/host.sh" in c[-1] for c in stubs.calls()) == 1
  stubs.answer(**{"describe": ("READY", 0), "host.status": ("0", 0)})
  stubs.run("tpu_vm.sh", "--now", "resume", *TPU)
  assert sum("launch/host.sh" in c[-1] for c in stubs.calls()) == 1


def test_tpu_vm_reaches_every_host_of_every_slice(stubs):
  stubs.run("tpu_vm.sh", "--slices=2", "run", *TPU, "--workdir=b")
  stubs.run("tpu_vm.sh", "stop", *TPU)
  several, one = stubs.calls()
  assert several[3:5] == ["queued-resources", "ssh"]
  assert {"--node=all", "--worker=all"} <= set(several) and "host.sh v5p 2" in several[
    -1
  ]
  assert one[3:5] == ["tpu-vm", "ssh"] and "--worker=all" in one and "-TERM" in one[-1]


@pytest.mark.parametrize(
  "arguments",
  [
    ["create", "a", "us-east5-a", "h100-8"],
    ["create", "a", "moon", "v5p-8"],
    ["dance", *TPU],
    ["--what", "create", *TPU],
    ["--slices=0", "create", *TPU],
    ["--slices=2", "--now", "create", *TPU],
    ["--bucket=a;b", "create", *TPU],
    ["create", "a"],
  ],
)
def test_tpu_vm_refuses_what_it_cannot_do(stubs, arguments):
  assert "flaxlm: " in stubs.run("tpu_vm.sh", *arguments, code=2)
  assert stubs.calls() == []


def jobset(stubs, *arguments):
  text = f'#!/usr/bin/env bash\n[ "$1" != apply ] || cat "$3" >{stubs.home}/applied\n'
  stubs.write("kubectl", text)
  stubs.run("gke.sh", "--image=r/i:1", "--bucket=mine", *arguments)
  return yaml.safe_load((stubs.home / "applied").read_text())["spec"]


def test_gke_asks_for_the_slice_and_runs_the_command(stubs):
  odd = ODD + " $NAME $(HF_TOKEN) & \u00e9"
  spec = jobset(
    stubs, "--slices=3", "submit", "a", "v5p:4x4x8", "--", "--config=x", odd
  )
  (slices,) = spec["replicatedJobs"]
  job = slices["template"]["spec"]
  assert slices["replicas"] == 3
  assert job["parallelism"] == job["completions"] == 32
  pod = job["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x8",
  }
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  odd = odd.replace("$(", "$$(")  # Kubernetes undoes this
  assert container["args"] == [
    "v5p", "3", "python", "-m", "flaxlm.train", "--config=x", odd,
    "--config.mesh.multihost=true",
  ]  # fmt: skip


def test_gke_starts_python_with_the_flags_as_the_first_process(stubs):
  spec = jobset(stubs, "submit", "a", "v4:2x2x4", "--", "--config=x")
  pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  show = (
    "import os, sys; print(os.getpid(), os.environ['LIBTPU_INIT_ARGS'], sys.argv[1])"
  )
  command = [*container["command"], "v4", "1", sys.executable, "-c", show, "a b"]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  printed, _ = process.communicate()
  assert printed == f"{process.pid} {flags('v4')[1]} a b\n"


def test_gke_restarts_except_for_codes_that_a_restart_cannot_mend(stubs):
  from flaxlm import supervise

  spec = jobset(stubs, "submit", "a", "v5e:4x4", "--", "--config=x")
  policy = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
  (rule,) = policy["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
  assert set(rule["onExitCodes"]["values"]) == set(supervise._FINAL)
  assert spec["failurePolicy"]["maxRestarts"] > 0
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


@pytest.mark.faults
def test_gke_passes_secrets_by_a_file(stubs):
  arguments = ["--image=r/i:1", "--bucket=mine", "submit", "a", "v5e:4x4", "--", "-c"]
  printed = stubs.run("gke.sh", *arguments, **SECRETS)
  assert not any(s in printed + str(stubs.calls()) for s in SECRETS.values())
  verbs = [call[1:3] for call in stubs.calls()]
  assert verbs == [["delete", "secret"], ["create", "secret"], ["apply", "-f"]]


@pytest.mark.parametrize(
  "hardware, xpk, hosts", [("v4:2x2x4", "v4-32", 4), ("v6e:16x16", "v6e-256", 64)]
)
def test_gke_makes_the_cluster_through_xpk(stubs, hardware, xpk, hosts):
  stubs.run("gke.sh", "--slices=2", "cluster", "c", hardware, "--spot")
  call = ["xpk", "cluster", "create", "--cluster=c", f"--tpu-type={xpk}"]
  assert stubs.calls() == [[*call, "--num-slices=2", "--spot"]]
  spec = jobset(stubs, "submit", "a", hardware, "--", "-c")
  assert spec["replicatedJobs"][0]["template"]["spec"]["parallelism"] == hosts


def test_sky_gets_names_of_secrets_and_the_arguments_arrive_whole(stubs):
  stubs.run("sky.sh", "a", "--env", "BUCKET=gs://b", "--", "--config=x", ODD, **SECRETS)
  (call,) = stubs.calls()
  assert call[:6] == ["sky", "jobs", "launch", "--name", "a", "--yes"]
  assert call[-1] == "launch/sky.yaml" and "BUCKET=gs://b" in call
  assert [call[i + 1] for i, word in enumerate(call) if word == "--secret"] == list(
    SECRETS
  )
  assert not any(secret in str(call) for secret in SECRETS.values())
  (arguments,) = [w[10:] for w in call if w.startswith("ARGUMENTS=")]
  job = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  show = 'bash() { printf "%s\\n" "$JAX_COORDINATOR_ADDRESS" "$@"; }\n'
  env = {"ARGUMENTS": arguments, "HARDWARE": "auto", "SKYPILOT_NUM_NODES": "2"}
  env |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
  script = show + job["run"].replace("exec bash", "bash")
  done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
  assert done.stdout.splitlines() == [
    "10.0.0.1:8476", "launch/host.sh", "auto", "1", "--config=x", ODD
  ]  # fmt: skip
