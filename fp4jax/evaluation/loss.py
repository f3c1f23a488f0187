"""Validation loss: the mean negative log-likelihood of a split's tokens."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxtyping import Array, Float32, PyTree

Batch = dict[str, Array]


@dataclass(frozen=True)
class EvaluationResult:
    """loss: nats per token, over `tokens` tokens in `batches` batches."""

    loss: float
    tokens: int
    batches: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    loss_step: Callable[[PyTree, Batch], tuple[Float32[Array, ""], Float32[Array, ""]]],
    params: PyTree,
    batches: Iterable[Batch],
    limit: int = 0,
) -> EvaluationResult:
    """Returns the mean over every token of the first `limit` batches (0: all of them), each token counted once.

    Args:
      loss_step: (params, batch) -> (sum of negative log-likelihoods, number of tokens).
      batches: batches already on their devices.

    Raises:
      ValueError: the batches hold no token.
    """
    total, tokens, count = 0.0, 0, 0
    for batch in itertools.islice(batches, limit or None):
        batch_total, batch_tokens = loss_step(params, batch)
        # float64 on the host: a sum over millions of tokens in float32 would lose the last digits.
        total += float(batch_total)
        tokens += int(batch_tokens)
        count += 1
    if not tokens:
        raise ValueError("the validation split has no tokens; raise data.validation_fraction or add documents")
    return EvaluationResult(total / tokens, tokens, count)
