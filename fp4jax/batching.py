"""What `jax.vmap` means for the stages of a quantized product.

`vmap` over activations alone means more tokens: statistics are shared and one weight gradient is summed inside.
`vmap` over weights too means independent matrices: a batch dimension. JAX's own rule would give every example its own
statistics (a single token is its own mean and leaves no residual).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def vmappable(
    stage: Callable, batch_dims: int, with_batch_dims: Callable[[int], Callable], per_token: tuple[bool, ...]
):
    """Wraps `stage(dense, weights, prepared, words, mask) -> tuple` with the rule above.

    Args:
      stage: `dense` arrays and `mask` have the token axes in full behind `batch_dims` axes, arrays of `prepared` may
        have size 1 there, `weights` have none; `words` are random words. It takes any number of token axes.
      with_batch_dims: the wrapped stage for another number of batch axes.
      per_token: for each output whether it has token axes (in full or of size 1) behind its batch axes.
    """
    function = jax.custom_batching.custom_vmap(stage)

    @function.def_vmap
    def rule(size, batched, dense, weights, prepared, words, mask):
        dense_is, weights_is, prepared_is, words_is, mask_is = batched
        if words_is is True and not any(jax.tree.leaves((dense_is, weights_is, prepared_is, mask_is))):
            # Keys alone are mapped: the same product drawn anew for every key.
            outputs = jax.lax.map(lambda one: function(dense, weights, prepared, one, mask), words)
            return outputs, jax.tree.map(lambda _: True, outputs)
        # One key serves all examples: rows and batch indices already separate their draws.
        words = words[0] if words_is is True else words
        only_dense = (
            any(jax.tree.leaves(dense_is)) and jax.tree.leaves(prepared) and not any(jax.tree.leaves(prepared_is))
        )
        if any(jax.tree.leaves(weights_is)) or only_dense:  # the latter: several cotangents of one product
            args = [
                _to_batch(size, *pair) for pair in ((dense, dense_is), (weights, weights_is), (prepared, prepared_is))
            ]
            outputs = with_batch_dims(batch_dims + 1)(*args, words, _to_batch(size, mask, mask_is))
            return outputs, jax.tree.map(lambda _: True, outputs)
        dense, mask = (_to_tokens(size, batch_dims, *pair) for pair in ((dense, dense_is), (mask, mask_is)))
        prepared = _to_tokens(1, batch_dims, prepared, prepared_is)
        outputs = function(dense, weights, prepared, words, mask)
        pairs = [_from_tokens(size, batch_dims, o) if is_token else (o, jax.tree.map(lambda _: False, o))
                 for o, is_token in zip(outputs, per_token, strict=True)]  # fmt: skip
        return tuple(value for value, _ in pairs), tuple(flag for _, flag in pairs)

    return function


def _to_batch(size, tree, batched):
    """Every leaf with a leading axis of `size`."""
    return jax.tree.map(lambda x, is_in: x if is_in else jnp.broadcast_to(x, (size, *x.shape)), tree, batched)


def _to_tokens(size, position, tree, batched):
    """The mapped axis as first token axis; leaves without it get one of `size`."""

    def move(x, is_in):
        if is_in:
            return jnp.moveaxis(x, 0, position)
        return jnp.broadcast_to(jnp.expand_dims(x, position), (*x.shape[:position], size, *x.shape[position:]))

    return jax.tree.map(move, tree, batched)


def _from_tokens(size, position, tree):
    """Leaves with the first token axis mapped again or, where it was reduced, dropped; and which of them are mapped."""
    mapped = jax.tree.map(lambda x: x.shape[position] == size, tree)
    moved = jax.tree.map(
        lambda x, is_in: jnp.moveaxis(x, position, 0) if is_in else jnp.squeeze(x, position), tree, mapped
    )
    return moved, mapped
