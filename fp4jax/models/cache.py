"""Keys and values of the tokens a model has seen, so that one more token costs one token's work.

Every sequence has the same number of slots, and the token at position p is in slot p. So sequences of different
lengths start at slot 0, whatever stands behind their ends is out of reach, and nothing is padded in front.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Slots = Float[Array, "L B S K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys, after their rotary positions, and values of every layer."""

    keys: Slots
    values: Slots

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: str) -> "KVCache":
        """A cache of zeros."""
        shape = (layers, batch, slots, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class CachedAttention:
    """Attention of a model's tokens to the tokens before them, which are in a cache, and to one another.

        cached = CachedAttention(cache, lengths_B)
        hidden_BxTxD = model.hidden(tokens_BxT, cached=cached)
        cached.cache  # has these tokens' keys and values too

    Attributes:
      cache: before the model's call, and after it. Both are values inside one traced function.
      starts_B: the position of each sequence's first token of this call; starts + T must not exceed the slots.
    """

    def __init__(self, cache: KVCache, starts_B: Int[Array, " B"]):
        self.cache = cache
        self.starts_B = starts_B

    def positions(self, length: int) -> Int[Array, "B T"]:
        """Of `length` tokens of every sequence."""
        return self.starts_B[:, None] + jnp.arange(length, dtype=self.starts_B.dtype)[None, :]

    def layer(self, cache: KVCache, index: Int[Array, ""]) -> "LayerAttention":
        """One layer's, with the cache as the layers below have left it."""
        return LayerAttention(cache, index, self)


class LayerAttention:
    """What a block calls in place of causal attention; afterwards `cache` has this layer's new keys and values."""

    def __init__(self, cache: KVCache, index: Int[Array, ""], of: CachedAttention):
        self.cache = cache
        self.index = index
        self.of = of

    def __call__(
        self, q_BxTxNxH: Float[Array, "B T N H"], k_BxTxKxH: Float[Array, "B T K H"], v_BxTxKxH: Float[Array, "B T K H"]
    ) -> Float[Array, "B T N H"]:
        """Scaled dot-product attention with grouped heads to every slot up to the query's own position."""
        self.cache = KVCache(self._write(self.cache.keys, k_BxTxKxH), self._write(self.cache.values, v_BxTxKxH))
        keys, values = (
            lax.dynamic_index_in_dim(slots, self.index, keepdims=False).astype(q_BxTxNxH.dtype)
            for slots in (self.cache.keys, self.cache.values)
        )
        positions_BxT = self.of.positions(q_BxTxNxH.shape[1])
        slots = jnp.arange(keys.shape[1], dtype=positions_BxT.dtype)
        reachable = slots[None, None, None, :] <= positions_BxT[:, None, :, None]
        return jax.nn.dot_product_attention(q_BxTxNxH, keys, values, mask=reachable)

    def _write(self, slots: Slots, new_BxTxKxH: Float[Array, "B T K H"]) -> Slots:
        def one_sequence(slots, new, start):
            return lax.dynamic_update_slice(slots, new[None].astype(slots.dtype), (self.index, start, 0, 0))

        return jax.vmap(one_sequence, in_axes=(1, 0, 0), out_axes=1)(slots, new_BxTxKxH, self.of.starts_B)
