"""The random experiments, one draw at a time: a jitted function of a key that returns sums for every input.

A draw has its own weights. Arrays end in [..., 3, inputs]: |y|², <y, d> and |d|² with d = y' - y, from which every
energy, radial fraction and angle follows on the host, in float64.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, PyTree

_JAX_ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


def run_draws(draw: Callable[..., PyTree], seed: int, draws: int, **arguments: Any) -> PyTree:
    """Stacks draws 0, 1, ... of `draw(key, **arguments)` along a new first axis, as float64 on the host."""
    key = jax.random.key(seed)
    results = [jax.device_get(draw(jax.random.fold_in(key, index), **arguments)) for index in range(draws)]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *results)


def _sums(y: Float32[Array, "n inputs"], perturbed: Float32[Array, "n inputs"]) -> Float32[Array, "3 inputs"]:
    d = perturbed - y
    return jnp.stack([jnp.sum(y * y, axis=0), jnp.sum(y * d, axis=0), jnp.sum(d * d, axis=0)])


def _flips(u: Float32[Array, "n inputs"], v: Float32[Array, "n inputs"]) -> Float32[Array, " inputs"]:
    return jnp.mean((u > 0.0) != (v > 0.0), axis=0, dtype=jnp.float32)


def _weights(key: Array, width: int) -> Float32[Array, "n n"]:
    return jax.random.normal(key, (width, width), jnp.float32) * (width**-0.5)


def _inputs(key: Array, width: int, inputs: int) -> Float32[Array, "n inputs"]:
    """Gaussian inputs of norm 1, on average, so that pre-activations of a width's weights have unit variance."""
    return jax.random.normal(key, (width, inputs), jnp.float32)


def _sign_and_magnitude(w: Float32[Array, "n n"], flip: Array) -> tuple[Float32[Array, "n n"], Float32[Array, "n n"]]:
    """w with the signs under `flip` changed, and w with every magnitude raised to the same Frobenius norm."""
    flipped = jnp.where(flip, -w, w)
    shift = jnp.sqrt(jnp.mean((flipped - w) ** 2))
    return flipped, w + shift * jnp.sign(w)


@functools.partial(jax.jit, static_argnames=("width", "inputs", "activation"))
def block_draw(
    key: Array, rates: Float32[Array, " rates"], *, width: int, inputs: int, activation: str = "relu"
) -> dict[str, Float32[Array, "..."]]:
    """A block y = W2 f(W1 x) under sign flips of W1 and the magnitude change of equal norm.

    Returns:
      "linear", "hidden" and "output": sums [rates, 2, 3, inputs] of W1 x, f(W1 x) and y; sign flips first.
      "gate_flips": the share of pre-activations whose sign changed [rates, 2, inputs].
    """
    keys = jax.random.split(key, 4)
    w1, w2, x = _weights(keys[0], width), _weights(keys[1], width), _inputs(keys[2], width, inputs)
    uniform = jax.random.uniform(keys[3], (width, width), jnp.float32)
    function = _JAX_ACTIVATIONS[activation]
    u = w1 @ x
    hidden = function(u)
    output = w2 @ hidden

    def one_rate(rate: Float32[Array, ""]) -> dict[str, Array]:
        pairs = []
        for perturbed in _sign_and_magnitude(w1, uniform < rate):
            v = perturbed @ x
            moved = function(v)
            sums = {"linear": _sums(u, v), "hidden": _sums(hidden, moved), "output": _sums(output, w2 @ moved)}
            pairs.append(sums | {"gate_flips": _flips(u, v)})
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)

    return lax.map(one_rate, rates)


@functools.partial(jax.jit, static_argnames=("width", "inputs", "layers"))
def depth_draw(
    key: Array, rate: Float32[Array, ""], *, width: int, inputs: int, layers: int
) -> dict[str, Float32[Array, "layers 2 3 inputs"]]:
    """Stacks of blocks without and with a residual, each perturbed stack feeding its own output on.

    Returns:
      "plain" and "residual": sums before the last RMSNorm of every layer; sign flips first.
    """

    def normalize(y: Float32[Array, "n inputs"]) -> Float32[Array, "n inputs"]:
        return y * lax.rsqrt(jnp.mean(y * y, axis=0, keepdims=True))

    def layer(streams: PyTree, index: Array):
        keys = jax.random.split(jax.random.fold_in(key, index), 3)
        w1, w2 = _weights(keys[0], width), _weights(keys[1], width)
        flip = jax.random.uniform(keys[2], (width, width), jnp.float32) < rate
        matrices = (w1, *_sign_and_magnitude(w1, flip))
        sums, carried = {}, {}
        for name, stream in streams.items():
            branches = [w2 @ jax.nn.relu(w @ x) for w, x in zip(matrices, stream, strict=True)]
            through = stream if name == "residual" else [jnp.zeros_like(x) for x in stream]
            y = [x + branch for x, branch in zip(through, branches, strict=True)]
            sums[name] = jnp.stack([_sums(y[0], y[1]), _sums(y[0], y[2])])
            carried[name] = tuple(map(normalize, y))
        return carried, sums

    x = normalize(_inputs(jax.random.fold_in(key, layers), width, inputs))
    return lax.scan(layer, {"plain": (x, x, x), "residual": (x, x, x)}, jnp.arange(layers))[1]


