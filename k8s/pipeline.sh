#!/usr/bin/env bash
# Run Jobs of an overlay one after the other; stop at the first that fails.
#
#   k8s/pipeline.sh cpu sample train export score merge
#   k8s/pipeline.sh gpu train-multinode export verify score merge
#   TIMEOUT=172800 k8s/pipeline.sh path/to/your/overlay train
#
# A step that is run again starts with a new Job of the same name; training and scoring go on with what is there.
# Without steps: train export score merge, and verify before score unless that is on the CPU in float32.
# Exit codes: 0 all complete, 1 a Job failed, 2 unusable arguments, 3 a step has not ended within TIMEOUT seconds
# (default: a day).
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "error: give an overlay (cpu, gpu, kubeflow, kueue, or the path of another) and steps" >&2
  exit 2
fi
overlay=$1
shift
[ -d "$overlay" ] || overlay="$(dirname "$0")/overlays/$overlay"
if [ ! -d "$overlay" ]; then
  echo "error: $overlay is no folder" >&2
  exit 2
fi
timeout=${TIMEOUT:-86400}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

kubectl kustomize "$overlay" >"$work/all.yaml"
if [ $# -eq 0 ]; then
  # A model is scored on the provider that it was verified on; its export verifies it on the CPU in float32.
  if grep -q '^ *PROVIDER: cpu$' "$work/all.yaml" && grep -q '^ *PRECISION: fp32$' "$work/all.yaml"; then
    set -- train export score merge
  else
    set -- train export verify score merge
  fi
fi
for step in "$@"; do
  if ! grep -qx " *app.kubernetes.io/component: $step" "$work/all.yaml"; then
    echo "error: $overlay has no step $step" >&2
    exit 2
  fi
done
namespace=$(awk '$1 == "namespace:" { print $2; exit }' "$work/all.yaml")
in_namespace() { kubectl --namespace "$namespace" "$@"; }

# What has come true of a Job; both kinds end as Complete or Failed.
conditions() {
  in_namespace get "$1" --output 'jsonpath={range .status.conditions[?(@.status=="True")]}{.type}{"\n"}{end}'
}

# Until `state` says that it is complete or failed. kubectl wait knows one condition at a time: whichever comes first
# counts; what was cut off by the network is asked again.
wait_for() {
  local job=$1 deadline=$((SECONDS + timeout)) waiting condition
  while state=$(conditions "$job") || true; do
    if grep -qEx 'Complete|Failed' <<<"$state" || ((SECONDS >= deadline)); then
      return
    fi
    waiting=()
    for condition in Complete Failed; do
      # Not in_namespace: of a function in the background, kill would end the shell around kubectl.
      kubectl --namespace "$namespace" wait --for "condition=$condition" "$job" \
        --timeout "$((deadline - SECONDS))s" >/dev/null 2>&1 &
      waiting+=($!)
    done
    wait -n "${waiting[@]}" || sleep 1
    kill "${waiting[@]}" 2>/dev/null || true
    wait "${waiting[@]}" 2>/dev/null || true
  done
}

run_step() {
  local step=$1 kind=job objects queue state
  objects=$(in_namespace apply --dry-run=client --output name --filename "$work/all.yaml" \
    --selector "app.kubernetes.io/component=$step")
  if [[ $objects == *trainjob* ]]; then
    kind=trainjob
  fi
  # Jobs cannot be changed, only made again.
  in_namespace delete "$kind/$step" --ignore-not-found --cascade=foreground --wait
  in_namespace apply --filename "$work/all.yaml" --selector "app.kubernetes.io/component=$step"
  # A queue starts its Jobs itself.
  queue=$(in_namespace get "$kind/$step" --output 'jsonpath={.metadata.labels.kueue\.x-k8s\.io/queue-name}')
  if [ -z "$queue" ]; then
    in_namespace patch "$kind/$step" --type merge --patch '{"spec":{"suspend":false}}'
  fi
  wait_for "$kind/$step"
  case $state in
  *Complete*) echo "$step: complete" ;;
  *Failed*)
    echo "error: $step failed: kubectl -n $namespace describe $kind/$step" >&2
    in_namespace logs --selector "app.kubernetes.io/component=$step" --all-containers --tail 20 --prefix >&2 || true
    exit 1
    ;;
  *)
    echo "error: $step has not ended within $timeout s: kubectl -n $namespace describe $kind/$step" >&2
    exit 3
    ;;
  esac
}

# The volumes and the tracking server; the server first makes its tables.
kubectl apply --filename "$work/all.yaml" --selector app.kubernetes.io/component=platform
in_namespace rollout status deployment/mlflow --timeout 10m
for step in "$@"; do
  run_step "$step"
done
