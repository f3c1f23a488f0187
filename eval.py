"""Evaluate a trained model.

    python eval.py --workdir=runs/averis_tiny [--recipe=bf16] [--batches=0]

Prints the newest checkpoint's validation loss under the given recipe and writes it to evaluation-<recipe>.json.
"""

import sys

from absl import flags

from fp4jax.training import evaluate_workdir
from fp4jax.training.command import run

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
RECIPE = flags.DEFINE_string("recipe", None, "Recipe to evaluate with; by default the one it was trained with.")
BATCHES = flags.DEFINE_integer(
    "batches", None, "Batches of validation data, 0 for the whole split; by default config.evaluation.batches."
)


def main() -> None:
    if WORKDIR.value is None:
        raise ValueError("--workdir is missing; it is the folder that train.py wrote")
    print(evaluate_workdir(WORKDIR.value, RECIPE.value, BATCHES.value))


if __name__ == "__main__":
    sys.exit(run(main))
