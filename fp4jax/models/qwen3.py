"""Qwen3, dense (arXiv 2505.09388), in Flax NNX with every linear layer of its blocks under a recipe.

A block is pre-norm: attention with grouped key/value heads, RMSNorm of each query and key head before rotary
positions, then a SwiGLU. No biases. Its seven linear layers go by the paths "layers.{i}.self_attn.q_proj" ...
"layers.{i}.mlp.down_proj". Embedding, head, norms, softmax and attention products stay in high precision.

Parameters are stacked over layers and the block is scanned; layers whose recipes agree share one scan. X is prepared
once for q, k, v and once for gate, up.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

from fp4jax.dot import LINEAR_INPUTS, dot_general, prepare
from fp4jax.layout import Names
from fp4jax.models import wire
from fp4jax.models.cache import CachedAttention
from fp4jax.models.layers import RMSNorm, causal_attention, rotary_angles, rotate, swiglu
from fp4jax.models.segments import Products, segments
from fp4jax.policy import Policy
from fp4jax.statistics import GRADIENT_STATISTICS, Monitor

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip

_CHECKPOINT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "linear_inputs": jax.checkpoint_policies.save_only_these_names(LINEAR_INPUTS),
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """The architecture: sizes as in Hugging Face's configuration of the same model.

    Attributes:
      dtype: of activations and of high-precision products; parameters are float32.
      remat: what the backward recomputes: "none", "full" (everything but a block's input) or "linear_inputs"
        (everything but the prepared inputs of the linear layers).
      gather_weights: when the devices that share a kernel get all of it: "step" (once, quantized if it is to be, and
        held), "layer" (where a layer needs it) or "auto" (`wire.once_a_step`).
      attention: how attention is computed: "auto", "xla" or "cudnn" (`layers.causal_attention`).
      sequence_sharding: whether the devices that share a kernel's features (`tensor`) share the sequences of the
        residual stream (`wire`).
      qk_norm: whether query and key heads are normalized; the architecture's, not to be chosen.
      linears: the linear layers of a block; the architecture's too.
    """

    qk_norm: ClassVar[bool] = True
    linears: ClassVar[tuple[str, ...]] = LINEARS

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: str = "bfloat16"
    remat: str = "none"
    gather_weights: str = "auto"
    attention: str = "auto"
    sequence_sharding: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.gather_weights not in wire.GATHERS:
            raise ValueError(f"gather_weights must be {', '.join(wire.GATHERS)}, got {self.gather_weights!r}")
        if self.remat not in ("none", *_CHECKPOINT_POLICIES):
            raise ValueError(f"remat must be none, {' or '.join(_CHECKPOINT_POLICIES)}, got {self.remat!r}")

    @classmethod
    def from_config(cls, model: ml_collections.ConfigDict) -> "Qwen3Config":
        """From the `model` group of a configuration."""
        return cls(**{field.name: model[field.name] for field in dataclasses.fields(cls)})

    @property
    def linear_paths(self) -> tuple[str, ...]:
        """The paths of the blocks' linear layers, which policies match."""
        return tuple(f"layers.{layer}.{linear}" for layer in range(self.num_layers) for linear in self.linears)


class Linear(nnx.Module):
    """A kernel [L, inputs, outputs], stacked over layers."""

    def __init__(self, layers: int, inputs: int, outputs: int, axes: tuple[str, str], std: float, rngs: nnx.Rngs):
        value = std * jax.random.normal(rngs.params(), (layers, inputs, outputs), jnp.float32)
        self.kernel = nnx.Param(value, out_sharding=("layers", *axes), eager_sharding=False)
        self.axes = axes


class Attention(nnx.Module):
    """The parameters of grouped-query attention."""

    def __init__(self, c: Qwen3Config, rngs: nnx.Rngs):
        linear = functools.partial(Linear, c.num_layers, std=c.init_std, rngs=rngs)
        self.q_proj = linear(c.hidden_size, c.num_heads * c.head_dim, ("embed", "heads"))
        self.k_proj = linear(c.hidden_size, c.num_kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.v_proj = linear(c.hidden_size, c.num_kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.o_proj = linear(c.num_heads * c.head_dim, c.hidden_size, ("heads", "embed"))
        if c.qk_norm:
            self.q_norm = RMSNorm((c.num_layers, c.head_dim), ("layers", None), c.rms_norm_eps)
            self.k_norm = RMSNorm((c.num_layers, c.head_dim), ("layers", None), c.rms_norm_eps)


class MLP(nnx.Module):
    """The parameters of a SwiGLU."""

    def __init__(self, c: Qwen3Config, rngs: nnx.Rngs):
        linear = functools.partial(Linear, c.num_layers, std=c.init_std, rngs=rngs)
        self.gate_proj = linear(c.hidden_size, c.intermediate_size, ("embed", "mlp"))
        self.up_proj = linear(c.hidden_size, c.intermediate_size, ("embed", "mlp"))
        self.down_proj = linear(c.intermediate_size, c.hidden_size, ("mlp", "embed"))


class Block(nnx.Module):
    """All layers' parameters, stacked; a scan calls it with one layer's."""

    mlp_class: ClassVar[type[nnx.Module]] = MLP

    def __init__(self, c: Qwen3Config, rngs: nnx.Rngs):
        self.config = c
        self.input_layernorm = RMSNorm((c.num_layers, c.hidden_size), ("layers", None), c.rms_norm_eps)
        self.self_attn = Attention(c, rngs)
        self.post_attention_layernorm = RMSNorm((c.num_layers, c.hidden_size), ("layers", None), c.rms_norm_eps)
        self.mlp = self.mlp_class(c, rngs)

    def kernel(self, linear: str) -> Float32[Array, "..."]:
        """The kernel of one of the config's `linears`."""
        return functools.reduce(getattr, linear.split("."), self).kernel[...]

    def kernel_axes(self, linear: str) -> tuple[str | None, ...]:
        """The names of the axes of one layer's kernel."""
        return functools.reduce(getattr, linear.split("."), self).axes

    def __call__(
        self, x_BxTxD, rope, products: Products, weights, key, monitor: Monitor | None = None,
        attend=causal_attention, row_mask=None,
    ):  # fmt: skip
        """One layer. `weights`: prepared kernels by name, or None; `key`, `monitor`: the layer's, or None."""
        c, (batch, length, _) = self.config, x_BxTxD.shape
        stream = wire.activations(c.sequence_sharding, length)
        x_BxTxD = wire.placed(x_BxTxD, stream)
        linears = functools.partial(
            self._linears, products=products, weights=weights, key=key, monitor=monitor, row_mask=row_mask
        )
        q, k, v = linears(LINEARS[:3], self.input_layernorm(x_BxTxD))
        q_BxTxNxH, k_BxTxKxH, v_BxTxKxH = (x.reshape(batch, length, -1, c.head_dim) for x in (q, k, v))
        if c.qk_norm:
            q_BxTxNxH, k_BxTxKxH = self.self_attn.q_norm(q_BxTxNxH), self.self_attn.k_norm(k_BxTxKxH)
        mixed = attend(rotate(q_BxTxNxH, rope), rotate(k_BxTxKxH, rope), v_BxTxKxH)
        mixed = mixed.reshape(batch, length, -1)
        x_BxTxD = wire.placed(x_BxTxD + linears(LINEARS[3:4], mixed)[0], stream)
        return x_BxTxD + self._feed_forward(self.post_attention_layernorm(x_BxTxD), linears, monitor)

    def _feed_forward(self, x_BxTxD, linears, monitor: Monitor | None):
        """A SwiGLU; `linears(names, x)` gives the products of x."""
        del monitor
        gate_BxTxF, up_BxTxF = linears(LINEARS[4:6], x_BxTxD)
        return linears(LINEARS[6:], swiglu(gate_BxTxF, up_BxTxF))[0]

    def _linears(self, names, x, *, products: Products, weights, key, monitor: Monitor | None, row_mask):
        """The products of one input with several kernels; x is prepared once for each recipe among them.

        Leading axes of a kernel count independent matrices (experts), and x has them too; `row_mask`: x's real rows.
        """
        prepared, outputs = {}, []
        place_of = functools.partial(self._activations, length=x.shape[1])
        x = wire.placed(x, place_of(names[0], -2))
        for name in names:
            index = self.config.linears.index(name)
            recipe, linear_key = products.recipes[index], _fold(key, index)
            kernel = self.kernel(name)
            batch = tuple(range(kernel.ndim - 2))
            results = place_of(name, -1)
            shared = wire.shared(place_of(name, -2)), wire.shared(results)
            if recipe not in prepared:
                prepared[recipe] = prepare(
                    x, recipe, key=linear_key, row_mask=row_mask, batch_dims=len(batch), backend=products.backend,
                    forward_kept=self.config.remat == "linear_inputs", axes=shared[0],
                )  # fmt: skip
            output = dot_general(
                x, kernel.astype(x.dtype) if recipe.fprop.is_high_precision else kernel,
                (((x.ndim - 1,), (len(batch),)), (batch, batch)),
                preferred_element_type=x.dtype, recipe=recipe, key=linear_key, lhs_q=prepared[recipe],
                rhs_q=None if weights is None else weights[name], backend=products.backend, gemm=products.gemm,
                row_mask=row_mask, probe=None if monitor is None else monitor.probes.get(name),
                axes=shared,
            )  # fmt: skip
            if monitor is not None and name in monitor.probes:
                monitor.record(name, x, prepared[recipe], kernel, weights[name], recipe, row_mask)
            outputs.append(wire.placed(output, results))
        return outputs

    def _activations(self, linear: str, axis: int, length: int) -> Names | None:
        """Names of the axes of a linear layer's input (axis -2 of its kernel) or output (-1): `wire.activations`."""
        axes = self.kernel_axes(linear)
        return None if len(axes) > 2 else wire.activations(self.config.sequence_sharding, length, axes[axis])


class Qwen3(nnx.Module):
    """tokens → logits. Keys are explicit: nothing random is stored."""

    block_class: ClassVar[type[Block]] = Block

    def __init__(
        self, config: Qwen3Config, *, policy: Policy, rngs: nnx.Rngs, backend: str = "auto", gemm: str = "auto"
    ):
        """Draws every matrix from a normal distribution of `config.init_std`.

        Args:
          policy: gives every linear layer its recipe, by paths such as "layers.3.mlp.down_proj".
          backend, gemm: as in `fp4jax.dot_general`.

        Raises:
          ValueError: a rule of the policy that matches no layer.
        """
        self.config = config
        self.segments = segments(config.linears, config.num_layers, policy, backend, gemm)
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = _matrix(vocabulary, ("vocab", "embed"), config.init_std, rngs)
        self.layers = self.block_class(config, rngs)
        self.norm = RMSNorm((config.hidden_size,), (None,), config.rms_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = _matrix(vocabulary, ("vocab", "embed"), config.init_std, rngs)

    def __call__(
        self,
        tokens_BxT: Int[Array, "B T"],
        *,
        key=None,
        weights: PyTree = None,
        monitor: Monitor | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float32[Array, "B T V"]:
        """Logits of the next token at every position.

        Args:
          key: a JAX random key, needed when differentiating a recipe that rounds stochastically.
          weights: what `prepare_weights` returned for these parameters; None prepares them on the way.
          monitor: takes statistics of the linear layers it has probes for (`self.probes()`), which needs `weights`, and
            of the routing, if there is one.
          segment_ids: the document that each token belongs to: attention stays inside it, but for tokens of
            `layers.EVERY_SEGMENT`, which all behind them see. None: all are of one.
          positions: of each token in its document; None: in the sequence.
        """
        hidden = self.hidden(
            tokens_BxT, key=key, weights=weights, monitor=monitor, segment_ids=segment_ids, positions=positions
        )
        return self.logits(hidden)

    @property
    def head(self) -> Float32[Array, "V D"]:
        """The matrix of the output head: the embedding, or a matrix of its own."""
        return (self.embedding if self.config.tie_embeddings else self.lm_head)[...]

    def logits(self, hidden_BxTxD: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """The output head's products."""
        return lax.dot_general(
            hidden_BxTxD, self.head.astype(hidden_BxTxD.dtype), (((2,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def hidden(
        self,
        tokens_BxT: Int[Array, "B T"],
        *,
        key=None,
        weights: PyTree = None,
        monitor: Monitor | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cached: CachedAttention | None = None,
        row_mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The normalized output of the last layer.

        Args:
          cached: the tokens before these, which attention reaches too; it takes up these.
          row_mask: True for real tokens. Others, which must stand behind them, count in no mean and no scale of a
            recipe; what is returned for them has no meaning.
        """
        c = self.config
        stream = wire.activations(c.sequence_sharding, tokens_BxT.shape[1])
        x_BxTxD = jnp.take(self.embedding[...], tokens_BxT, axis=0).astype(c.dtype)
        # The devices have parts of the vocabulary: whole sequences first, or XLA gathers the embedding.
        whole = wire.activations(c.sequence_sharding, tokens_BxT.shape[1], None)
        x_BxTxD = wire.placed(wire.placed(x_BxTxD, whole), stream)
        if positions is None:
            length = tokens_BxT.shape[1]
            positions = jnp.arange(length) if cached is None else cached.positions(length)
        rope = rotary_angles(positions, c.head_dim, c.rope_theta)
        attend = functools.partial(causal_attention, segments_BxT=segment_ids, implementation=c.attention)
        for index, segment in enumerate(self.segments):
            prepared = None if weights is None else weights[index]
            x_BxTxD = self._scan(x_BxTxD, rope, segment, prepared, key, monitor, attend, cached, row_mask)
        return wire.placed(self.norm(x_BxTxD), stream)

    def probes(self) -> dict[str, Float32[Array, "L s"]]:
        """Zeros for a `Monitor`: their cotangents are GRADIENT_STATISTICS of every linear layer."""
        c = self.config
        return {name: jnp.zeros((c.num_layers, len(GRADIENT_STATISTICS)), jnp.float32) for name in c.linears}

    def prepare_weights(self, key) -> PyTree:
        """Every kernel prepared under its recipe, to be used by several calls with the same parameters."""
        return [self._prepare_segment(segment, key) for segment in self.segments]

    def _scan(
        self, x_BxTxD, rope, segment, weights, key, monitor: Monitor | None, attend=causal_attention, cached=None,
        row_mask=None,
    ):  # fmt: skip
        layers, products = segment
        graphdef, state = nnx.split(self.layers)

        def one_layer(carry, per_layer):
            x_BxTxD, cache = carry
            state, weights, index, probes = per_layer
            if weights is not None:
                weights = {name: wire.whole(found, self.layers.kernel_axes(name)) for name, found in weights.items()}
            own = None if probes is None else Monitor(probes)
            of_layer = attend if cached is None else cached.layer(cache, index)
            x_BxTxD = nnx.merge(graphdef, state)(
                x_BxTxD, rope, products, weights, _fold(key, index), own, of_layer, row_mask
            )
            cache = None if cached is None else of_layer.cache
            return (x_BxTxD, cache), None if own is None else own.of_layer

        if self.config.remat != "none":
            checkpoint_policy = _CHECKPOINT_POLICIES[self.config.remat]
            # A scan keeps forward and backward apart, but for one of a single step, which XLA takes out of its loop.
            alone = len(layers) == 1
            one_layer = jax.checkpoint(one_layer, policy=checkpoint_policy, prevent_cse=alone)
        probes = None if monitor is None else _slice(monitor.probes, layers)
        start = (x_BxTxD, None if cached is None else cached.cache)
        per_layer = (_slice(state, layers), weights, _indices(layers), probes)
        (x_BxTxD, cache), found = lax.scan(one_layer, start, per_layer)
        if cached is not None:
            cached.cache = cache
        if monitor is not None:
            monitor.append(*found)
        return x_BxTxD

    def _prepare_segment(self, segment, key):
        layers, products = segment
        linears = self.config.linears
        kernels = {name: _slice(self.layers.kernel(name), layers) for name in linears}

        def one_layer(per_layer):
            kernels, layer = per_layer
            prepared = {}
            for index, (name, recipe) in enumerate(zip(linears, products.recipes, strict=True)):
                high_precision = recipe.fprop.is_high_precision
                axes = self.layers.kernel_axes(name)
                kernel = kernels[name].astype(self.config.dtype) if high_precision else kernels[name]
                ours = prepare(
                    wire.whole_blocks(kernel, axes), recipe, "rhs", _fold(_fold(key, layer), index),
                    batch_dims=kernel.ndim - 2, backend=products.backend,
                )  # fmt: skip
                at_once = wire.once_a_step(self.config.gather_weights, high_precision)
                prepared[name] = wire.gathered(ours, axes) if at_once else wire.split(ours, axes)
            return prepared

        # One layer at a time: quantizing all at once would hold float32 temporaries of the whole model.
        return lax.map(one_layer, (kernels, _indices(layers)))


def _matrix(shape, axes, std, rngs: nnx.Rngs) -> nnx.Param:
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def _slice(tree, layers: range):
    return jax.tree.map(lambda x: x if len(layers) == x.shape[0] else x[layers.start : layers.stop], tree)


def _indices(layers: range):
    return jnp.arange(layers.start, layers.stop)


def _fold(key, data):
    return None if key is None else jax.random.fold_in(key, data)
