"""Evaluation: scores of a model.

evaluate           mean validation loss and perplexity over batches (loss.py)
EvaluationResult   the numbers

Imported from their modules, which need `fp4jax.training`, and lm-eval where the harness is used:

open_subject       a run's checkpoint or a pretrained model under a recipe (subject.py)
Scorer             log-likelihoods of continuations, in buckets of length (likelihood.py)
HarnessModel       the model as lm-eval asks it (harness.py), on the tasks of task_data.py
evaluate_tasks     `eval.py --tasks` (command.py): runs, records and renders them (tasks.py)
"""

from fp4jax.evaluation.loss import EvaluationResult, evaluate

__all__ = ["EvaluationResult", "evaluate"]
