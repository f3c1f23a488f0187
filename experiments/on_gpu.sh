#!/usr/bin/env bash
# The experiments that want a GPU, one part a call, for a machine that is rented by the minute and then forgotten.
#
#     experiments/on_gpu.sh PART OUT [FLAGS]
#
# PART      smoke       what the machine has, the speed of the 63M model alone and several at a time, a tiny comparison
#           60m         experiments/compare_60m.sh
#           ablations   experiments/ablations.sh
#           smollm2     experiments/continue_smollm2.sh
# OUT       gets PART.tar.gz: reports, configurations, metrics, logs; no checkpoints. It is written anew every 20 seconds.
# FLAGS     of fp4jax.compare, for smollm2 alone
#
# From the environment: PYTHON, CORPUS, JOBS, STEPS, LIMIT, GGUF as in those scripts; WORK, the folder of the runs, by
# default one in memory (/dev/shm/fp4jax), because what is saved there is never read again. Programs are compiled once
# for all runs of a call and of the next one on the same machine (FP4JAX_CACHE, /var/tmp/fp4jax).
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/compare.bash
part=$1 out=$2 work=${WORK:-/dev/shm/fp4jax}/$1
export PYTHON=${PYTHON:-.venv/bin/python} FP4JAX_CACHE=${FP4JAX_CACHE:-/var/tmp/fp4jax}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
mkdir -p "$work" "$out"

share_memory() { # JOBS: an equal part of the device for each
    XLA_PYTHON_CLIENT_MEM_FRACTION=$(awk "BEGIN { print 0.9 / $1 }")
    export XLA_PYTHON_CLIENT_MEM_FRACTION
}

collect() {
    local new=$out/.$part.$BASHPID
    # A log may grow while it is read, which tar calls a failure; the next round has the rest of it.
    tar -czf "$new" -C "$work" --exclude=checkpoints --exclude=tensorboard --exclude='*lock' . 2>/dev/null || true
    mv "$new" "$out/$part.tar.gz"
}

smoke() {
    { nvidia-smi; nproc; "$PYTHON" -m pip list; } >"$work/machine.txt" 2>&1 || true
    local steps=${STEPS:-30} jobs
    compare_60m() { # NAME JOBS FLAGS...
        share_memory "$2"
        JOBS=$2 compare --config=configs/qwen3_60m.py --workdir="$work/$1" "${@:3}" \
            --config.steps="$steps" --config.optimizer.warmup_steps=3 --config.evaluation.batches=2 \
            --config.data.source="${CORPUS:-runs/corpus}/prepared" \
            --config.data.tokenizer="${CORPUS:-runs/corpus}/tokenizer.json" --config.log.progress=False
    }
    local failed=0
    compare_60m first 2 --recipes=bf16,averis_best --seeds=0 || failed=1        # compiles, both at a time
    compare_60m alone 1 --recipes=bf16,averis_best --seeds=1 || failed=1        # from the cache: the speed of one
    for jobs in ${TRY_JOBS:-3}; do
        compare_60m "beside_$jobs" "$jobs" --recipes=averis_best,bf16 --seeds="$(seq -s, 2 $((jobs + 1)))" || failed=1
    done
    share_memory 4
    JOBS=4 compare --config=configs/averis_tiny.py --workdir="$work/tiny" --recipes=nvfp4,averis --baseline=nvfp4 \
        --seeds=0,1 --config.steps=20 || failed=1
    speeds "$work"/*/*/seed*/summary.json
    return $failed
}

speeds() { # SUMMARIES of runs. first: the first step, which compiles; other: start, data, validation, saving
    "$PYTHON" - "$@" <<'END'
import json, pathlib, sys

print(f"{'run':40} {'seconds':>8} {'first':>6} {'other':>6} {'ms/step':>8} {'tokens/s':>9} {'GB':>5} {'loss':>7}")
for folder in (pathlib.Path(summary).parent for summary in sys.argv[1:]):
    summary = json.loads((folder / "summary.json").read_bytes())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["longest_step_seconds"], lines[-1]
    step = last["tokens"] / last["tokens_per_second"]
    other = summary["seconds"] - first - step * (last["step"] - 1)
    print(f"{'/'.join(folder.parts[-3:]):40} {summary['seconds']:8.1f} {first:6.1f} {other:6.1f} {1e3 * step:8.1f} "
          f"{last['tokens_per_second']:9.0f} {summary['peak_memory_bytes'] / 1e9:5.1f} {last['loss']:7.3f}")
END
}

(while sleep 20; do collect; done) &
collector=$!
trap 'kill $collector 2>/dev/null; collect; rm -f "$out/.$part".*' EXIT
share_memory "${JOBS:-1}"
case $part in
    smoke) smoke ;;
    60m) experiments/compare_60m.sh "$work" ;;
    ablations) experiments/ablations.sh "$work" ;;
    smollm2) experiments/continue_smollm2.sh "$work" "${@:3}" ;;
    *) echo "unknown part $part: smoke, 60m, ablations or smollm2" >&2; exit 2 ;;
esac
