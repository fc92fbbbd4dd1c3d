#!/usr/bin/env bash
# Train on TPUs of Google Kubernetes Engine; the job is launch/gke_jobset.yaml.
#   bash launch/gke.sh [--print] cluster NAME HARDWARE [XPK OPTIONS]    # once; through xpk
#   bash launch/gke.sh [--print] [OPTIONS] submit NAME HARDWARE -- TRAINING ARGUMENTS
#   bash launch/gke.sh [--print] logs|delete NAME
# HARDWARE is named as for plan: v4:4x4x4  v5e:16x16  v5p:4x4x4  v6e:16x16.
# Options: --image=IMAGE (launch/Dockerfile)  --bucket=B (mounted as bucket/)  --slices=N
#          --account=A (Kubernetes service account that may use the bucket)
# shellcheck disable=SC2016 # Kubernetes expands what is in single quotes
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
slices=1 image='' bucket='' account=default
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --print) printing=1 ;;
    --slices=*) slices="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --account=*) account="${1#*=}" ;;
    *) refuse "unknown option $1; the options are listed at the top of launch/gke.sh" ;;
  esac
  shift
done
[ $# -ge 2 ] || refuse "needed: ACTION NAME; see the top of launch/gke.sh"
action="$1" name="$2" hardware="${3:-}"
need NAME "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
need --slices "$slices" '[1-9][0-9]{0,3}'

shape() { # sets what HARDWARE implies; each host has 4 chips if the slice has 4 or more
  need HARDWARE "$hardware" '(v4|v5e|v5p|v6e):[0-9]+x[0-9]+(x[0-9]+)?'
  topology="${hardware#*:}" hardware="${hardware%:*}"
  total=$((${topology//x/*})) chips=4
  [ "$total" -ge 4 ] || chips="$total"
  hosts=$((total / chips))
  case "$hardware" in # xpk counts cores for v4 and v5p, two per chip
    v4) accelerator=tpu-v4-podslice type="v4-$((2 * total))" ;;
    v5e) accelerator=tpu-v5-lite-podslice type="v5litepod-$total" ;;
    v5p) accelerator=tpu-v5p-slice type="v5p-$((2 * total))" ;;
    v6e) accelerator=tpu-v6e-slice type="v6e-$total" ;;
  esac
}
filled() { # prints the filled-in YAML
  local yaml arguments
  yaml="$(<launch/gke_jobset.yaml)"
  arguments="$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \
    "$hardware" "$slices" python -m flaxlm.train "$@" --config.mesh.multihost=true)"
  arguments=${arguments//'$('/'$$('} # otherwise Kubernetes would look for a variable
  yaml=${yaml//'$NAME'/"$name"} yaml=${yaml//'$SLICES'/"$slices"}
  yaml=${yaml//'$HOSTS'/"$hosts"} yaml=${yaml//'$CHIPS'/"$chips"}
  yaml=${yaml//'$ACCELERATOR'/"$accelerator"} yaml=${yaml//'$TOPOLOGY'/"$topology"}
  yaml=${yaml//'$ACCOUNT'/"$account"} yaml=${yaml//'$IMAGE'/"$image"}
  yaml=${yaml//'$BUCKET'/"$bucket"} yaml=${yaml//'$ARGUMENTS'/"$arguments"}
  hide "$yaml"
}
submit() {
  need --image "$image" '[a-z0-9][a-zA-Z0-9._/@:-]+'
  need --bucket "$bucket" '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]'
  need --account "$account" '[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?'
  local draft=PRIVATE_DIRECTORY
  [ -n "$printing" ] || draft="$(mktemp -d)"
  if has_secrets; then # in a file, because process lists show arguments
    [ -n "$printing" ] || write_secrets "$draft/secrets"
    run kubectl delete secret "$name-secrets" --ignore-not-found
    run kubectl create secret generic "$name-secrets" --from-env-file="$draft/secrets"
  fi
  if [ -n "$printing" ]; then
    echo "# $draft/jobset.yaml:"
    filled "$@"
  else
    filled "$@" >"$draft/jobset.yaml"
  fi
  run kubectl apply -f "$draft/jobset.yaml"
  run rm -r "$draft"
}

case "$action" in
  cluster)
    shape
    run xpk cluster create --cluster="$name" --tpu-type="$type" --num-slices="$slices" "${@:4}"
    ;;
  submit)
    shape
    [ "${4:-}" = -- ] || refuse "needed: -- and the training arguments, after HARDWARE"
    submit "${@:5}"
    ;;
  logs)
    run kubectl logs --follow --tail=100 --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0" --container=train
    ;;
  delete)
    run kubectl delete jobset "$name"
    run kubectl delete secret "$name-secrets" --ignore-not-found
    ;;
  *) refuse "unknown action $action; the actions are listed at the top of launch/gke.sh" ;;
esac
