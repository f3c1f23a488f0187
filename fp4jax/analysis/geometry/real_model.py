"""A trained model taken apart: what its linear layers read, and what quantization or flipped signs do to it.

Works on every dense model of `fp4jax.models` (RMSNorm, attention, RMSNorm, gated MLP), pretrained or random.
Sums are as in `fp4jax.analysis.geometry.simulation`: |y|², <y, d>, |d|² for every token.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from fp4jax.dot import dot_general
from fp4jax.models.layers import causal_attention, rotary_angles, rotate
from fp4jax.models.qwen3 import LINEARS, Qwen3
from fp4jax.recipes import Recipe

Product = Callable[[str, Float[Array, "B T inputs"]], Float[Array, "B T outputs"]]


def apply_layer(block, x_BxTxD: Float32[Array, "B T D"], rope, product: Product) -> Float32[Array, "B T D"]:
    """One layer with its products left open: `product(name, input)`, name one of LINEARS."""
    batch, length, _ = x_BxTxD.shape
    heads = (batch, length, -1, block.config.head_dim)
    h_BxTxD = block.input_layernorm(x_BxTxD)
    q, k, v = (product(name, h_BxTxD).reshape(heads) for name in LINEARS[:3])
    if block.config.qk_norm:
        q, k = block.self_attn.q_norm(q), block.self_attn.k_norm(k)
    mixed = causal_attention(rotate(q, rope), rotate(k, rope), v).reshape(batch, length, -1)
    x_BxTxD = x_BxTxD + product(LINEARS[3], mixed)
    h_BxTxD = block.post_attention_layernorm(x_BxTxD)
    gate, up = (product(name, h_BxTxD) for name in LINEARS[4:6])
    return x_BxTxD + product(LINEARS[6], jax.nn.silu(gate) * up)


def plain_products(block) -> Product:
    """Products in float32."""
    return lambda name, x: jnp.einsum("bti,io->bto", x, block.kernel(name), precision=lax.Precision.HIGHEST)


def _quantized(block, recipe: Recipe) -> Product:
    """Products under a recipe's forward."""
    dimensions = (((2,), (0,)), ((), ()))
    return lambda name, x: dot_general(
        x, block.kernel(name), dimensions, preferred_element_type=jnp.float32, recipe=recipe
    )


def scan_layers(model: Qwen3, tokens_BxT: Int[Array, "B T"], layer: Callable, carry: Callable):
    """Scans `layer(block, carried, rope)` over the model's layers, starting with `carry(embedded tokens)`."""
    x_BxTxD = jnp.take(model.embedding[...], tokens_BxT, axis=0).astype(jnp.float32)
    rope = rotary_angles(jnp.arange(tokens_BxT.shape[1]), model.config.head_dim, model.config.rope_theta)
    graphdef, state = nnx.split(model.layers)
    return lax.scan(lambda x, s: layer(nnx.merge(graphdef, s), x, rope), carry(x_BxTxD), state)


def _sums(y: Float32[Array, "B T n"], perturbed: Float32[Array, "B T n"]) -> Float32[Array, "3 tokens"]:
    d = perturbed - y
    return jnp.stack([jnp.sum(a * b, axis=-1).ravel() for a, b in ((y, y), (y, d), (d, d))])


@nnx.jit
def trace(model: Qwen3, tokens_BxT: Int[Array, "B T"]) -> dict[str, Float32[Array, "L ..."]]:
    """What the layers read and write, in float32.

    Returns:
      "alpha2 NAME", for every name of LINEARS: its inputs' shares of energy, mean over tokens of x_j²/|x|² [L, inputs].
      "mlp": what gate_proj and up_proj read [L, tokens, D].
      "stream": the residual stream after every layer [L, B, T, D].
    """

    def layer(block, x_BxTxD, rope):
        record = {}
        plain = plain_products(block)

        def product(name: str, x: Float32[Array, "B T inputs"]) -> Float32[Array, "B T outputs"]:
            shares = x * x / jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30)
            record[f"alpha2 {name}"] = jnp.mean(shares, axis=(0, 1))
            if name == "mlp.gate_proj":
                record["mlp"] = x.reshape(-1, x.shape[-1])
            return plain(name, x)

        x_BxTxD = apply_layer(block, x_BxTxD, rope, product)
        return x_BxTxD, record | {"stream": x_BxTxD}

    return scan_layers(model, tokens_BxT, layer, lambda x: x)[1]


