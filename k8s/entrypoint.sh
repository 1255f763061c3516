#!/bin/sh
# What the images can do. Arguments are the program's own:
#   train TORCHRUN_FLAGS train/main.py FLAGS | export FLAGS | score FLAGS | merge FLAGS | doctor FLAGS
set -eu
action=${1:?one of train, export, score, merge, doctor}
shift
case $action in
train)
  # A pod that replaces another has the same arguments: it goes on with the run if that has a checkpoint.
  # A run directory without one holds no epoch and would be refused: it is moved aside, not deleted.
  run=${RUNS:-/runs}/${RUN_NAME:?the name of the run}
  if [ -e "$run/checkpoints/last.pt" ]; then
    set -- "$@" --resume "$run"
  elif [ -d "$run" ]; then
    mv "$run" "$run.unfinished.$(date +%s)" || [ ! -d "$run" ] # another node's pod may have been first
  fi
  exec python -m torch.distributed.run "$@"
  ;;
export) exec python export/main.py "$@" ;;
score) exec python serve/main.py "$@" ;;
merge) exec python serve/merge.py "$@" ;;
doctor) exec python -m serve.doctor "$@" ;;
*)
  echo "error: $action is none of train, export, score, merge, doctor" >&2
  exit 2
  ;;
esac
