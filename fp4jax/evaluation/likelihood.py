"""Log-likelihoods of continuations given their contexts: batched, bucketed by length, compiled once for each bucket.

Under a recipe the sequences of a batch share means and scales, as in training; padding counts in none of them. So a
value depends a little on the batch it was computed in: batches are formed in a fixed order, and their size is part of
the result's record.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from fp4jax.generation import SHORTEST_BUCKET, bucket
from fp4jax.models.frozen import FrozenModel
from fp4jax.training.mesh import put_batch, replicated
from fp4jax.training.state import on_mesh

CHUNK = SHORTEST_BUCKET // 2
"""Positions whose logits are held at a time; every bucket's length is a multiple."""


class Likelihood(NamedTuple):
    """Of one continuation.

    Attributes:
      log_likelihood: sum over its tokens, in nats.
      is_greedy: whether each of its tokens is the most likely one.
    """

    log_likelihood: float
    is_greedy: bool


class Scorer:
    """Scores continuations under one model.

    Args:
      frozen: the model; its arrays lie on `mesh`.
      mesh: batches are split along its axes "data" and "fsdp".
      batch_size: sequences in a batch, divisible by the sizes of those axes.
      max_length: tokens of context and continuation that the model takes; what is longer loses its beginning.

    Raises:
      ValueError: a size that cannot be used.
    """

    def __init__(self, frozen: FrozenModel, mesh: Mesh, *, batch_size: int, max_length: int):
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if batch_size < 1 or batch_size % shards:
            raise ValueError(f"batch_size={batch_size} must be a multiple of {shards}, the devices that share a batch")
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2: a token, and one that follows it")
        self.frozen, self.mesh, self.batch_size, self.max_length = frozen, mesh, batch_size, max_length
        self._score = on_mesh(jax.jit(self._score_traced, out_shardings=replicated(mesh)), mesh)

    def __call__(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Likelihood]:
        """The likelihood of each continuation, in order.

        Args:
          pairs: (context, continuation) as token ids, neither empty.
          progress: told how many more pairs have been scored, after every batch.

        Raises:
          ValueError: an empty context or continuation, or a continuation that alone exceeds `max_length`.
        """
        rows = [self._row(*pair) for pair in pairs]
        results: list[Likelihood | None] = [None] * len(rows)
        # The longest first: what does not fit into memory fails at once. Ties keep their order.
        order = sorted(range(len(rows)), key=lambda i: -bucket(len(rows[i][0]) - 1))
        for number, batch in enumerate(self._batches(rows, order)):
            key = jax.random.fold_in(self.frozen.key, number)
            arrays = put_batch(self._arrays([rows[i] for i in batch]), self.mesh)
            totals_B, greedy_B = map(np.asarray, self._score(self.frozen.arrays, arrays, key))
            for i, total, greedy in zip(batch, totals_B, greedy_B, strict=False):
                results[i] = Likelihood(float(total), bool(greedy))
            progress(len(batch))
        return results

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
        """(tokens, the index of the first that is scored)."""
        if not context or not continuation or len(continuation) > self.max_length:
            raise ValueError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens cannot be scored: "
                f"neither may be empty, and the continuation may have {self.max_length} tokens"
            )
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        return tokens, len(tokens) - len(continuation)

    def _batches(self, rows, order: Sequence[int]) -> list[list[int]]:
        """Neighbours in `order` of one bucket, at most `batch_size` of them."""
        batches: list[list[int]] = []
        for i in order:
            same = batches and bucket(len(rows[batches[-1][0]][0]) - 1) == bucket(len(rows[i][0]) - 1)
            if same and len(batches[-1]) < self.batch_size:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _arrays(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, np.ndarray]:
        """Inputs and targets of one batch, [batch_size, its bucket]; rows without a sequence have length 0."""
        length = bucket(len(rows[0][0]) - 1)
        inputs = np.zeros((self.batch_size, length), np.int32)
        targets, scored = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        lengths = np.zeros(self.batch_size, np.int32)
        for row, (tokens, start) in enumerate(rows):
            inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
            scored[row, start - 1 : len(tokens) - 1] = True
            lengths[row] = len(tokens) - 1
        return {"inputs": inputs, "targets": targets, "scored": scored, "lengths": lengths}

    def _score_traced(
        self, arrays: PyTree, batch: dict[str, Array], key
    ) -> tuple[Float32[Array, " B"], Bool[Array, " B"]]:
        model, weights = self.frozen.bind(arrays)
        positions = jnp.arange(batch["inputs"].shape[1], dtype=jnp.int32)
        real_BxT = positions[None, :] < batch["lengths"][:, None]
        hidden_BxTxD = model.hidden(batch["inputs"], key=key, weights=weights, row_mask=real_BxT)

        def add_chunk(index: Int32[Array, ""], sums):
            total_B, greedy_B = sums
            hidden, targets, scored = (
                lax.dynamic_slice_in_dim(x, index * CHUNK, CHUNK, axis=1)
                for x in (hidden_BxTxD, batch["targets"], batch["scored"])
            )
            logits_BxCxV = model.logits(hidden)
            chosen = jnp.take_along_axis(logits_BxCxV, targets[..., None], axis=-1)[..., 0]
            log_likelihood = chosen - jax.nn.logsumexp(logits_BxCxV, axis=-1)
            is_greedy = jnp.argmax(logits_BxCxV, axis=-1).astype(targets.dtype) == targets
            total_B = total_B + jnp.sum(jnp.where(scored, log_likelihood, 0.0), axis=1)
            return total_B, greedy_B & jnp.all(is_greedy | ~scored, axis=1)

        # Only the chunks that hold a continuation meet the head: the vocabulary's logits are a large part of the work.
        has_scored = jnp.any(batch["scored"], axis=0)
        first = jnp.argmax(has_scored) // CHUNK
        behind_last = (positions.shape[0] - 1 - jnp.argmax(has_scored[::-1])) // CHUNK + 1
        start = (jnp.zeros(batch["lengths"].shape, jnp.float32), jnp.ones(batch["lengths"].shape, bool))
        return lax.fori_loop(first, behind_last, add_chunk, start)
