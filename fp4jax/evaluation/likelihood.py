"""Log-likelihoods of continuations given their contexts: batched, bucketed by length, compiled once for each bucket.

Continuations of one context share a row (`sharing`), unless they would take each other's slots in experts. Under a
recipe the rows of a batch share means and scales, as sequences do in training; padding counts in none of them. So a
value depends a little on the batch it was computed in: rows and batches are formed in a fixed order, and their size is
part of the result's record.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from fp4jax.axes import BATCH_AXES
from fp4jax.evaluation.sharing import Pair, Row, shared_rows
from fp4jax.generation import SHORTEST_BUCKET, bucket
from fp4jax.models.frozen import FrozenModel
from fp4jax.models.qwen3_moe import FULL
from fp4jax.training.mesh import put_batch, replicated
from fp4jax.training.state import on_mesh

CHUNK = SHORTEST_BUCKET // 2
"""Scored tokens of a row whose logits are held at a time; every bucket's length is a multiple."""


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
      mesh: batches are split along its axes `BATCH_AXES`.
      batch_size: rows in a batch, divisible by the sizes of those axes.
      max_length: tokens of context and continuation that the model takes; what is longer loses its beginning.

    Attributes:
      shares: whether continuations of one context share a row.

    Raises:
      ValueError: a size that cannot be used.
    """

    def __init__(self, frozen: FrozenModel, mesh: Mesh, *, batch_size: int, max_length: int):
        shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        if batch_size < 1 or batch_size % shards:
            raise ValueError(f"batch_size={batch_size} must be a multiple of {shards}, the devices that share a batch")
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2: a token, and one that follows it")
        self.frozen, self.mesh, self.batch_size, self.max_length = frozen, mesh, batch_size, max_length
        # Tokens take an expert's slots in their order: of answers in one row the last would find the fewest.
        self.shares = getattr(frozen.config, "capacity", FULL) == FULL
        self._score = on_mesh(jax.jit(self._score_traced, out_shardings=replicated(mesh)), mesh)

    def __call__(self, pairs: Sequence[Pair], progress: Callable[[int], None] = lambda done: None) -> list[Likelihood]:
        """The likelihood of each continuation, in order.

        Args:
          pairs: (context, continuation) as token ids, neither empty.
          progress: told how many more pairs have been scored, after every batch.

        Raises:
          ValueError: an empty context or continuation, or a continuation that alone exceeds `max_length`.
        """
        results: list[Likelihood | None] = [None] * len(pairs)
        for number, rows in enumerate(self._batches(shared_rows(pairs, self.max_length, share=self.shares))):
            key = jax.random.fold_in(self.frozen.key, number)
            batch = self._batch(rows)
            found = self._score(self.frozen.arrays, put_batch(batch, self.mesh), key)
            log_likelihoods_BxS, greedy_BxS = map(np.asarray, found)
            for index, row in enumerate(rows):
                for continuation, pair in enumerate(row.pairs):
                    own = batch["owners"][index] == continuation
                    total = log_likelihoods_BxS[index, own].sum(dtype=np.float64)
                    results[pair] = Likelihood(float(total), bool(greedy_BxS[index, own].all()))
            progress(sum(len(row.pairs) for row in rows))
        return results

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of one bucket, at most `batch_size` of them."""
        batches: list[list[Row]] = []
        # The longest first: what does not fit into memory fails at once. Ties keep their order.
        for row in sorted(rows, key=lambda row: -bucket(len(row))):
            same = batches and bucket(len(batches[-1][0])) == bucket(len(row))
            if same and len(batches[-1]) < self.batch_size:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _batch(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """The rows' arrays, [batch_size, their bucket], and `lengths` [batch_size]: 0 where there is no row.

        The owner of what is not scored is -1, the segment of what is not real one of its own. Without a row that is
        shared there are no segments and positions.
        """
        shape = self.batch_size, bucket(len(rows[0]))
        fillers = {"inputs": 0, "positions": 0, "segment_ids": shape[1], "at": 0, "targets": 0, "owners": -1}
        batch = {name: np.full(shape, filler, np.int32) for name, filler in fillers.items()}
        for index, row in enumerate(rows):
            for name, values in row.arrays().items():
                batch[name][index, : len(values)] = values
        if all(len(row.pairs) == 1 for row in rows):
            # Attention is plainly causal then, which some devices have a kernel for.
            del batch["segment_ids"], batch["positions"]
        lengths = [len(row) for row in rows] + [0] * (self.batch_size - len(rows))
        return batch | {"lengths": np.array(lengths, np.int32)}

    def _score_traced(
        self, arrays: PyTree, batch: dict[str, Array], key
    ) -> tuple[Float32[Array, "B S"], Bool[Array, "B S"]]:
        """Of every scored token its log-likelihood and whether it is the most likely one."""
        model, weights = self.frozen.bind(arrays)
        real_BxT = jnp.arange(batch["inputs"].shape[1])[None, :] < batch["lengths"][:, None]
        hidden_BxTxD = model.hidden(
            batch["inputs"], key=key, weights=weights, row_mask=real_BxT,
            segment_ids=batch.get("segment_ids"), positions=batch.get("positions"),
        )  # fmt: skip

        def score_chunk(index: Int32[Array, ""], found):
            start = index * CHUNK
            at_BxC, targets_BxC = (lax.dynamic_slice_in_dim(batch[name], start, CHUNK, 1) for name in ("at", "targets"))
            logits_BxCxV = model.logits(jnp.take_along_axis(hidden_BxTxD, at_BxC[..., None], axis=1))
            chosen = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
            log_likelihood = chosen - jax.nn.logsumexp(logits_BxCxV, axis=-1)
            is_greedy = jnp.argmax(logits_BxCxV, axis=-1).astype(targets_BxC.dtype) == targets_BxC
            chunk = log_likelihood, is_greedy
            return tuple(
                lax.dynamic_update_slice_in_dim(all_, x, start, 1) for all_, x in zip(found, chunk, strict=True)
            )

        # Only what is scored meets the head: the vocabulary's logits are a large part of the work.
        scored = jnp.max(jnp.sum(batch["owners"] >= 0, axis=1))
        shape = batch["owners"].shape
        return lax.fori_loop(
            0, -(-scored // CHUNK), score_chunk, (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
        )
