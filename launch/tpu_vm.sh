#!/usr/bin/env bash
# Train on a Cloud TPU: create it, copy this clone, install, run on all hosts, supervise.
#   bash launch/tpu_vm.sh [OPTIONS] ACTION NAME ZONE TYPE [TRAINING ARGUMENTS]
#   bash launch/tpu_vm.sh --spot --bucket=mine resume a us-east5-a v5p-128 \
#     --config=configs/llama3_8b.py --workdir=bucket/runs/a
# Actions: create  copy  install  run  logs  state  stop  delete, and resume, which does
#   what is needed until the run ends, again after every preemption.
# Options: --print  show the commands, run none     --spot      cheaper, may be preempted
#          --now    a TPU VM without the queue      --slices=N  joined by the slow network
#          --bucket=B  mount it as ~/bucket on every host: --workdir must outlive the machine
# Exit codes: the run's (75: stopped, run it again); 2: a wrong argument.
# shellcheck disable=SC2016 # the other machine expands what is in single quotes
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
spot='' now='' slices=1 bucket=''
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --print) printing=1 ;;
    --spot) spot=--spot ;;
    --now) now=1 ;;
    --slices=*) slices="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    *) refuse "unknown option $1; the options are listed at the top of launch/tpu_vm.sh" ;;
  esac
  shift
done
[ $# -ge 4 ] || refuse "needed: ACTION NAME ZONE TYPE; see the top of launch/tpu_vm.sh"
action="$1" name="$2" zone="$3" type="$4"
shift 4
need NAME "$name" '[a-z]([a-z0-9-]{0,40}[a-z0-9])?'
need ZONE "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]'
need TYPE "$type" 'v[0-9]+[a-z]*-[0-9]+'
need --slices "$slices" '[1-9][0-9]{0,3}'
[ -z "$bucket" ] || need --bucket "$bucket" '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]'
case "$type" in # versions: cloud.google.com/tpu/docs/runtimes
  v4-*) hardware=v4 version=tpu-ubuntu2204-base ;;
  v5litepod-*) hardware=v5e version=v2-alpha-tpuv5-lite ;;
  v5p-*) hardware=v5p version=v2-alpha-tpuv5 ;;
  v6e-*) hardware=v6e version=v2-alpha-tpuv6e ;;
  *) refuse "TYPE cannot be used: given '$type', needed v4-N v5litepod-N v5p-N v6e-N" ;;
esac
tpu=(gcloud compute tpus)
if [ "$slices" = 1 ]; then # a queued TPU VM has the name of its request
  hosts=(tpu-vm) which=(--zone="$zone" --worker=all) first=(--zone="$zone" --worker=0)
else
  [ -z "$now" ] || refuse "--now makes one slice; several must be queued"
  hosts=(queued-resources) which=(--zone="$zone" --node=all --worker=all)
  first=(--zone="$zone" --node=0 --worker=0)
fi

create() {
  if [ -n "$now" ]; then
    run "${tpu[@]}" tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" \
      --version="$version" ${spot:+"$spot"}
  else
    local nodes=(--node-id="$name")
    [ "$slices" = 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
    run "${tpu[@]}" queued-resources create "$name" --zone="$zone" "${nodes[@]}" \
      --accelerator-type="$type" --runtime-version="$version" ${spot:+"$spot"}
  fi
}
delete() {
  if [ -n "$now" ]; then
    run "${tpu[@]}" tpu-vm delete "$name" --zone="$zone" --quiet
  else
    run "${tpu[@]}" queued-resources delete "$name" --zone="$zone" --force --quiet
  fi
}
state() { # READY or ACTIVE when usable; empty when there is no such TPU
  if [ -n "$now" ]; then
    run "${tpu[@]}" tpu-vm describe "$name" --zone="$zone" --format='value(state)'
  else
    run "${tpu[@]}" queued-resources describe "$name" --zone="$zone" --format='value(state.state)'
  fi
}
on_all() { run "${tpu[@]}" "${hosts[@]}" ssh "$name" "${which[@]}" --command="$1"; }
on_first() { run "${tpu[@]}" "${hosts[@]}" ssh "$name" "${first[@]}" --command="$1"; }
to_all() { run "${tpu[@]}" "${hosts[@]}" scp "$1" "$name:$2" "${which[@]}"; }

copy() { # tracked files, and secrets in a file, because process lists show arguments
  local draft=PRIVATE_DIRECTORY
  [ -n "$printing" ] || draft="$(mktemp -d)"
  run bash -c "git ls-files -z | tar --null --files-from=- -czf $draft/flaxlm.tgz"
  to_all "$draft/flaxlm.tgz" flaxlm.tgz
  on_all 'mkdir -p flaxlm/runs && tar -xzf flaxlm.tgz -C flaxlm'
  if has_secrets; then
    [ -n "$printing" ] || write_secrets "$draft/secrets"
    to_all "$draft/secrets" flaxlm/runs/.secrets # scp keeps its mode, 600
  fi
  run rm -r "$draft"
}
install() { # Ubuntu 22.04 has Python 3.10
  local python='command -v python3.11 || (sudo apt-get -q update && sudo apt-get -qy install python3.11-venv)'
  on_all "cd flaxlm && ($python) && source launch/environment.sh && pip install --quiet -e '.[tpu]'"
  [ -z "$bucket" ] || on_all "cd flaxlm && mkdir -p bucket && (mountpoint -q bucket || gcsfuse --implicit-dirs $bucket bucket)"
}
start() { # detached: it continues when this connection ends
  local command
  command="bash launch/host.sh $hardware $slices $(quote "$@") --config.mesh.multihost=true"
  on_all "cd flaxlm && (nohup setsid $command >>runs/host.log 2>&1 </dev/null &)"
}
status() { # of the run: its exit code, or running, or none
  on_first 'cd flaxlm && { [ "$(cat runs/host.status)" != running ] || kill -0 "$(cat runs/host.pid)"; } && cat runs/host.status || echo none'
}
resume() {
  local found ended seen=
  while true; do
    if ! found="$(state 2>&1)" && [[ "$found" == *NOT_FOUND* ]]; then
      found=ABSENT
    fi
    case "$found" in
      READY | ACTIVE)
        ended="$(status 2>/dev/null | tail -n 1)" || ended=unreachable
        if [[ "$ended" =~ ^[0-9]+$ ]]; then
          if [ "$ended" = 0 ] || [ -n "$seen" ]; then
            echo "flaxlm: exit code $ended; $name costs money until it is deleted" >&2
            exit "$ended"
          fi
          ended=none # an earlier run stopped here; continue it
        fi
        if [ "$ended" = none ]; then
          copy
          install
          start "$@"
        fi
        [ "$ended" = unreachable ] || seen=1
        ;;
      ABSENT) create ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED | STOPPED)
        echo "flaxlm: $name is $found; creating it again" >&2
        delete
        create
        ;;
      *) ;; # queued, being created or deleted, or the network is down: ask again
    esac
    sleep "${POLL_SECONDS:-60}"
  done
}

case "$action" in
  create | copy | install | state | delete) "$action" ;;
  run) start "$@" ;;
  logs) on_first 'tail -n 100 -F flaxlm/runs/host.log' ;;
  stop) on_all 'kill -TERM "$(cat flaxlm/runs/host.pid)"' ;;
  resume)
    if [ -n "$printing" ]; then
      echo "# repeated until the run ends; the first three only for a preempted TPU"
      state && delete && create && copy && install && start "$@" && status
    else
      resume "$@"
    fi
    ;;
  *) refuse "unknown action $action; the actions are listed at the top of launch/tpu_vm.sh" ;;
esac
