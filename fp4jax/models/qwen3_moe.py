"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with a router and experts in place of every block's SwiGLU.

Each token goes to the `num_experts_per_token` experts that its router finds likeliest. The experts' linear layers run
under the recipe as one product with a batch axis of experts, and go by the paths "layers.{i}.mlp.experts.gate_proj",
"up_proj" and "down_proj": a layer's experts share a recipe, and each has its own means and tensor scales, over the
tokens that it received. The router works in float32.

An expert has a fixed number of slots for each group of tokens (`exchange`). A token that finds none free passes that
expert by: its other experts and the residual connection are what remains.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from fp4jax.layout import place
from fp4jax.models import exchange, wire
from fp4jax.models.layers import swiglu
from fp4jax.models.qwen3 import LINEARS as DENSE_LINEARS
from fp4jax.models.qwen3 import Block, Qwen3, Qwen3Config
from fp4jax.models.routing import (
    Slots,
    assign_slots,
    choose,
    combine,
    dispatch,
    load_balancing_loss,
    routing_sums,
)
from fp4jax.statistics import Monitor

EXPERTS = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
LINEARS = (*DENSE_LINEARS[:4], *EXPERTS)

FULL = "full"
"""A capacity: slots for every token in every expert, so that none is dropped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(Qwen3Config):
    """The architecture. `intermediate_size` is an expert's (Hugging Face's `moe_intermediate_size`).

    Attributes:
      norm_topk_prob: whether the weights of a token's experts are made to sum to one.
      capacity: slots of an expert over the tokens it would get if all got the same, a number such as "1.25"; or "full".
      groups: of whole sequences, in which a microbatch's tokens are routed: each has slots of its own in every expert.
        Of a call whose sequences they do not divide, the greatest common divisor.
      router_loss_coefficient: of the load-balancing loss in the loss that is trained.
    """

    linears: ClassVar[tuple[str, ...]] = LINEARS

    num_experts: int
    num_experts_per_token: int
    norm_topk_prob: bool = True
    capacity: str = FULL
    groups: int = 1
    router_loss_coefficient: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} must be from 1 to num_experts={self.num_experts}"
            )
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if self.capacity != FULL and not _positive_number(self.capacity):
            raise ValueError(f"capacity must be {FULL!r} or a number above 0 such as '1.25', got {self.capacity!r}")

    @classmethod
    def from_config(cls, model: ml_collections.ConfigDict) -> "Qwen3MoEConfig":
        """From the `model` group of a configuration."""
        dense = {field.name: model[field.name] for field in dataclasses.fields(Qwen3Config)}
        return cls(**dense, **model.moe)

    def slots(self, tokens: int) -> int:
        """Slots of an expert for a group's tokens: capacity x tokens x chosen / experts, up to a multiple of 16."""
        if self.capacity == FULL:
            return tokens
        fair = Fraction(self.capacity) * tokens * self.num_experts_per_token / self.num_experts
        return min(math.ceil(fair / exchange.BLOCK) * exchange.BLOCK, tokens)


def _positive_number(text: str) -> bool:
    try:
        return Fraction(text) > 0
    except (ValueError, ZeroDivisionError):
        return False


class Router(nnx.Module):
    """A kernel [L, D, E], in float32 throughout."""

    def __init__(self, c: Qwen3MoEConfig, rngs: nnx.Rngs):
        value = c.init_std * jax.random.normal(rngs.params(), (c.num_layers, c.hidden_size, c.num_experts), jnp.float32)
        self.kernel = nnx.Param(value, out_sharding=("layers", "embed", None), eager_sharding=False)

    def __call__(self, x_SxD: Float[Array, "S D"]) -> Float32[Array, "S E"]:
        """Logits of one layer, whose kernel a scan has taken out."""
        contract = (((1,), (0,)), ((), ()))
        return lax.dot_general(x_SxD.astype(jnp.float32), self.kernel[...], contract, precision=lax.Precision.HIGHEST)


class ExpertLinear(nnx.Module):
    """A kernel [L, E, inputs, outputs]."""

    def __init__(self, c: Qwen3MoEConfig, inputs: int, outputs: int, axes: tuple[str, str], rngs: nnx.Rngs):
        shape = (c.num_layers, c.num_experts, inputs, outputs)
        value = c.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(value, out_sharding=("layers", "expert", *axes), eager_sharding=False)
        self.axes = ("expert", *axes)


