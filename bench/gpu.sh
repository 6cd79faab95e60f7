#!/usr/bin/env bash
# Build, test, sanitize and measure fastadv on a machine with a CUDA GPU and without network.
#
#   bench/gpu.sh OUTDIR                         every stage, in nine minutes
#   bench/gpu.sh -s 215 OUTDIR build smoke      these stages, in 215 seconds
#   bench/gpu.sh -w WHEEL OUTDIR build smoke    install this wheel in place of compiling the package
#   bench/gpu.sh -r OUTDIR smoke ops            rehearse: the smallest sizes, and nothing is installed
#
# Stages: build, smoke (gpu_smoke.py: does all of it run, and the first headline), test (the tests that need a GPU),
# sanitize (compute-sanitizer's memcheck and racecheck), ops, throughput, rest (the other tests). A stage that fails
# or runs out of time does not stop the next; what was interrupted tells what it has found so far. The exit status is
# 0 where all passed. OUTDIR gets log.txt and summary.txt, to which each call adds, and the benchmarks' results. A call
# of a stage begins it anew.
#
# A GPU that is there for a quarter of an hour, of which its start takes two minutes, is well used by three calls. Each
# ends in its time, and each can be repeated:
#   bench/gpu.sh -s 215 -w WHEEL OUTDIR build smoke       expected: build 10 s, smoke 150 s, of which the checks 60 s
#   bench/gpu.sh -s 215 OUTDIR throughput                 expected: 190 s, half of them for each table
#   bench/gpu.sh -s 235 OUTDIR test sanitize ops          at most: test 101 s, memcheck 39 s, racecheck 31 s, ops 62 s,
#                                                         and what the stages before have left over
# The three calls take 665 s, and leave about two minutes to repeat a stage. The expected times are estimates from the
# stages' own limits, and no GPU has confirmed them. The time of a call includes the seconds for which an interrupted
# stage may tell what it has found, so that a call that is ended from outside after -s has lost nothing. On a machine that
# is new at the second or third call, begin the call with -w WHEEL and the stage build again.
# A machine with nvcc and the same release of torch, built for CUDA, makes the wheel, without a GPU:
#   pip wheel . --no-build-isolation --no-deps -C cmake.define.FASTADV_CUDA=ON -C cmake.define.FASTADV_CUDA_ARCHITECTURES=90
#
# The rehearsal runs on the pretended GPU of tests/gpu_rehearsal as well, which has neither Triton nor compute-sanitizer:
#   T=$PWD/tests; export PYTHONPATH=$T/gpu_rehearsal/everywhere:$T:$T/helpers PYTEST_PLUGINS=gpu_rehearsal.plugin
#   PYTHON=$PWD/.venv/bin/python PATH=$T/gpu_rehearsal/everywhere:$PATH bench/gpu.sh -r OUTDIR
#
# It expects python3 with torch for CUDA, triton, numpy, safetensors, tqdm, matplotlib, pytest, pytest-benchmark; to
# compile, scikit-build-core, nvcc, cmake and ninja; for its stage compute-sanitizer. The package is installed into
# that Python. The comparison with torchattacks and foolbox needs their wheels and those of eagerpy, GitPython, gitdb
# and smmap, each after a -w of its own; what is missing is left out by name.
set -uo pipefail

readonly grace=15 # seconds in which an interrupted stage ends in order
total=540         # seconds
wheels=()
rehearsal=false
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly repo python=${PYTHON:-python3}
export PATH=$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1

# Shares of the time; what a stage leaves over goes to those after it.
declare -A share=([build]=24 [smoke]=18 [test]=26 [memcheck]=10 [racecheck]=8 [ops]=16 [throughput]=12 [rest]=4)

# Where tests have the mark gpu. Collecting all others would take minutes.
readonly gpu_tests=(tests/ops tests/attacks/test_gpu_attacks.py tests/trainers/test_gpu_training.py)

usage() {
  echo "usage: $0 [-r] [-s SECONDS] [-w WHEEL]... OUTDIR [build] [smoke] [test] [sanitize] [ops] [throughput] [rest]" >&2
  exit 2
}

while getopts rs:w: option; do
  case $option in
    r) rehearsal=true ;;
    s) total=$OPTARG ;;
    w)
      wheel=$(realpath -e "$OPTARG") || exit 2
      wheels+=("$wheel")
      ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
readonly total wheels rehearsal
[[ $# -ge 1 && $total =~ ^[1-9][0-9]*$ ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
readonly out
shift
[ $# -gt 0 ] || set -- build smoke test sanitize ops throughput rest

stages=()
for stage in "$@"; do
  case $stage in
    build | smoke | test | ops | throughput | rest) stages+=("$stage") ;;
    sanitize) stages+=(memcheck racecheck) ;;
    *) usage ;;
  esac
done

readonly log=$out/log.txt summary=$out/summary.txt

# Tests and benchmarks run in a copy without the package's source, so that what they import is what was installed.
work=$(mktemp -d)
readonly work tested=$work/tests.xml # the report of the stage test, from which ops knows the ops that pass
trap 'rm -rf "$work"' EXIT
tar -C "$repo" --exclude=./fastadv --exclude=./build --exclude=./.git --exclude='./.venv*' -cf - . | tar -C "$work" -xf -

