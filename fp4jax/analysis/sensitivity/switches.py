"""Linear layers with a switch: quantized where it is on, in high precision where it is off.

The switches are an array, so one compiled program measures every choice of layers.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import lax

from fp4jax.models.qwen3 import LINEARS, Block, Qwen3
from fp4jax.recipes import recipe


class Switches(nnx.Variable):
    """bool [L, 7]: whether a linear layer is quantized, by block and in the order of LINEARS."""


class SwitchedBlock(Block):
    """A block that holds another's parameters, and switches that the scan over blocks takes apart with them."""

    def __init__(self, block: Block):
        self.config = block.config
        self.input_layernorm = block.input_layernorm
        self.self_attn = block.self_attn
        self.post_attention_layernorm = block.post_attention_layernorm
        self.mlp = block.mlp
        self.switches = Switches(jnp.zeros((block.config.num_layers, len(LINEARS)), bool))

    def _linears(self, names, x, *, products, weights, **others):
        """Every product by itself: X is prepared anew for each one that is switched on."""
        if weights is not None:
            raise ValueError("a switched layer prepares its weights itself, where its switch is on: pass weights=None")
        exact = dataclasses.replace(products, recipes=(recipe("bf16"),) * len(LINEARS))

        def product(name, products):
            return super(SwitchedBlock, self)._linears((name,), x, products=products, weights=None, **others)[0]

        return [
            lax.cond(
                self.switches[LINEARS.index(name)],
                lambda name=name: product(name, products),
                lambda name=name: product(name, exact),
            )
            for name in names
        ]


def switched(model: Qwen3) -> Qwen3:
    """A model that shares `model`'s parameters and recipes, with all switches off: `layers.switches[...]` sets them.

    Its blocks are recomputed in the backward, which bounds memory and changes no result.
    """
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, state)
    copy.config = dataclasses.replace(model.config, remat="full")
    copy.layers = SwitchedBlock(copy.layers)
    return copy
