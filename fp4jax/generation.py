"""Text from a model: the prompts once through the model into a cache, then one token after the other.

Sequences of a batch may differ in length; each has its own positions and ends on its own. Two programs are compiled for
a batch's shape, one for the prompts and one for CHUNK further tokens.

Under a recipe every product quantizes what it is given: prefill takes its means and scales over all prompt tokens of
the batch, a decode step over the one token of every sequence that has not ended. docs/evaluation.md says what that
means for each recipe.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int, PyTree

from fp4jax.models.cache import CachedAttention, KVCache
from fp4jax.models.frozen import FrozenModel

CHUNK = 16
"""Tokens between two looks of the host at what has been generated."""

SHORTEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: draw from the k most likely tokens only; 0 for all.
      top_p: draw from the most likely tokens that together have this probability (Holtzman et al. 2019); 1 for all.

    Raises:
      ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature}: must be 0 (most likely token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be greater than 0 and at most 1 (all tokens)")


GREEDY = Sampling()


def next_token(logits_BxV: Float32[Array, "B V"], sampling: Sampling, key) -> Int[Array, " B"]:
    """One token for every sequence; `top_k` is applied before `top_p`, both after the temperature."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if 0 < sampling.top_k < logits_BxV.shape[-1]:
        smallest_kept = lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < smallest_kept, -jnp.inf, logits_BxV)
    if sampling.top_p < 1:
        logits_BxV = _nucleus(logits_BxV, sampling.top_p)
    return jax.random.categorical(key, logits_BxV, axis=-1).astype(jnp.int32)


