"""Experiments D, E and G: signs flipped in outlier columns against others, measured by the loss of a trained model.

A *column* is an input of a linear layer, a row of its kernel [L, inputs, outputs]. Outlier columns are the 5 % with the
largest share of the input's energy, in every layer by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

Params = dict[str, Float32[Array, "..."]]
Loss = Callable[[Params], Float32[Array, ""]]


def outlier_columns(alpha2: Float32[Array, "L inputs"], fraction: float) -> Bool[Array, "L inputs"]:
    """The columns with the largest energy shares, round(fraction inputs) of them in every layer, at least one."""
    inputs = alpha2.shape[1]
    count = max(round(fraction * inputs), 1)
    return jnp.argsort(jnp.argsort(-alpha2, axis=1), axis=1) < count


@dataclass(frozen=True)
class FlipResult:
    """What one draw of flips did.

    Attributes:
      loss: the rise of the loss in nats per token, [outliers, others, others with the outliers' norm].
      flips: the number of flipped weights [outliers, others].
      norms: Frobenius norm of the change over all matrices [outliers, others].
    """

    loss: Float32[np.ndarray, "3"]
    flips: Float32[np.ndarray, "2"]
    norms: Float32[np.ndarray, "2"]


def count_matched_flips(
    params: Params, outliers: dict[str, Bool[Array, "L inputs"]], loss: Loss
) -> Callable[[Array, Array], FlipResult]:
    """Returns (key, rate) → FlipResult, compiled once.

    Weights of outlier columns flip with probability `rate`; weights of the others with the probability that gives the
    same number of flips in expectation. The third loss scales the others' change, matrix by matrix, to the norm of the
    outliers'.

    Args:
      params: kernels and the rest, by path.
      outliers: the outlier columns of the kernels to flip, by path.
      loss: of parameters, in nats per token; traceable.
    """

    @jax.jit
    def change(kernel: Array, mask: Array, key: Array, rate: Array):
        u = jax.random.uniform(key, kernel.shape)
        count = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32)
        elsewhere = rate * count / (mask.shape[1] - count)
        flips = u < jnp.where(mask, rate, 0.0)[:, :, None], u < jnp.where(mask, 0.0, elsewhere)[:, :, None]
        out, other = (jnp.where(flip, -2.0 * kernel, 0.0) for flip in flips)
        norm = [jnp.sqrt(jnp.sum(d * d, axis=(1, 2), keepdims=True)) for d in (out, other)]
        matched = other * norm[0] / jnp.maximum(norm[1], 1e-30)
        return (kernel + out, kernel + other, kernel + matched), (
            jnp.stack([jnp.sum(flip, dtype=jnp.float32) for flip in flips]),
            jnp.stack([jnp.sum(n * n) for n in norm]),
        )

    compiled = jax.jit(loss)
    clean = float(compiled(params))

    def draw(key: Array, rate: Array) -> FlipResult:
        changed: list[Params] = [dict(params), dict(params), dict(params)]
        flips, energies = np.zeros(2, np.float32), np.zeros(2, np.float32)
        for index, (path, mask) in enumerate(sorted(outliers.items())):
            kernels, (count, energy) = change(params[path], mask, jax.random.fold_in(key, index), rate)
            for target, kernel in zip(changed, kernels, strict=True):
                target[path] = kernel
            flips, energies = flips + np.asarray(count), energies + np.asarray(energy)
        rises = np.array([float(compiled(p)) - clean for p in changed], np.float32)
        return FlipResult(rises, flips, np.sqrt(energies))

    return draw


def single_column_flips(
    params: Params, path: str, layer: int, columns: np.ndarray, loss: Loss
) -> Float32[np.ndarray, " columns"]:
    """Experiment G: the rise of the loss when one column of one layer's kernel is flipped, for each of `columns`."""
    kernel = params[path]

    @jax.jit
    def of_column(params: Params, column: Array) -> Array:
        sign = jnp.where(jnp.arange(kernel.shape[1]) == column, -1.0, 1.0)[:, None]
        return loss(params | {path: params[path].at[layer].multiply(sign)})

    clean = float(of_column(params, jnp.int32(-1)))
    return np.array([float(of_column(params, jnp.int32(c))) - clean for c in columns], np.float32)


def linear_response_threshold(rates: np.ndarray, rises: np.ndarray, tolerance: float = 0.25) -> float:
    """The largest rate up to which rise/rate stays within `tolerance` of its value at the smallest rate.

    Args:
      rates: ascending, above 0.
      rises: of the loss, at these rates.
    """
    slope = rises / rates
    inside = np.abs(slope / slope[0] - 1.0) <= tolerance
    last = len(inside) if inside.all() else int(np.argmin(inside))
    return float(rates[last - 1])
