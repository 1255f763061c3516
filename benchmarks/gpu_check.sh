#!/bin/bash
# Check training, export and scoring on one GPU in at most 10 minutes, without a network and without MLflow.
#
#     benchmarks/gpu_check.sh                         # on the first GPU
#     benchmarks/gpu_check.sh --device cpu --quick    # the lines that mean something on a CPU, tiny
#     benchmarks/gpu_check.sh --lines "steps sync"    # some lines alone
#
# Each line is a process of its own (benchmarks/gpu_check.py) under a time limit. One that fails stops no
# other. The table at the end has its result or its last line of output; all output is kept in --logs.
# PYTHON chooses the interpreter. Exit code: 0, or 1 if any line failed.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
total=570
device=cuda quick='' logs='' lines=''
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift 2 ;;
    --quick) quick=--quick; shift ;;
    --logs) logs=$2; shift 2 ;;
    --lines) lines=$2; shift 2 ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
logs=${logs:-$scratch}
mkdir -p "$logs"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
unset MLFLOW_TRACKING_URI

# line:seconds; their sum is the total
all='versions:20 steps:35 nan:20 sync:30 job:80 ranks:50 raises:75 absurd:25 loader:25 cache:50 score:45 table:115'
table='| line | result | s | |\n|---|---|---|---|\n'
failed=0
for entry in $all; do
  line=${entry%:*} limit=${entry#*:}
  [ -n "$lines" ] && [[ " $lines " != *" $line "* ]] && continue
  left=$((total - SECONDS))
  [ "$device" = cpu ] && left=$((10 * limit)) && limit=$left  # processors may be few and busy
  [ "$limit" -gt "$left" ] && limit=$left
  printf '\n== %s\n' "$line"
  began=$SECONDS
  if [ "$limit" -lt 5 ]; then
    echo "no time is left" > "$logs/$line.log"; code=124
  else
    timeout -k 5 "$limit" "$python" "$root/benchmarks/gpu_check.py" "$line" --device "$device" $quick \
      --scratch "$scratch" 2>&1 | tee "$logs/$line.log"
    code=${PIPESTATUS[0]}
  fi
  last=$(grep -v '^[[:space:]]*$' "$logs/$line.log" | tail -n 1 | cut -c 1-300 | tr '|' '/')
  case $code in
    0) result=ok ;;
    77) result=skipped ;;
    124 | 137) result=FAIL last="over its $limit s; $last" ;;
    *) result=FAIL ;;
  esac
  [ $result = FAIL ] && failed=1
  table+="| $line | $result | $((SECONDS - began)) | ${last//\\/\\\\} |\n"
done
printf '\n%b' "$table"
exit $failed
