#!/usr/bin/env bash
# What needs a GPU, in calls of at most 9 minutes: bench/gpu.sh [FOLDER] CALL...; bench/README.md says which, in order.
#
# A CALL is build, smoke, tests, sanitizer, or benchmarks: a group, or GROUP/CASE with wildcards. Each step has a time limit, which is no more
# than what is left of the 9 minutes; a failing one does not stop the next. Rows, gpu.log and summary.txt lie in FOLDER ($OUT by default)
# as soon as they are made, so a call that is cut keeps them. The status is 1 if a step failed or found no time.
#
# PYTHON names the interpreter (python3), which needs torch, pytest and safetensors; the groups step and prm also need h5py. BENCH_COMMIT names
# the commit of sources that came without their .git.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=540
unset TRITON_INTERPRET TTCFAST_BACKEND
export PYTHONUNBUFFERED=1

refuse() {
    echo "gpu.sh: $*" >&2
    exit 2
}

main() {
    local call
    folder=${OUT:-}
    if [[ -n ${1:-} ]] && ! known "$1"; then
        folder=$1
        shift
    fi
    [[ -n $folder ]] || refuse "give a folder for the results: bench/gpu.sh FOLDER CALL..., or set OUT"
    (($#)) || refuse "give a call: build, smoke, tests, sanitizer, or a group of benchmarks; bench/README.md has their order"
    for call in "$@"; do
        known "$call" || refuse "no call '$call'; known: build, smoke, tests, sanitizer,$(printf ' %s' bench/bench_*.py | sed 's|bench/bench_||g; s|\.py||g')"
    done

    nvidia-smi -L >/dev/null 2>&1 || refuse "no NVIDIA GPU here (nvidia-smi -L fails); run it on a machine that has one"
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
        refuse "'$PYTHON' has no torch that sees the GPU; name one that has: PYTHON=/path/to/python bench/gpu.sh ..."
    mkdir -p "$folder" || refuse "cannot make the folder $folder"
    folder=$(cd "$folder" && pwd)
    machine >>"$folder/gpu.log" 2>&1

    steps=0 failed=0
    for call in "$@"; do
        case $call in
        build | smoke | tests | sanitizer) "$call" ;;
        *) benchmarks "$call" ;;
        esac
    done
    say "$(printf '=== %d of %d steps failed, %d s in all' "$failed" "$steps" "$SECONDS")"
    ((failed == 0))
}

known() {
    [[ $1 =~ ^(build|smoke|tests|sanitizer)$ || -f bench/bench_${1%%/*}.py ]]
}

say() {
    echo "$1" | tee -a "$folder/summary.txt" "$folder/gpu.log"
}

step() { # step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, note how it ended, go on whatever happened
    local name=$1 limit=$2 start=$SECONDS status verdict
    shift 2
    ((limit > SECONDS_IN_ALL - SECONDS)) && limit=$((SECONDS_IN_ALL - SECONDS))
    steps=$((steps + 1)) status=124 verdict="NOT RUN: the call's $SECONDS_IN_ALL s are over"
    if ((limit > 0)); then
        printf '\n=== %s\n' "$name" | tee -a "$folder/gpu.log"
        timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$folder/gpu.log" | tail -n 60
        status=${PIPESTATUS[0]}
        case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED: stopped after its $limit s" ;;
        *) verdict="FAILED: status $status" ;;
        esac
    fi
    ((status)) && failed=$((failed + 1))
    say "$(printf '%5d s  %-24s %s' $((SECONDS - start)) "$name" "$verdict")"
}

machine() {
    date
    nvidia-smi
    "$PYTHON" -m pip list 2>/dev/null
    git rev-parse HEAD 2>/dev/null || echo "no .git here; BENCH_COMMIT is '${BENCH_COMMIT:-}'"
}

build() {
    step build 240 bash bench/gpu.sh --build
}

build_extension() {
    local python
    python=$("$PYTHON" -c 'import sys; print(sys.executable)')
    cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DTTCFAST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native \
        -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/ttcfast" &&
        cmake --build build/gpu --parallel &&
        "$PYTHON" -c 'import ttcfast; print(ttcfast.info())'
}

smoke() {
    step smoke 120 "$PYTHON" -m bench.smoke
}

tests() {
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
    step tests 400 "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" -m "gpu or not slow" \
        --require-backends=reference,cpu,cuda,triton --durations=10 tests/ops tests/bench tests/test_integrators.py
}

sanitizer() {
    local tool check
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [[ -z $tool ]]; then
        say "$(printf '         %-24s %s' sanitizer "NOT RUN: compute-sanitizer is not installed")"
        return
    fi
    # torch's caching allocator would hide a kernel that leaves its tensor for the neighbouring one.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # The shapes take a warp, a block and several blocks per row; racecheck sees the kernels' shared memory.
    for check in memcheck racecheck; do
        step "$check-topk" 60 "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" -m bench.topk_small
        step "$check-gates" 100 "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" -m bench all --gates --device cuda
    done
    step memcheck-tests 120 "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops \
        -m "not slow" -k "triton and (agrees or sizes or hard)"
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

benchmarks() { # benchmarks GROUP[/CASE]: a part has a folder of its own, since its rows would take the place of the whole group's
    local place=$folder pattern='*'
    [[ $1 == */* ]] && pattern=${1#*/} place=$folder/${1//[^[:alnum:]_-]/_}
    step "$1" 500 "$PYTHON" -m bench "${1%%/*}" --device cuda --untuned --rounds 5 --case "$pattern" --out "$place"
}

# `timeout` starts commands, not functions: it starts this file again.
if [[ ${1:-} == --build ]]; then
    build_extension
    exit
fi
main "$@"