class Experts(nnx.Module):
    """The parameters of all experts' SwiGLUs."""

    def __init__(self, c: Qwen3MoEConfig, rngs: nnx.Rngs):
        linear = functools.partial(ExpertLinear, c, rngs=rngs)
        self.gate_proj = linear(c.hidden_size, c.intermediate_size, ("embed", "mlp"))
        self.up_proj = linear(c.hidden_size, c.intermediate_size, ("embed", "mlp"))
        self.down_proj = linear(c.intermediate_size, c.hidden_size, ("mlp", "embed"))


class SparseMLP(nnx.Module):
    """The parameters of a router and its experts."""

    def __init__(self, c: Qwen3MoEConfig, rngs: nnx.Rngs):
        self.router = Router(c, rngs)
        self.experts = Experts(c, rngs)


class MoEBlock(Block):
    """All layers' parameters, stacked; a scan calls it with one layer's."""

    mlp_class: ClassVar[type[nnx.Module]] = SparseMLP

    def _feed_forward(self, x_BxTxD, linears, monitor: Monitor | None):
        c = self.config
        x_BxTxD = wire.placed(x_BxTxD, wire.activations(c.sequence_sharding, x_BxTxD.shape[1], None))
        real_BxT = linears.keywords["row_mask"]
        real_S = None if real_BxT is None else real_BxT.reshape(-1)
        x_SxD = x_BxTxD.reshape(-1, c.hidden_size)
        groups = exchange.groups_of(c.groups, len(x_BxTxD))
        by_group = functools.partial(exchange.by_group, groups=groups)
        choices = choose(self.mlp.router(x_SxD), c.num_experts_per_token, c.norm_topk_prob, real_S)
        choices = jax.tree.map(by_group, choices)
        slots = _assign_slots(choices.experts, c.num_experts, c.slots(len(x_SxD) // groups))
        if monitor is not None:
            monitor.routing = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), jax.vmap(routing_sums)(choices, slots))
        linears = functools.partial(linears, row_mask=exchange.to_experts(slots.row_mask))
        rows_ExNxD = exchange.to_experts(jax.vmap(dispatch)(by_group(x_SxD), slots))
        gate_ExNxF, up_ExNxF = linears(EXPERTS[:2], rows_ExNxD)
        y_ExNxD = linears(EXPERTS[2:], swiglu(gate_ExNxF, up_ExNxF))[0]
        y_GxSxD = jax.vmap(combine)(exchange.to_groups(y_ExNxD, groups), choices.weights, slots)
        y_SxD = place(y_GxSxD.reshape(x_SxD.shape), ("batch", None))
        return y_SxD.astype(x_BxTxD.dtype).reshape(x_BxTxD.shape)


def _assign_slots(experts_GxSxJ: Int32[Array, "G S J"], num_experts: int, capacity: int) -> Slots:
    """`assign_slots` for every group by itself."""
    return jax.vmap(functools.partial(assign_slots, num_experts=num_experts, capacity=capacity))(experts_GxSxJ)


class Qwen3MoE(Qwen3):
    """tokens → logits, built from a `Qwen3MoEConfig`. Keys are explicit: nothing random is stored."""

    block_class: ClassVar[type[Block]] = MoEBlock

    def load_balancing_loss(self, routing: dict[str, Float32[Array, "..."]]) -> Float32[Array, ""]:
        """Mean over layers, of one call whose monitor holds `routing`; `num_experts_per_token` is the best."""
        chosen = self.config.num_experts_per_token
        return jnp.mean(load_balancing_loss(routing["choices"], routing["probability"], chosen))


def routing_metrics(routing: dict[str, Float32[Array, "..."]]) -> dict[str, Float32[Array, ""]]:
    """Numbers to log of a step, from the sums of all its calls, stacked over layers.

    Returns:
      dropped: choices of a token that found no slot; dropped_share: of all choices; largest_load: the choices of the
      busiest expert of any layer over an expert's mean (1: all get the same).
    """
    choices_LxE = routing["choices"]
    total = jnp.maximum(jnp.sum(choices_LxE), 1)
    dropped = jnp.sum(routing["dropped"])
    return {
        "dropped": dropped,
        "dropped_share": dropped / total,
        "largest_load": jnp.max(choices_LxE) * choices_LxE.size / total,
    }