readonly rehearsed_tests="(first_loss and arrest) or (bits and pgd-linf)"
readonly small=(--model small_cnn --image 3x8x8 --batch 4 --steps 2 --rounds 1)
processes=$(env -u OMP_NUM_THREADS nproc) # which takes that number for the number of cores
processes=$((processes < 12 ? processes : 12))
readonly processes

has_module() { "$python" -c "import $1" 2>/dev/null; }

# Sets `command` and `directory` for a stage with a limit of $2 seconds.
prepare() {
  directory=$work
  case $1 in
    build)
      directory=$repo
      if $rehearsal; then
        command=("$python" -c 'import fastadv; print("already installed:", fastadv.__file__)')
        return
      fi
      if [ ${#wheels[@]} -gt 0 ]; then
        command=("$python" -m pip install --no-index --no-deps --force-reinstall "${wheels[@]}")
        return
      fi
      local architecture
      if ! architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())'); then
        command=(false) # the stage fails, and the log has the reason
        return
      fi
      command=("$python" -m pip install --no-index --no-build-isolation --no-deps --force-reinstall
        -C cmake.define.FASTADV_CUDA=ON -C "cmake.define.FASTADV_CUDA_ARCHITECTURES=$architecture" .)
      ;;
    test | rest)
      # One thread each: processes that share the cores would wait for one another. What misses a package at its import
      # does not keep the others from running.
      command=(env OMP_NUM_THREADS=1 "$python" -m pytest)
      if has_module xdist; then command+=(-n "$processes"); fi
      if $rehearsal; then # a few tests of each folder
        command+=(-k "$([ "$1" = test ] && echo "$rehearsed_tests" || echo test_marks)")
      else
        command+=(--thorough)
      fi
      command+=(--tb=short -rfE -p no:cacheprovider --continue-on-collection-errors)
      if [ "$1" = test ]; then
        command+=(--junitxml="$tested" -m gpu "${gpu_tests[@]}")
        return
      fi
      command+=(-m "not gpu" tests)
      if ! has_module jsonargparse; then
        local file
        while read -r file; do
          note "left out, as jsonargparse is not installed: $file"
          command+=("--ignore=$file")
        done < <(cd "$work" && grep -rl --include='*.py' -e 'fastadv\.cli' -e command_helpers tests)
      fi
      ;;
    smoke)
      command=("$python" bench/gpu_smoke.py --compile-seconds $(($2 * 4 / 10)) --out "$out")
      if $rehearsal; then command+=("${small[@]}" --triton-seconds -1); fi
      ;;
    memcheck | racecheck)
      command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9
        "$python" bench/native_kernels.py)
      ;;
    ops)
      command=("$python" bench/ops.py --device cuda --seconds $(($2 * 8 / 10)) --out "$out")
      if [ "$2" -lt 200 ]; then command+=(--quick); fi
      if [ -f "$tested" ]; then command+=(--tests "$tested"); fi
      if $rehearsal; then command+=(--rows pgd_step_/linf); fi
      ;;
    throughput)
      command=("$python" bench/throughput.py --device cuda --seconds $(($2 * 8 / 10)) --out "$out")
      if $rehearsal; then command+=("${small[@]}"); fi
      ;;
  esac
}

note() {
  echo "$*" | tee -a "$log"
}

# The line of a stage's output that says most.
essence() {
  case $1 in
    test | rest) grep -E '[0-9]+ (passed|failed|error)' ;;
    memcheck | racecheck) grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' ;;
    smoke) grep -E '^(PASS|FAIL)' ;;
    build) grep -E 'nstalled|[Ee]rror' ;;
    *) grep -vE '^$' ;;
  esac | tail -n 1 | cut -c1-120
}

run_stage() {
  local stage=$1 limit=$2 started=$SECONDS status result before output=$work/output.txt
  local -a command
  local directory
  note "== $stage, at most $limit s"
  prepare "$stage" "$limit"
  note "$ ${command[*]}"
  before=$(stat -c %s "$log")
  # Straight into the log, which then has what was found before this script was killed. In the foreground the interrupt
  # reaches the command once, not its workers too, and it can end in order.
  (cd "$directory" && timeout --foreground --signal=INT --kill-after="$grace" "$limit" "${command[@]}") >>"$log" 2>&1
  status=$?
  tail -c "+$((before + 1))" "$log" | tee "$output"
  case $status in
    0) result=passed ;;
    124 | 137)
      result="timed out"
      if [ "$stage" = test ]; then rm -f "$tested"; fi # tests that have not run are not in it
      ;;
    *) result="failed ($status)" ;;
  esac
  printf '%-11s %-12s %4d s  %s\n' "$stage" "$result" $((SECONDS - started)) "$(essence "$stage" <"$output")" \
    >>"$summary"
  return "$status"
}

"$python" - <<'PYTHON' 2>&1 | tee -a "$log" "$summary"
import platform, torch, triton
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"{name}; python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
PYTHON

passed=true
left=0
for stage in "${stages[@]}"; do left=$((left + share[$stage])); done
for stage in "${stages[@]}"; do
  limit=$(((total - grace - SECONDS) * share[$stage] / left))
  left=$((left - share[$stage]))
  # A stage that did not end in order may have taken all the time. timeout takes 0 for no limit.
  run_stage "$stage" $((limit > 1 ? limit : 1)) || passed=false
done

echo
cat "$summary"
$passed
