#!/usr/bin/env bash
# The mean of activations, early and late in training: the paper's figures 2 and 4 on the checkpoints of a bf16 and an
# averis run at the tiny size (compare_tiny.sh's configuration, seed 0), with the loss curves as figure 5.
#
#     experiments/mean_over_training.sh [WORKDIR]          (resumable)
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/mean_over_training}

for recipe in bf16 averis; do
    .venv/bin/python train.py --config=configs/averis_tiny.py --config.recipe=$recipe --workdir="$runs/$recipe" \
        --config.optimizer.learning_rate=1e-3 --config.checkpoint.every=25 --config.checkpoint.keep=8
done
for recipe in bf16 averis; do
    .venv/bin/python -m fp4jax.analyze figures --workdir="$runs/$recipe" --tokens=8192 \
        --losses="$runs/bf16,$runs/averis" --out="results/mean_bias/tiny_$recipe"
done
