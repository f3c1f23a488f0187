import math

import jax.numpy as jnp
import pytest

from fp4jax.evaluation import EvaluationResult, evaluate

BATCHES = [{"total": jnp.float32(total), "count": jnp.float32(count)} for total, count in ((30, 10), (1, 1), (0, 0))]


def loss_step(params, batch):
    return params * batch["total"], batch["count"]


def test_every_token_counts_once():
    result = evaluate(loss_step, 2.0, BATCHES)
    assert result == EvaluationResult(loss=62.0 / 11, tokens=11, batches=3)
    assert result.perplexity == math.exp(62.0 / 11)


def test_limit():
    assert evaluate(loss_step, 1.0, iter(BATCHES), limit=1) == EvaluationResult(3.0, 10, 1)


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"no tokens; raise data.validation_fraction"):
        evaluate(loss_step, 1.0, BATCHES[2:])


def test_perplexity_that_overflows():
    assert EvaluationResult(1e4, 1, 1).perplexity == math.inf
