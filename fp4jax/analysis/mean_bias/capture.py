"""One forward pass with the activations that the analysis reads, on any model of `fp4jax.models`, in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from fp4jax.analysis.geometry.real_model import apply_layer, plain_products, scan_layers
from fp4jax.models.layers import rotate
from fp4jax.models.qwen3 import Qwen3

SITES = ("residual stream", "attention input", "MLP input")
OPERATORS = ("values", "attention output", "gate", "up", "silu(gate)", "SwiGLU output")

Affine = tuple[Float32[Array, " D"], Float32[Array, "D D"]]


@functools.partial(nnx.jit, static_argnames=("skip",))
def capture(
    model: Qwen3, tokens_BxT: Int[Array, "B T"], affine: Affine | None = None, *, skip: int = 0
) -> tuple[Float32[Array, "tokens D"], dict[str, dict[str, Float32[Array, "L ..."]]]]:
    """Runs the layers with products in float32.

    Args:
      affine: (mu, W) replaces the embedded tokens by (x - mu) W; None leaves them.
      skip: leading positions of every row that are computed but not returned.

    Returns:
      The embedded tokens [tokens, D], and
      "sites": SITES [L, tokens, D], the residual stream after the layer;
      "sums", "energies": of OPERATORS over tokens [L, n], [L]; values repeated for the query heads that read them;
      "squares": column sums of gate², up² and gate up as "gate", "up", "gate up" [L, F];
      "softmax": "uniform", the share of a row of attention weights' energy in its mean over visible keys [L].
    """
    c = model.config
    batch, length = tokens_BxT.shape

    def rows(x: Float32[Array, "B T n"]) -> Float32[Array, "tokens n"]:
        return x[:, skip:].reshape(-1, x.shape[-1])

    def layer(block, x_BxTxD, rope):
        seen, plain = {}, plain_products(block)

        def product(name: str, x: Float32[Array, "B T inputs"]) -> Float32[Array, "B T outputs"]:
            seen[name] = (x, plain(name, x))
            return seen[name][1]

        x_BxTxD = apply_layer(block, x_BxTxD, rope, product)
        gate, up = rows(seen["mlp.gate_proj"][1]), rows(seen["mlp.up_proj"][1])
        values = seen["self_attn.v_proj"][1].reshape(batch, length, c.num_kv_heads, c.head_dim)
        values = jnp.repeat(values, c.num_heads // c.num_kv_heads, axis=2).reshape(batch, length, -1)
        mixed, hidden = seen["self_attn.o_proj"][0], seen["mlp.down_proj"][0]
        operators = (rows(values), rows(mixed), gate, up, jax.nn.silu(gate), rows(hidden))
        sites = (x_BxTxD, seen["self_attn.q_proj"][0], seen["mlp.gate_proj"][0])
        record = {
            "sites": dict(zip(SITES, map(rows, sites), strict=True)),
            "sums": {name: x.sum(axis=0) for name, x in zip(OPERATORS, operators, strict=True)},
            "energies": {name: jnp.sum(x * x) for name, x in zip(OPERATORS, operators, strict=True)},
            "squares": {name: x.sum(axis=0) for name, x in (("gate", gate**2), ("up", up**2), ("gate up", gate * up))},
            "softmax": {"uniform": _uniform_share(block, seen, rope, skip)},
        }
        return x_BxTxD, record

    x_BxTxD = jnp.take(model.embedding[...], tokens_BxT, axis=0).astype(jnp.float32)
    if affine is not None:
        x_BxTxD = (x_BxTxD - affine[0][None, None, :]) @ affine[1]
    return rows(x_BxTxD), scan_layers(model, tokens_BxT, layer, lambda _: x_BxTxD)[1]


def _uniform_share(block, seen: dict, rope, skip: int) -> Float32[Array, ""]:
    """Mean over heads and queries of (1 / visible keys) / sum_j w_j²: 1 for uniform attention."""
    batch, length, _ = seen["self_attn.q_proj"][1].shape
    q, k = (seen[f"self_attn.{n}_proj"][1].reshape(batch, length, -1, block.config.head_dim) for n in "qk")
    if block.config.qk_norm:
        q, k = block.self_attn.q_norm(q), block.self_attn.k_norm(k)
    q, k = rotate(q, rope), rotate(k, rope)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / block.config.head_dim**0.5
    visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    uniform = 1.0 / jnp.arange(1, length + 1, dtype=jnp.float32)
    return jnp.mean((uniform[None, None, :] / jnp.sum(weights * weights, axis=-1))[..., skip:])
