#!/usr/bin/env bash
# Six recipes from scratch at the tiny size, five seeds, on the embedded corpus.
#
#     experiments/compare_tiny.sh [WORKDIR]          (about 6 minutes of one core a run; resumable)
#
# Declared before the first run: averis_best against nvfp4_hadamard over the seeds 0 to 4, paired by seed. The claim
# is that the loss gap to bf16 of averis_best is smaller at p < .05; the aim is half of it. Every other comparison is
# secondary. Seeds come one after the other and are not looked at to decide whether more are made: it is five.
#
# Seed 0 alone measures FP4's health and keeps all its checkpoints, for the analysis of the mean over training.
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=${1:-runs/compare_tiny}

compare() {
    .venv/bin/python -m fp4jax.compare --config=configs/averis_tiny.py --workdir="$workdir" \
        --recipes=bf16,nvfp4,nvfp4_hadamard,averis,averis_centered,averis_best --primary=averis_best:nvfp4_hadamard "$@"
}

compare --seeds=0 --config.health.every=100 --config.checkpoint.every=25 --config.checkpoint.keep=8
compare --seeds=0,1,2,3,4