@functools.partial(nnx.jit, static_argnames=("recipe",))
def quantization_errors(
    model: Qwen3, tokens_BxT: Int[Array, "B T"], *, recipe: Recipe
) -> dict[str, Float32[Array, "L ..."]]:
    """Where a recipe's forward errors point: along what they are added to, or across it.

    Returns:
      "products": sums of every linear layer's output, on its input in high precision [L, 7, 3, tokens].
      "layer": sums of the residual stream after one quantized layer, on the stream in high precision [L, 3, tokens].
      "stack": sums of the residual stream when all layers so far are quantized [L, 3, tokens].

    Raises:
      ValueError: a recipe that draws random bits in the forward.
    """

    def layer(block, streams, rope):
        clean, stacked = streams
        products = []
        plain, quantized = plain_products(block), _quantized(block, recipe)

        def both(name: str, x: Float32[Array, "B T inputs"]) -> Float32[Array, "B T outputs"]:
            y = plain(name, x)
            products.append(_sums(y, quantized(name, x)))
            return y

        after = apply_layer(block, clean, rope, both)
        alone = apply_layer(block, clean, rope, quantized)
        stacked = apply_layer(block, stacked, rope, quantized)
        sums = {"products": jnp.stack(products), "layer": _sums(after, alone), "stack": _sums(after, stacked)}
        return (after, stacked), sums

    return scan_layers(model, tokens_BxT, layer, lambda x: (x, x))[1]


def row_alignments(kernel: Float32[Array, "L inputs outputs"]) -> Float32[Array, "L outputs"]:
    """cos²(w, sign w) of every output's weights; 0 where all of them are 0."""
    inputs = kernel.shape[1]
    energy = jnp.sum(kernel * kernel, axis=1)
    return jnp.sum(jnp.abs(kernel), axis=1) ** 2 / jnp.maximum(inputs * energy, 1e-30)


@functools.partial(jax.jit, static_argnames=("activation",))
def mlp_ratio_sums(
    key: Array,
    rate: Float32[Array, ""],
    x: Float32[Array, "L tokens D"],
    gate: Float32[Array, "L D F"],
    down: Float32[Array, "L F D"],
    *,
    activation: Callable,
) -> dict[str, Float32[Array, "L ..."]]:
    """Experiment B: y = f(x gate) down in every layer, gate under sign flips and the magnitude change of equal norm.

    Returns:
      "sums": of y [L, 2, 3, tokens], sign flips first.  "scale": rms of the pre-activations [L].
    """

    def layer(of_layer):
        index, x, gate, down = of_layer
        flipped = jnp.where(jax.random.uniform(jax.random.fold_in(key, index), gate.shape) < rate, -gate, gate)
        direction = jnp.sign(gate)  # a weight that is 0 stays 0
        shift = jnp.linalg.norm(flipped - gate) / jnp.linalg.norm(direction)
        u = x @ gate
        y = activation(u) @ down
        moved = [activation(x @ w) @ down for w in (flipped, gate + shift * direction)]
        sums = jnp.stack([_sums(y[None], m[None]) for m in moved])
        return {"sums": sums, "scale": jnp.sqrt(jnp.mean(u * u))}

    return lax.map(layer, (jnp.arange(x.shape[0]), x, gate, down))


@functools.partial(jax.jit, static_argnames=("activation",))
def column_energies(
    x: Float32[Array, "tokens D"], kernel: Float32[Array, "D F"], *, activation: Callable
) -> Float32[Array, " D"]:
    """Experiment F: mean over tokens of |f(u - 2 x_j w_j) - f(u)|²/|f(u)|², for every input column j flipped alone."""
    u = x @ kernel
    clean = activation(u)
    energy = jnp.sum(clean * clean, axis=-1)

    def column(of_column):
        x_j, w_j = of_column
        moved = activation(u - 2.0 * x_j[:, None] * w_j[None, :])
        return jnp.mean(jnp.sum((moved - clean) ** 2, axis=-1) / energy)

    return lax.map(column, (x.T, kernel))