def _nucleus(logits_BxV: Float32[Array, "B V"], top_p: float) -> Float32[Array, "B V"]:
    order = jnp.argsort(-logits_BxV, axis=-1)
    sorted_BxV = jnp.take_along_axis(logits_BxV, order, axis=-1)
    probability = jax.nn.softmax(sorted_BxV, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.where(before < top_p, sorted_BxV, -jnp.inf)  # the first is always kept
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def bucket(length: int) -> int:
    """The shape that sequences of `length` tokens are padded to: two for every power of two, few to compile."""
    size = SHORTEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """A batch between two decode steps.

    Attributes:
      cache: of all tokens but the last.
      lengths_B: tokens in the cache; last_B: the token behind them; done_B: sequences that have ended.
      step: tokens generated so far.
    """

    cache: KVCache
    lengths_B: Int[Array, " B"]
    last_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    step: Int[Array, ""]


class Generator:
    """Continues prompts.

    Args:
      frozen: the model; its arrays lie on `mesh`, where there is one.
      end_of_text: the token after which a sequence has ended.
      sampling, seed: how tokens are drawn; the same seed and batch give the same text.
      mesh: batches are split along its axes "data" and "fsdp".
      batch_size: sequences in a batch, divisible by the sizes of those axes; fewer prompts are filled up with empty
        rows, which count nowhere. None for as many as there are prompts.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        end_of_text: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        mesh: Mesh | None = None,
        batch_size: int | None = None,
    ):
        self.frozen, self.end_of_text, self.sampling = frozen, end_of_text, sampling
        self.mesh, self.batch_size = mesh, batch_size
        self._key = jax.random.key(seed)
        self._prefill = jax.jit(self._prefill_traced, static_argnames="slots")
        self._decode = jax.jit(self._decode_traced, donate_argnums=1)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        ended: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, at most `max_tokens`, without the end of text.

        Args:
          ended: (index of the prompt, its tokens so far) → whether it may end here; asked every CHUNK tokens, so a
            result can have up to CHUNK - 1 tokens more than it let pass.

        Raises:
          ValueError: no prompt, an empty one, more than `batch_size`, or `max_tokens` below 1.
        """
        decoding = self.prefill(prompts, max_tokens)
        found = [[int(token)] for token in np.asarray(decoding.last_B)[: len(prompts)]]
        while True:
            done = np.array(decoding.done_B)
            for row, tokens in enumerate(found):
                found[row] = tokens[: tokens.index(self.end_of_text)] if self.end_of_text in tokens else tokens
                done[row] |= len(found[row]) >= max_tokens or ended(row, found[row])
            if done.all():
                return [tokens[:max_tokens] for tokens in found]
            decoding, new_BxC = self.decode(dataclasses.replace(decoding, done_B=self._put(done)))
            for row in np.flatnonzero(~done):
                found[row] += map(int, np.asarray(new_BxC)[row])

    def prefill(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Decoding:
        """The state after the prompts: the first token of each continuation, and room for `max_tokens`.

        Raises:
          ValueError: no prompt, an empty one, more than `batch_size`, or `max_tokens` below 1.
        """
        rows = self.batch_size or len(prompts)
        if not prompts or not all(prompts) or len(prompts) > rows or max_tokens < 1:
            raise ValueError(
                f"got {len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens, and "
                f"max_tokens={max_tokens}: 1 to {max(rows, 1)} prompts of at least one token, and max_tokens >= 1"
            )
        lengths_B = np.zeros(rows, np.int32)
        lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
        tokens_BxT = np.full((rows, bucket(int(lengths_B.max()))), self.end_of_text, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BxT[row, : len(prompt)] = prompt
        slots = tokens_BxT.shape[1] + math.ceil(max_tokens / CHUNK) * CHUNK
        return self._prefill(self.frozen.arrays, self._put(tokens_BxT), self._put(lengths_B), slots=slots)

    def decode(self, decoding: Decoding) -> tuple[Decoding, Int[Array, "B C"]]:
        """CHUNK further tokens, fewer where every sequence ends before; behind its end a sequence has end of text."""
        return self._decode(self.frozen.arrays, decoding)

    def _put(self, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(("data", "fsdp"))))

    def _prefill_traced(self, arrays: PyTree, tokens_BxT, lengths_B, *, slots: int) -> Decoding:
        model, weights = self.frozen.bind(arrays)
        c, (batch, length) = model.config, tokens_BxT.shape
        empty = KVCache.empty(c.num_layers, batch, slots, c.num_kv_heads, c.head_dim, c.dtype)
        cached = CachedAttention(empty, jnp.zeros_like(lengths_B))
        real_BxT = jnp.arange(length, dtype=jnp.int32)[None, :] < lengths_B[:, None]
        hidden = model.hidden(tokens_BxT, key=self.frozen.key, weights=weights, cached=cached, row_mask=real_BxT)
        last_Bx1xD = jnp.take_along_axis(hidden, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
        step = jnp.zeros((), jnp.int32)
        first_B = next_token(model.logits(last_Bx1xD)[:, 0], self.sampling, jax.random.fold_in(self._key, step))
        done_B = (first_B == self.end_of_text) | (lengths_B == 0)
        return Decoding(cached.cache, lengths_B, first_B, done_B, step + 1)

    def _decode_traced(self, arrays: PyTree, decoding: Decoding) -> tuple[Decoding, Array]:
        model, weights = self.frozen.bind(arrays)
        one_step = functools.partial(self._step, model, weights)

        def more(carry):
            decoding, index, _ = carry
            return (index < CHUNK) & ~jnp.all(decoding.done_B)

        def body(carry):
            decoding, index, found_BxC = carry
            decoding = one_step(decoding)
            emitted_B = jnp.where(decoding.done_B, self.end_of_text, decoding.last_B)
            return decoding, index + 1, lax.dynamic_update_index_in_dim(found_BxC, emitted_B, index, axis=1)

        found_BxC = jnp.full((decoding.last_B.shape[0], CHUNK), self.end_of_text, jnp.int32)
        decoding, _, found_BxC = lax.while_loop(more, body, (decoding, jnp.zeros((), jnp.int32), found_BxC))
        return decoding, found_BxC

    def _step(self, model, weights, decoding: Decoding) -> Decoding:
        """The last token of every sequence through the model, and the next one drawn."""
        cached = CachedAttention(decoding.cache, decoding.lengths_B)
        hidden_Bx1xD = model.hidden(
            decoding.last_B[:, None],
            key=jax.random.fold_in(self.frozen.key, decoding.step),
            weights=weights,
            cached=cached,
            row_mask=~decoding.done_B[:, None],
        )
        key = jax.random.fold_in(self._key, decoding.step)
        token_B = next_token(model.logits(hidden_Bx1xD)[:, 0], self.sampling, key)
        # What has ended stays where it is: its slot is written over, and no later one.
        return Decoding(
            cached.cache,
            jnp.where(decoding.done_B, decoding.lengths_B, decoding.lengths_B + 1),
            jnp.where(decoding.done_B, decoding.last_B, token_B),
            decoding.done_B | (token_B == self.end_of_text),
            decoding.step + 1,
        )
