#!/usr/bin/env bash
# What of a recipe earns its place: one change at a time at the tiny size, paired by seed, every gap against bf16.
#
#     experiments/ablations.sh [WORKDIR]          (resumable; the bf16 runs are made here as well)
#
# centre: averis, averis_centered. Precision of the mean: averis+mean_bf16. What is split: +x_only, +d_only, neither (nvfp4).
# Stochastic rounding: +sr_all (everywhere), +nearest (nowhere). The mean's extent: +per_sequence.
# Hadamard on top: averis_centered_hadamard. Policy: first and last blocks in bf16, in a comparison of its own.
#
# From the environment: PYTHON, JOBS and LIMIT as experiments/compare.bash has them.
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/compare.bash
workdir=${1:-runs/ablations}

ablate() { # FLAGS...
    compare --config=configs/averis_tiny.py --seeds=0,1,2 --config.optimizer.learning_rate=1e-3 \
        --config.evaluation.every=50 --config.evaluation.batches=16 "$@"
}

ablate --workdir="$workdir/recipes" --recipes="bf16,nvfp4,averis,averis_centered,averis+mean_bf16,\
averis_centered+x_only,averis_centered+d_only,averis_centered+sr_all,averis_centered+nearest,\
averis_centered+per_sequence,averis_centered_hadamard"
ablate --workdir="$workdir/policy" --recipes=bf16,nvfp4,averis_centered --config.policy=nvidia
