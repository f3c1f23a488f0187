"""Rows for continuations that share a context: it is put through the model once.

A question with four answers is asked as four pairs of one context and one continuation. They become one row

    tokens    context . . . .  first answer  second answer  third answer
    segments  every segment's       0              1             2

in which an answer attends to the context and to itself, at the positions that it would have alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fp4jax.models.layers import EVERY_SEGMENT

Pair = tuple[Sequence[int], Sequence[int]]
"""(context, continuation), token ids."""


@dataclasses.dataclass
class Row:
    """A context and its continuations.

    Attributes:
      context: at least one token.
      continuations: token ids; the last token of each is only scored and goes into no model.
      pairs: the number of the pair that each continuation came from.
    """

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    pairs: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        """Tokens that go into the model."""
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)

    def arrays(self) -> dict[str, np.ndarray]:
        """int32 arrays of this row.

        `inputs`, `positions`, `segment_ids` [tokens]; and for every token that is scored `at`, the index of the input
        that predicts it, `targets`, the token, and `owners`, the index of its continuation.
        """
        start = len(self.context)
        inputs, positions, segments = [*self.context], [*range(start)], [EVERY_SEGMENT] * start
        at, targets, owners = [], [], []
        for index, continuation in enumerate(self.continuations):
            behind = len(inputs)
            at += [start - 1, *range(behind, behind + len(continuation) - 1)]
            targets += continuation
            owners += [index] * len(continuation)
            inputs += continuation[:-1]
            positions += range(start, start + len(continuation) - 1)
            segments += [index] * (len(continuation) - 1)
        found = {"inputs": inputs, "positions": positions, "segment_ids": segments}
        found |= {"at": at, "targets": targets, "owners": owners}
        return {name: np.array(values, np.int32) for name, values in found.items()}


def shared_rows(pairs: Sequence[Pair], max_length: int, *, share: bool = True) -> list[Row]:
    """Rows that hold each pair once, in the order of their first pairs.

    What is longer than `max_length` inputs loses the beginning of its context. A row has no more continuations than its
    context has tokens: sharing fewer does not pay, and no row scores more tokens than it has inputs.

    Args:
      pairs: (context, continuation) of token ids, neither empty.
      max_length: most inputs of a row.
      share: False: a row for every pair.

    Raises:
      ValueError: an empty context or continuation, or a continuation that alone exceeds `max_length`.
    """
    rows: list[Row] = []
    newest: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation or len(continuation) > max_length:
            raise ValueError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens cannot be scored: "
                f"neither may be empty, and the continuation may have {max_length} tokens"
            )
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        row = newest.get(kept)
        if row is None or not share or len(row.pairs) == len(kept) or len(row) + len(continuation) - 1 > max_length:
            row = newest[kept] = Row(kept)
            rows.append(row)
        row.continuations.append(tuple(continuation))
        row.pairs.append(number)
    return rows