@functools.partial(jax.jit, static_argnames=("width", "inputs"))
def ternary_draw(
    key: Array, threshold: Float32[Array, ""], *, width: int, inputs: int
) -> dict[str, Float32[Array, "..."]]:
    """relu(W x) against relu(Wq x), Wq = mean|w| sign(w) row by row, zero where |w| <= threshold rms(w).

    Returns:
      "linear" and "hidden": sums [3, inputs] of W x and relu(W x).
      "quadrants": the hidden energy with both gates open, closing and opening [3, inputs].
      "gate_flips": [inputs].  "cos2": of every row with its quantized row [n].
    """
    keys = jax.random.split(key, 2)
    w, x = _weights(keys[0], width), _inputs(keys[1], width, inputs)
    magnitude = jnp.abs(w)
    kept = jnp.where(magnitude > threshold * width**-0.5, jnp.sign(w), 0.0)
    quantized = jnp.mean(magnitude, axis=1, keepdims=True) * kept
    u, v = w @ x, quantized @ x
    hidden, moved = jax.nn.relu(u), jax.nn.relu(v)
    energy = (moved - hidden) ** 2
    quadrants = [(u > 0.0) & (v > 0.0), (u > 0.0) & (v <= 0.0), (u <= 0.0) & (v > 0.0)]
    inner = jnp.sum(w * quantized, axis=1)
    return {
        "linear": _sums(u, v),
        "hidden": _sums(hidden, moved),
        "quadrants": jnp.stack([jnp.sum(jnp.where(q, energy, 0.0), axis=0) for q in quadrants]),
        "gate_flips": _flips(u, v),
        "cos2": inner**2 / (jnp.sum(w * w, axis=1) * jnp.sum(quantized * quantized, axis=1)),
    }


@functools.partial(jax.jit, static_argnames=("width", "inputs"))
def outlier_draw(
    key: Array, alphas: Float32[Array, " alphas"], *, width: int, inputs: int
) -> dict[str, Float32[Array, "..."]]:
    """One outlier input of amplitude alpha among `width`: its weight's sign flipped, against another input's.

    The other inputs have equal amplitudes. Units are independent, and a unit's other n - 2 inputs enter through their
    sum alone, which is drawn as what it is, a Gaussian: width and alpha are exact, and units are cheap.

    Returns:
      "energy": mean of (relu(v) - relu(u))² [alphas, 2], the outlier first.  "gate_flips": [alphas, 2].
      "flip_energy": the part of the energy where the gate flips [alphas, 2].
    """
    own, other, rest = jax.random.normal(key, (3, inputs), jnp.float32)

    def one_alpha(alpha: Float32[Array, ""]) -> dict[str, Array]:
        beta = jnp.sqrt((1.0 - alpha**2) / (width - 1))
        u = alpha * own + beta * other + beta * (width - 2) ** 0.5 * rest
        results = []
        for flipped in (alpha * own, beta * other):
            v = u - 2.0 * flipped
            energy, flip = (jax.nn.relu(v) - jax.nn.relu(u)) ** 2, (u > 0.0) != (v > 0.0)
            flip_energy = jnp.mean(jnp.where(flip, energy, 0.0))
            gate_flips = jnp.mean(flip, dtype=jnp.float32)
            results.append({"energy": jnp.mean(energy), "gate_flips": gate_flips, "flip_energy": flip_energy})
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return lax.map(one_alpha, alphas)


@functools.partial(jax.jit, static_argnames=("width", "inputs", "outliers"))
def columns_draw(
    key: Array, gammas: Float32[Array, " gammas"], *, width: int, inputs: int, outliers: int
) -> Float32[Array, "gammas 2 inputs"]:
    """Mean of (relu(v) - relu(u))² when the first `outliers` columns flip, and when all others do.

    The outlier columns hold the share gamma of every input's energy.
    """
    keys = jax.random.split(key, 2)
    # Pre-activations of unit variance need the energy of x, not of the weights, to be 1.
    w, x = width**0.5 * _weights(keys[0], width), _inputs(keys[1], width, inputs)
    first, last = x[:outliers], x[outliers:]
    first = w[:, :outliers] @ (first / jnp.linalg.norm(first, axis=0, keepdims=True))
    last = w[:, outliers:] @ (last / jnp.linalg.norm(last, axis=0, keepdims=True))

    def one_gamma(gamma: Float32[Array, ""]) -> Float32[Array, "2 inputs"]:
        a, b = jnp.sqrt(gamma) * first, jnp.sqrt(1.0 - gamma) * last
        clean = jax.nn.relu(a + b)
        return jnp.stack([jnp.mean((jax.nn.relu(v) - clean) ** 2, axis=0) for v in (b - a, a - b)])

    return lax.map(one_gamma, gammas)
