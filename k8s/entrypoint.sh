#!/bin/sh
# What the images can do. Arguments are the program's own:
#   train TORCHRUN_FLAGS train/main.py FLAGS | export FLAGS | score FLAGS | merge FLAGS | doctor FLAGS
set -eu
action=${1:?one of train, export, score, merge, doctor}
shift
case $action in
train)
  # A pod that replaces another has the same arguments: it goes on with the run ($RUN) if that has a checkpoint.
  # A run directory without one holds no epoch and would be refused: it is moved aside, not deleted.
  if [ -n "${RUN:-}" ] && [ -e "$RUN/checkpoints/last.pt" ]; then
    set -- "$@" --resume "$RUN"
  elif [ -n "${RUN:-}" ] && [ -d "$RUN" ]; then
    mv "$RUN" "$RUN.unfinished.$(date +%s)" || [ ! -d "$RUN" ] # another node's pod may have been first
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
