"""A small transformer whose every linear layer is one of `benchmarks.linears`: the same step for every contender.

Embedding, pre-norm blocks of causal attention and SwiGLU without biases, tied output in float32; plain SGD, so that
what is timed is the model. Arrays are float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, PyTree

from benchmarks.linears import Linear


class Sizes(NamedTuple):
    """Of the model and its batch."""

    sequences: int = 8
    length: int = 256
    width: int = 256
    heads: int = 4
    hidden: int = 768
    layers: int = 4
    vocabulary: int = 4096


def parameters(sizes: Sizes, key: Array) -> PyTree:
    """Normal with standard deviation 1 / sqrt(inputs), divided by sqrt(2 x layers) where a block ends; stacked."""
    shapes = {
        "qkv": (sizes.width, 3 * sizes.width), "out": (sizes.width, sizes.width),
        "gate_up": (sizes.width, 2 * sizes.hidden), "down": (sizes.hidden, sizes.width),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes) + 1)
    layers = {
        name: jax.random.normal(k, (sizes.layers, *shape)) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
    }
    layers |= {name: layers[name] * (2 * sizes.layers) ** -0.5 for name in ("out", "down")}
    embedding = jax.random.normal(keys[0], (sizes.vocabulary, sizes.width)) * sizes.width**-0.5
    return {"embedding": embedding, "layers": layers}


def loss(product: Linear, sizes: Sizes, params: PyTree, tokens: Int32[Array, "B T+1"], key) -> Float32[Array, ""]:
    """Mean negative log-likelihood of the next token, nats."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    x = params["embedding"][inputs].reshape(-1, sizes.width)

    def block(x, index):
        weights = {name: stacked[index] for name, stacked in params["layers"].items()}
        keys = jax.random.split(jax.random.fold_in(key, index), 4)
        qkv = product(_normalized(x), weights["qkv"], keys[0])
        q, k, v = jnp.split(qkv.reshape(sizes.sequences, sizes.length, 3 * sizes.heads, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(-1, sizes.width)
        x = x + product(mixed, weights["out"], keys[1])
        gate, up = jnp.split(product(_normalized(x), weights["gate_up"], keys[2]), 2, axis=1)
        return x + product(jax.nn.silu(gate) * up, weights["down"], keys[3])

    for index in range(sizes.layers):  # and not a scan, in which jax.nn.scaled_dot_general cannot be differentiated
        x = block(x, index)
    logits = _normalized(x) @ params["embedding"].T
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def training_step(product: Linear, sizes: Sizes, rate: float = 0.1) -> Callable:
    """(params, tokens, key) → (params, loss, gradients)."""

    def step(params, tokens, key):
        value, gradients = jax.value_and_grad(lambda p: loss(product, sizes, p, tokens, key))(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradients), value, gradients

    return step


def _normalized(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
