#!/usr/bin/env bash
# ARREST's table on real CIFAR-10: ResNet-18 by standard training, PGD-AT, AFT alone and ARREST, with their papers'
# recipes, then clean accuracy, PGD-20 and AutoAttack on 1,000 test images. Meant for a GPU.
#
#   bench/train_cifar10.sh DATA RUNS             everything
#   bench/train_cifar10.sh DATA RUNS 540         stop after so many seconds; the same command goes on from there
#
# DATA holds the official files; RUNS gets a folder for each run, log.txt, and at the end report.md and trade_off.png.
# PYTHON chooses the interpreter, in which fastadv, jsonargparse, docstring-parser and pyautoattack are installed;
# EVAL_IMAGES the number of test images that are attacked.
set -uo pipefail

[ $# -ge 2 ] || {
  echo "usage: $0 DATA RUNS [SECONDS]" >&2
  exit 2
}
readonly data=$1 runs=$2 python=${PYTHON:-python3} images=${EVAL_IMAGES:-1000}
readonly end=$((SECONDS + ${3:-1000000}))
mkdir -p "$runs" || exit 2

# Runs a command for as long as there is time; 0 where it came to its end.
within_time() {
  local left=$((end - SECONDS))
  [ "$left" -gt 5 ] || return 124
  echo "== $*" >>"$runs/log.txt"
  timeout --signal INT --kill-after 20 "$left" "$python" -m fastadv "$@" >>"$runs/log.txt" 2>&1
}

stop() {
  echo "$1 was not finished (status $2); $runs/log.txt tells more. The same command goes on from there." >&2
  exit "$2"
}

train() { # NAME, then the rest of the command line
  local name=$1
  shift
  [ -e "$runs/$name/trained" ] && return
  within_time train "$@" --data cifar10 --root "$data" --model resnet18 --run "$runs/$name" --resume || stop "training $name" $?
  touch "$runs/$name/trained"
}

readonly teacher=$runs/standard
train standard standard
train arrest arrest --teacher "$teacher"
train aft arrest --teacher "$teacher" --distill false --replay false
train pgd_at pgd_at

for name in standard arrest aft pgd_at; do
  [ -e "$runs/$name/judged" ] && continue
  within_time eval "$runs/$name" --eps 8/255 --attacks clean pgd-20 autoattack --max_examples "$images" ||
    stop "judging $name" $?
  touch "$runs/$name/judged"
done
"$python" -m fastadv report "$runs"/{standard,pgd_at,aft,arrest} --out "$runs"
