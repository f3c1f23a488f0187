#!/usr/bin/env bash
# Everything that needs a GPU, within 9 minutes on one: tests of the kernels, kernels, step, gemm.
#
#     benchmarks/gpu.sh OUT [PYTHON]
#
# Writes JSON, logs and the exit code of each part into OUT. A part that fails or runs out of time does not stop the
# others; the script's own exit code is then 1. Where the tree is a copy without its history, set FP4JAX_COMMIT.
set -u
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [PYTHON]}")
python=${2:-python3}
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # so that memory of the process is what it used
failed=0

part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS code
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - start)) s" | tee -a "$out/parts.txt"
    [ "$code" -eq 0 ] || failed=1
}

: > "$out/parts.txt"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,memory.total --format=csv > "$out/gpu.csv"
part tests 100 "$python" -m pytest -q -n 8 --maxfail=20 -m "gpu and not slow" -p no:cacheprovider tests/pallas_kernels
part kernels 170 "$python" -m benchmarks.kernels --tokens=4096,65536 --out="$out"
part step 220 "$python" -m benchmarks.step --out="$out" \
    --recipes=bf16,nvfp4@pallas,averis@pallas,nvfp4_hadamard@pallas,nvfp4,averis
part gemm 45 "$python" -m benchmarks.gemm --repeats=5 --out="$out"
exit "$failed"
