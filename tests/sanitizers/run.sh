#!/usr/bin/env bash
# Builds the CPU kernels with sanitizers, in a build folder of their own, and runs what calls them.
# usage: tests/sanitizers/run.sh address|thread|emulate [arguments of pytest, instead of those below]
# `emulate` is a build without a sanitizer that carries out the instructions of AVX512-BF16 and AMX by
# plain AVX-512 (tests/cpu_emulator/), so that the kernels in bfloat16 run on processors without them. So
# does `address`: a sanitizer sees no memory that the instructions for tiles read.
# PYTHON names an interpreter with torch, pytest and the build tools (default .venv/bin/python); JOBS the compilers
# that run at a time. Ends with an error at the first report.
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=${1:?address, thread or emulate}
shift
python=${PYTHON:-.venv/bin/python}
build=build/sanitize-$kind
sanitizer=$kind emulate=OFF preload=

runtime() { "${CXX:-g++}" -print-file-name="$1"; }

case $kind in
emulate)
  sanitizer=OFF emulate=ON
  ;;
address)
  emulate=ON
  # libstdc++ comes along because torch throws through it: without it the first exception ends the process.
  preload="$(runtime libasan.so) $(runtime libstdc++.so)"
  ;;
thread)
  preload="$(runtime libtsan.so)"
  ;;
*)
  echo "the first argument must be address, thread or emulate, got $kind" >&2
  exit 2
  ;;
esac

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DFASTADV_CUDA=OFF \
  -DFASTADV_SANITIZE="$sanitizer" -DFASTADV_EMULATE="$emulate" \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" > /dev/null
cmake --build "$build" -j "${JOBS:-2}"
options=(--native-library "$(echo "$PWD/$build"/libfastadv_torch*.so)")
if [ "$emulate" = ON ]; then options+=(--emulated); fi

export LD_PRELOAD=$preload PYTHONPATH=$PWD:$PWD/tests:$PWD/tests/helpers PYTHONDONTWRITEBYTECODE=1
# Leaks are not looked for: Python and torch keep much until the process ends. Without halt_on_error undefined
# behaviour is reported and the exit status stays 0.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=suppressions=$PWD/tests/sanitizers/thread.supp:halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1

case $kind in
address)
  # The files that call the kernels, each of csrc/cpu/ at least once.
  tests=(--thorough tests/ops/test_ops.py tests/ops/test_angular_distance.py tests/ops/test_attention_map_distance.py
    tests/ops/test_crop_flip.py tests/ops/test_euclidean_distance.py tests/ops/test_linear_merger.py
    tests/ops/test_momentum_update.py tests/ops/test_noisy_replay.py tests/ops/test_pgd_step.py
    tests/ops/test_pgd_step_l1.py tests/ops/test_pgd_step_per_channel.py tests/ops/test_random_start.py
    tests/ops/test_softmax_losses.py tests/ops/test_vanilla_feature_distillation.py
    tests/engine/test_convolution.py tests/engine/test_float_convolution.py tests/engine/test_float_gathering.py
    tests/engine/test_float_program.py tests/engine/test_program.py tests/engine/test_tile_convolution.py
    tests/engine/test_cpu_training.py tests/engine/test_channels.py tests/engine/test_float_channels.py tests/engine/test_cached_recording.py
    tests/attacks/test_apgd_advance.py tests/attacks/test_attack_l1.py tests/attacks/test_projections.py
    tests/attacks/test_square_points.py tests/data/test_loader.py tests/fuzz/test_fuzz.py
    -m "not compiles")
  ;;
thread)
  tests=(tests/sanitizers/threads.py)
  ;;
emulate)
  tests=(tests/engine tests/fuzz/test_fuzz.py -m "not compiles and not processes")
  ;;
esac
[ $# -gt 0 ] && tests=("$@")
exec "$python" -m pytest -p sanitizers.plugin "${options[@]}" -p no:cacheprovider -s -x "${tests[@]}"
