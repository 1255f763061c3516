#!/bin/sh
# What the images can do. Arguments are the program's own:
#   train TORCHRUN_FLAGS train/main.py FLAGS | export FLAGS | sync FLAGS | score FLAGS | merge FLAGS |
#   doctor FLAGS
set -eu
action=${1:?one of train, export, sync, score, merge, doctor}
shift
case $action in
train) exec python -m train.launch "$@" ;;
export) exec python export/main.py "$@" ;;
sync) exec python train/sync.py "$@" ;;
score) exec python serve/main.py "$@" ;;
merge) exec python serve/merge.py "$@" ;;
doctor) exec python -m serve.doctor "$@" ;;
*)
  echo "error: $action is none of train, export, sync, score, merge, doctor" >&2
  exit 2
  ;;
esac
