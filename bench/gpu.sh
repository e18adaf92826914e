#!/usr/bin/env bash
# Everything that needs a GPU, within 20 minutes: bench/gpu.sh [FOLDER] [build|tests|sanitizer|bench]...
#
# Builds with CUDA, runs the tests of the operations on the GPU, compute-sanitizer (where it is installed) on small shapes, and the benches
# of all groups. Each stage has a time limit; a failing one does not stop the next. Logs, CSV files and summary.txt go to FOLDER. Without
# FOLDER they go to $OUT as two files, summary.txt and gpu.tar.gz, renewed after every stage. The status is 1 if any stage failed.
#
# PYTHON names the interpreter (python3). BENCH_COMMIT names the commit of sources that came without their .git.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
STAGES=(build tests sanitizer bench)
unset TRITON_INTERPRET TTCFAST_BACKEND
export PYTHONUNBUFFERED=1

refuse() {
    echo "gpu.sh: $*" >&2
    exit 2
}

main() {
    local deliver="" stage
    case "${1:-}" in
    "" | build | tests | sanitizer | bench)
        [[ -n ${OUT:-} ]] || refuse "give a folder for the results: bench/gpu.sh FOLDER [stage]..., or set OUT"
        deliver=$OUT
        ;;
    *)
        work=$1
        shift
        ;;
    esac
    for stage in "$@"; do
        [[ " ${STAGES[*]} " == *" $stage "* ]] || refuse "no stage '$stage'; known: ${STAGES[*]}"
    done
    (($#)) && STAGES=("$@")

    nvidia-smi -L >/dev/null 2>&1 || refuse "no NVIDIA GPU here (nvidia-smi -L fails); run it on a machine that has one"
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
        refuse "'$PYTHON' has no torch that sees the GPU; name one that has: PYTHON=/path/to/python bench/gpu.sh ..."

    [[ -n $deliver ]] && work=$(mktemp -d)
    mkdir -p "$work" || refuse "cannot make the folder $work"
    work=$(cd "$work" && pwd)
    : >"$work/summary.txt"
    machine >"$work/machine.log" 2>&1

    failed=0
    for stage in "${STAGES[@]}"; do
        "$stage"
        [[ -n $deliver ]] && hand_over "$deliver"
    done
    printf '\n=== %d of %d steps failed, %d s in all\n' "$failed" "$(wc -l <"$work/summary.txt")" "$SECONDS" | tee -a "$work/summary.txt"
    [[ -n $deliver ]] && hand_over "$deliver"
    cat "$work/summary.txt"
    ((failed == 0))
}

step() { # step NAME LIMIT COMMAND...: run it for at most LIMIT seconds into NAME.log, note how it ended, go on whatever happened
    local name=$1 limit=$2 start=$SECONDS status verdict
    shift 2
    printf '\n=== %s\n' "$name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$work/$name.log" | tail -n 60
    status=${PIPESTATUS[0]}
    case $status in
    0) verdict=passed ;;
    124 | 137) verdict="FAILED: stopped after its $limit s" ;;
    *) verdict="FAILED: status $status" ;;
    esac
    ((status)) && failed=$((failed + 1))
    printf '%5d s  %-24s %s\n' $((SECONDS - start)) "$name" "$verdict" | tee -a "$work/summary.txt"
}

machine() {
    nvidia-smi
    "$PYTHON" -m pip list 2>/dev/null
    git rev-parse HEAD 2>/dev/null || echo "no .git here; BENCH_COMMIT is '${BENCH_COMMIT:-}'"
}

hand_over() { # the device machine brings back few files, so all but the summary travel in one
    cp "$work/summary.txt" "$1/summary.txt"
    tar -czf "$1/gpu.tar.gz" -C "$work" .
}

build() {
    step build 200 bash bench/gpu.sh --call build_extension
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

tests() {
    step tests 280 "$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu or not slow" --require-backends=reference,cpu,cuda,triton \
        --durations=10 tests/ops tests/bench
}

sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [[ -z $tool ]]; then
        printf '        %-24s %s\n' sanitizer "NOT RUN: compute-sanitizer is not installed" | tee -a "$work/summary.txt"
        return
    fi
    # torch's caching allocator would hide a kernel that leaves its tensor for the neighbouring one.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    step memcheck-gates 80 "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" -m bench all --gates --device cuda
    step memcheck-tests 120 "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops \
        -m "not slow" -k "triton and (agrees or sizes or hard)"
    # The shapes take a warp, a block and several blocks per row; racecheck sees the kernels' shared memory.
    step memcheck-topk 100 "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" -m bench.topk_small
    step racecheck-topk 100 "$tool" --tool racecheck --error-exitcode 9 "$PYTHON" -m bench.topk_small
    step racecheck-gates 80 "$tool" --tool racecheck --error-exitcode 9 "$PYTHON" -m bench all --gates --device cuda
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
    step bench 440 "$PYTHON" -m bench all --device cuda --out "$work/results"
}

# `timeout` starts commands, not functions: it starts this file again with the function's name.
if [[ ${1:-} == --call ]]; then
    "$2"
    exit
fi
main "$@"
