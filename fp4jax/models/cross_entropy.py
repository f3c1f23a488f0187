"""The output head and the cross-entropy in one: the logits of all tokens are never there at once.

Float32 logits of 65,536 tokens and 151,936 words are 37 GiB, and their gradient another 37: more than everything else
that a small model keeps. Here a chunk of positions at a time meets the head; under differentiation its gradients are
taken while its logits are there, so that nothing is computed twice and a chunk's logits are the most that is held.

Shapes: B batch, T sequence, D hidden, V vocabulary; S shards of the batch, b sequences of a shard, n chunks of C
positions.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from fp4jax import scopes
from fp4jax.axes import BATCH_AXES
from fp4jax.hardware import current
from fp4jax.layout import LOGICAL_AXES, auto_axes, place

LOGITS_AT_ONCE = 1 << 27
"""Logits that a device holds at a time, about: 512 MiB in float32."""


class Layout(NamedTuple):
    """How a call is cut; static.

    Attributes:
      shards: devices that share the batch; each adds up its part of the head's gradient alone, so that one sum over
        devices, behind the loop, makes it whole.
      chunks: parts of the sequence, one after the other.
    """

    shards: int
    chunks: int


def layout(batch: int, length: int, vocabulary: int, logits_at_once: int = LOGITS_AT_ONCE) -> Layout:
    """The fewest equal chunks whose logits stay below `logits_at_once` on each device of the ambient mesh."""
    sizes = auto_axes()
    shards, of_vocabulary = (
        math.prod(sizes.get(axis, 1) for axis in axes) for axes in (BATCH_AXES, LOGICAL_AXES["vocab"])
    )
    shards = shards if batch % shards == 0 else 1
    a_position = (batch // shards) * -(-vocabulary // of_vocabulary)
    fitting = (n for n in range(1, length + 1) if length % n == 0 and (length // n) * a_position <= logits_at_once)
    return Layout(shards, next(fitting, length))


def cross_entropy(
    hidden_BxTxD: Float[Array, "B T D"],
    head_VxD: Float32[Array, "V D"],
    targets_BxT: Int[Array, "B T"],
    weights_BxT: Float32[Array, "B T"],
    cut: Layout | None = None,
) -> Float32[Array, ""]:
    """Sum over positions of weight × negative log-likelihood of the target, in nats.

    The products have operands in hidden's dtype and float32 sums; softmax and likelihoods are float32, and so is the
    head's gradient, over all chunks. The logits' gradient is rounded to hidden's dtype before its two products. Reverse
    mode, once; the weights are constants to it.

    Args:
      targets_BxT: 0 to V - 1, at weights of 0 as well.
      cut: None for `layout` of these shapes.
    """
    (batch, length, _), vocabulary = hidden_BxTxD.shape, head_VxD.shape[0]
    cut = layout(batch, length, vocabulary) if cut is None else cut
    with scopes.of_step_part("cross_entropy"):
        return _cross_entropy(cut, hidden_BxTxD, head_VxD, targets_BxT, weights_BxT.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(cut: Layout, hidden_BxTxD, head_VxD, targets_BxT, weights_BxT):
    head = _gathered(head_VxD, hidden_BxTxD.dtype)

    def add_chunk(total, chunk):
        hidden, targets, weights = chunk
        logits, log_normalizer = _logits(hidden, head)
        return total + _loss(logits, log_normalizer, targets, weights), None

    chunks = _chunks(cut, hidden_BxTxD, targets_BxT, weights_BxT)
    return _scan(add_chunk, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(cut: Layout, hidden_BxTxD, head_VxD, targets_BxT, weights_BxT):
    dtype = hidden_BxTxD.dtype
    head = _gathered(head_VxD, dtype)

    def add_chunk(sums, chunk):
        total, head_gradient_SxVxD = sums
        hidden, targets, weights = chunk
        logits, log_normalizer = _logits(hidden, head)
        total = total + _loss(logits, log_normalizer, targets, weights)
        likelihood = jnp.exp(logits - log_normalizer)
        slope = jnp.where(_is_target(logits, targets), likelihood - 1, likelihood) * weights[..., None]
        slope_SxbxCxV = slope.astype(dtype)
        hidden_gradient = jnp.einsum("sbcv,vd->sbcd", slope_SxbxCxV, head, preferred_element_type=jnp.float32)
        added = _over_positions(slope_SxbxCxV, hidden)
        return (total, place(head_gradient_SxVxD + added, partial_sums)), hidden_gradient.astype(dtype)

    partial_sums = ("batch", "vocab", None)
    zeros = place(jnp.zeros((cut.shards, *head_VxD.shape), jnp.float32), partial_sums)
    chunks = _chunks(cut, hidden_BxTxD, targets_BxT, weights_BxT)
    (total, head_gradient), hidden_gradient = _scan(add_chunk, (jnp.zeros((), jnp.float32), zeros), chunks)
    hidden_gradient_BxTxD = jnp.moveaxis(hidden_gradient, 0, 2).reshape(hidden_BxTxD.shape)
    return total, (hidden_gradient_BxTxD, jnp.sum(head_gradient, axis=0))


def _backward(cut: Layout, gradients, cotangent):
    # The loss is a sum, so its gradients are those of its parts times one number.
    hidden_gradient, head_gradient = gradients
    scaled = (hidden_gradient.astype(jnp.float32) * cotangent).astype(hidden_gradient.dtype)
    return scaled, head_gradient * cotangent, None, None


_cross_entropy.defvjp(_forward, _backward)


def _logits(hidden_SxbxCxD, head_VxD):
    """(logits [S, b, C, V], their log-sum-exp [S, b, C, 1])."""
    logits = jnp.einsum("sbcd,vd->sbcv", hidden_SxbxCxD, head_VxD, preferred_element_type=jnp.float32)
    return logits, jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _is_target(logits, targets_SxbxC):
    """Where the target is, [S, b, C, V]."""
    return lax.broadcasted_iota(targets_SxbxC.dtype, logits.shape, 3) == targets_SxbxC[..., None]


def _loss(logits, log_normalizer, targets_SxbxC, weights_SxbxC):
    return jnp.sum((log_normalizer[..., 0] - _chosen(logits, targets_SxbxC)) * weights_SxbxC)


def _chosen(logits, targets_SxbxC):
    """The targets' logits [S, b, C]: by index, or by comparison where an index would gather logits from devices."""
    if math.prod(auto_axes().get(axis, 1) for axis in LOGICAL_AXES["vocab"]) == 1:
        return jnp.take_along_axis(logits, targets_SxbxC[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(_is_target(logits, targets_SxbxC), logits, 0.0), axis=-1)


def _over_positions(slope_SxbxCxV, hidden_SxbxCxD) -> Float32[Array, "S V D"]:
    """The head's gradient, summed over positions.

    XLA:CPU multiplies an lhs that is contracted along its last axis, and makes it where it is not. Here the hidden
    states become it, which are far smaller than the slopes; the barrier keeps the compiler from turning the two round.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if not current().is_cpu:
        return product("sbcv,sbcd->svd", slope_SxbxCxV, hidden_SxbxCxD)
    turned = lax.optimization_barrier(product("sbcd,sbcv->sdv", hidden_SxbxCxD, slope_SxbxCxV))
    return jnp.swapaxes(turned, 1, 2)


def _chunks(cut: Layout, *arrays_BxT):
    """Each as [n, S, b, C, ...]; the batch stays where it is."""

    def split(x: Array) -> Array:
        parts = x.reshape(cut.shards, -1, cut.chunks, x.shape[1] // cut.chunks, *x.shape[2:])
        parts = jnp.moveaxis(parts, 2, 0)
        return place(parts, (None, "batch", *[None] * (parts.ndim - 2)))

    return tuple(map(split, arrays_BxT))


def _scan(add_chunk, start, chunks):
    """`lax.scan`; of one chunk without the loop, and without the copy of the sums that a loop makes."""
    if chunks[0].shape[0] > 1:
        return lax.scan(add_chunk, start, chunks)
    end, found = add_chunk(start, jax.tree.map(lambda x: x[0], chunks))
    return end, jax.tree.map(lambda x: x[None], found)


def _gathered(head_VxD: Array, dtype: jnp.dtype) -> Array:
    """The head, whole along D on every device: once, where a loop would gather it for every chunk."""
    return place(head_VxD.astype(dtype), ("vocab", None))
