#!/usr/bin/env bash
# Everything that needs a GPU, within 9 minutes on one: tests of kernels and products, kernels, step, gemm.
#
#     benchmarks/gpu.sh OUT [PYTHON]
#
# Writes JSON, logs and the exit code of each part into OUT. A part that fails or runs out of time does not stop the
# others; the script's own exit code is then 1. Without a GPU it ends at once. Where the tree is a copy without its
# history, set FP4JAX_COMMIT.
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

# Limits add up to 515 s, with the time that a part has to die (--kill-after): tests/benchmarks/test_gpu_script.py.
: > "$out/parts.txt"
timeout -s KILL 5 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,memory.total --format=csv \
    > "$out/gpu.csv"
part device 20 "$python" -m benchmarks.device
[ "$failed" -eq 0 ] || exit 1
part tests 80 "$python" -m pytest -q -n 8 --maxfail=20 -m "gpu and not slow" -p no:cacheprovider tests/pallas_kernels
# What is slow of these is so in the interpreter alone.
part products 40 "$python" -m pytest -q -n 4 -m gpu -p no:cacheprovider tests/test_fused.py tests/test_native.py
part kernels 95 "$python" -m benchmarks.kernels --repeats=5 --out="$out" \
    --shapes=65536x3072,64x10240x2048,1024x3072,64x2048x1024
# Traced in this order, compiled side by side: what takes longest comes first. Times are taken in another one.
part step 205 "$python" -m benchmarks.step --repeats=5 --out="$out" \
    --recipes=averis@pallas/fused,nvfp4@pallas/fused,bf16,nvfp4_hadamard@pallas,averis@pallas,nvfp4@pallas
part gemm 40 "$python" -m benchmarks.gemm --weights=1024x3072,64x2048x1024 --repeats=5 --out="$out"
exit "$failed"
