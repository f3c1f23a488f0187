#!/usr/bin/env bash
# The mean of activations, early and late in training: the paper's figures 2 and 4 on the checkpoints that seed 0 of
# compare_tiny.sh kept, with the loss curves as figure 5.
#
#     experiments/mean_over_training.sh [WORKDIR of compare_tiny.sh]
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/compare_tiny}

for recipe in bf16 averis; do
    .venv/bin/python -m fp4jax.analyze figures --workdir="$runs/$recipe/seed0" --tokens=8192 \
        --losses="$runs/bf16/seed0,$runs/nvfp4/seed0,$runs/averis/seed0" --out="results/mean_bias/tiny_$recipe"
done
