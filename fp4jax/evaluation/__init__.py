"""Evaluation: scores of a model.

evaluate           mean validation loss and perplexity over batches (loss.py)
EvaluationResult   the numbers
"""

from fp4jax.evaluation.loss import EvaluationResult, evaluate

__all__ = ["EvaluationResult", "evaluate"]
