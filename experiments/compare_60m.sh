#!/usr/bin/env bash
# Six recipes from scratch at 63M parameters on a GPU, on the corpus of experiments/corpus.sh.
#
#     experiments/compare_60m.sh [WORKDIR]          (resumable)
#
# Declared before it was run: averis_best against nvfp4_hadamard over the seeds 0 to 4, paired by seed. The claim is that
# the loss gap to bf16 of averis_best is smaller at p < .05; the aim is half of it. Every other comparison is secondary.
# Seeds are not looked at to decide whether more are made: it is five. Their runs come first; nvfp4, averis and
# averis_centered follow with the seeds 0 to 2, as far as the time goes. The number of steps is what the time allows, by
# the speed that was measured beforehand, and is chosen before the first run.
#
# From the environment: STEPS of every run (600); CORPUS, the folder that experiments/corpus.sh made (runs/corpus); PYTHON,
# JOBS and LIMIT as experiments/compare.bash has them.
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/compare.bash
workdir=${1:-runs/compare_60m}
steps=${STEPS:-600}
corpus=${CORPUS:-runs/corpus}

compare_60m() { # FLAGS...
    compare --config=configs/qwen3_60m.py --workdir="$workdir" --primary=averis_best:nvfp4_hadamard \
        --config.steps="$steps" --config.optimizer.warmup_steps=$((steps / 10)) \
        --config.evaluation.every=$((steps / 4)) --config.data.source="$corpus/prepared" \
        --config.data.tokenizer="$corpus/tokenizer.json" --config.log.progress=False "$@"
}

all=bf16,nvfp4,nvfp4_hadamard,averis,averis_centered,averis_best
status=0
{ compare_60m --recipes=bf16,nvfp4_hadamard,averis_best --seeds=0,1,2,3,4 && compare_60m --recipes=$all --seeds=0,1,2; } || status=$?
LIMIT= compare_60m --recipes=$all --seeds=0,1,2,3,4 --only_report # what there is, in one report
exit $status
