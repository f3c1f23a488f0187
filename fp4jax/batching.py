"""What `jax.vmap` means for the stages of a quantized product.

`vmap` over activations alone means more tokens: statistics are shared and one weight gradient is summed inside.
`vmap` over weights too means independent matrices: a batch dimension. JAX's own rule would give every example its own
statistics (a single token is its own mean and leaves no residual).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fp4jax.numerics.bits import mix


def vmappable(
    stage: Callable,
    batch_dims: int,
    with_batch_dims: Callable[[int], Callable],
    per_token: tuple[bool, ...],
    shard_axes: int = 0,
):
    """Wraps `stage(dense, weights, prepared, words, mask) -> tuple` with the rule above.

    Args:
      stage: `dense` arrays and `mask` have the token axes in full behind `batch_dims` axes, arrays of `prepared` may
        have size 1 there, `weights` have none; `words` are random words. It takes any number of token axes.
      with_batch_dims: the wrapped stage for another number of batch axes.
      per_token: for each output whether it has token axes (in full or of size 1) behind its batch axes.
      shard_axes: in front of the token axes, those that count shards of them: more tokens are more of every shard.
    """
    function = jax.custom_batching.custom_vmap(stage)

    @function.def_vmap
    def rule(size, batched, dense, weights, prepared, words, mask):
        dense_is, weights_is, prepared_is, words_is, mask_is = batched
        only_dense = (
            any(jax.tree.leaves(dense_is)) and jax.tree.leaves(prepared) and not any(jax.tree.leaves(prepared_is))
        )
        only_keys = not any(jax.tree.leaves((dense_is, weights_is, prepared_is, mask_is)))
        # Several weights; several cotangents of one product; the same product drawn anew.
        independent = any(jax.tree.leaves(weights_is)) or only_dense or only_keys
        if independent and words_is is True:
            # A key for every matrix: each draws as it would alone.
            outputs = _one_by_one(function, (dense, weights, prepared, words, mask), batched)
            return outputs, jax.tree.map(lambda _: True, outputs)
        # More tokens of one product: their rows separate the draws, and every key has its part in the one stream.
        words = _combine(words) if words_is is True else words
        if independent:
            args = [
                _to_batch(size, *pair) for pair in ((dense, dense_is), (weights, weights_is), (prepared, prepared_is))
            ]
            outputs = with_batch_dims(batch_dims + 1)(*args, words, _to_batch(size, mask, mask_is))
            return outputs, jax.tree.map(lambda _: True, outputs)
        position = batch_dims + shard_axes
        dense, mask = (_to_tokens(size, position, *pair) for pair in ((dense, dense_is), (mask, mask_is)))
        prepared = _to_tokens(1, position, prepared, prepared_is)
        outputs = function(dense, weights, prepared, words, mask)
        pairs = [_from_tokens(size, position, o) if is_token else (o, jax.tree.map(lambda _: False, o))
                 for o, is_token in zip(outputs, per_token, strict=True)]  # fmt: skip
        return tuple(value for value, _ in pairs), tuple(flag for _, flag in pairs)

    return function


def _one_by_one(function, args, batched):
    """`jax.lax.map` over the mapped leaves of `args`."""
    leaves, treedef = jax.tree.flatten(args)
    flags = jax.tree.leaves(batched)

    def one(mapped):
        mapped = iter(mapped)
        whole = [next(mapped) if is_in else leaf for leaf, is_in in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(treedef, whole))

    return jax.lax.map(one, [leaf for leaf, is_in in zip(leaves, flags, strict=True) if is_in])


def _combine(words):
    """One pair of random words from several."""
    return functools.reduce(lambda left, right: left ^ mix(right + left), words)


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


@jax.custom_jvp
def once_differentiable(*arrays):
    """Nothing, unless it is differentiated: the forward rule of a VJP calls it with its operands.

    Codes have no derivative, so a Hessian or a gradient penalty would silently come out as zero.
    """
    del arrays
    return ()


@once_differentiable.defjvp
def _second_derivative(primals, tangents):
    raise NotImplementedError(
        "fp4jax.dot_general can be differentiated once, as rounding has no second derivative; for Hessians and "
        "gradient penalties use recipe='bf16' (without lhs_q, rhs_q, row_mask and probe)"
    )


def vary_alike(*trees):
    """Inside `jax.shard_map`: every array typed as varying over the mesh axes that any of them varies over.

    The transpose then sums the cotangent of an operand that is replicated, as for any JAX function. Elsewhere it does
    nothing.
    """
    axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(trees)))

    def cast(leaf):
        missing = tuple(sorted(axes - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, trees)


def _varying(leaf) -> frozenset:
    return frozenset(jax.typeof(leaf).manual_axis_type.varying)
