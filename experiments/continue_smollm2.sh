#!/usr/bin/env bash
# SmolLM2-135M trained further from its published weights under the recipes: real weights, real mean bias.
#
#     make models && experiments/continue_smollm2.sh [WORKDIR [FLAGS of fp4jax.compare]]          (resumable)
#
# 512 tokens a step, so that 2 CPU cores can do it; the learning rate is reached after 10 steps. With a GPU:
# experiments/continue_smollm2.sh runs/smollm2_gpu --config.batch_size=16 --config.seq_len=512 --seeds=0,1,2
#
# From the environment: GGUF, the weights as a file, where their package is not installed (smollm2-135m); PYTHON, JOBS and
# LIMIT as experiments/compare.bash has them.
set -euo pipefail
cd "$(dirname "$0")/.."
source experiments/compare.bash
workdir=${1:-runs/continue_smollm2}
weights=${GGUF:-smollm2-135m}

compare --config=configs/smollm2_135m.py --workdir="$workdir" --seeds=0 \
    --config.init_from="$weights" --config.data.tokenizer="$weights" \
    --recipes=bf16,nvfp4,nvfp4_hadamard,averis,averis_centered,averis_best \
    --config.steps=200 --config.batch_size=2 --config.seq_len=256 --config.optimizer.warmup_steps=10 \
    --config.optimizer.learning_rate=3e-5 --config.evaluation.every=50 --config.evaluation.batches=16 \
    --config.checkpoint.every=100 --config.checkpoint.keep=1 "${@:2}"
