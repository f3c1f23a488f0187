"""Evaluate a trained or a pretrained model.

    python eval.py --workdir=runs/averis_tiny [--recipe=bf16] [--batches=0]
    python eval.py --model=smollm2-135m --recipe=averis --tasks=arc_easy,piqa --task_data=data/eval [--limit=20]

The first prints the newest checkpoint's validation loss under the given recipe and writes it to
evaluation-<recipe>.json. The second scores downstream tasks, prints the paper's table with ours beside it and writes
JSON after every task; the same command goes on where it was interrupted. docs/evaluation.md says more.
"""

import sys

from absl import flags

from fp4jax import distributed
from fp4jax.training import evaluate_workdir
from fp4jax.training.launch import run

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
MODEL = flags.DEFINE_string("model", None, "With --tasks, instead of --workdir: smollm2-135m, or a model's file.")
RECIPE = flags.DEFINE_string("recipe", None, "Recipe to evaluate with; by default the run's, or bf16.")
POLICY = flags.DEFINE_string("policy", None, "With --tasks: layers that get the recipe; by default the run's, or all.")
BATCHES = flags.DEFINE_integer(
    "batches", None, "Batches of validation data, 0 for the whole split; by default config.evaluation.batches."
)
TASKS = flags.DEFINE_list("tasks", None, "Downstream tasks, with commas, or 'all': the paper's seven.")
LIMIT = flags.DEFINE_integer("limit", None, "With --tasks: score the first so many documents of each.")
TASK_DATA = flags.DEFINE_string("task_data", None, "Folder of <task>.jsonl; by default tasks come from the hub.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "With --tasks: sequences in a batch, by default 8.")
MAX_LENGTH = flags.DEFINE_integer("max_length", None, "With --tasks: tokens that the model takes at once.")
OUT = flags.DEFINE_string("out", None, "With --tasks: the JSON file; by default in the workdir or runs/evaluation.")
TASK_FLAGS = (MODEL, POLICY, LIMIT, TASK_DATA, BATCH_SIZE, MAX_LENGTH, OUT)


def main() -> None:
    if TASKS.value is not None:
        if BATCHES.value is not None:
            raise ValueError("--batches is for the validation loss; with --tasks, --limit counts documents")
        if distributed.several():
            raise ValueError("--tasks runs in a single process; leave --coordinator away, or start one task")
        from fp4jax.evaluation.command import evaluate_tasks  # on demand: it needs more packages

        evaluate_tasks(
            TASKS.value, workdir=WORKDIR.value, model=MODEL.value, recipe=RECIPE.value, policy=POLICY.value,
            limit=LIMIT.value, task_data=TASK_DATA.value, batch_size=BATCH_SIZE.value, max_length=MAX_LENGTH.value,
            out=OUT.value,
        )  # fmt: skip
        return
    given = [f"--{flag.name}" for flag in TASK_FLAGS if flag.value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: for downstream tasks, and --tasks is missing (--tasks=all: all seven)")
    if WORKDIR.value is None:
        raise ValueError("--workdir is missing; it is the folder that train.py wrote")
    evaluation = evaluate_workdir(WORKDIR.value, RECIPE.value, BATCHES.value)
    if distributed.is_first():
        print(evaluation)


if __name__ == "__main__":
    sys.exit(run(main))
