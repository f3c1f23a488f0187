"""The same two linear layers for every library, and the plain calls of `fp4jax.dot_general` they are compared with.

Between the layers values and gradients are rounded to whole numbers (`contract.settle`) and the loss is linear, so that
every mean is exact: programs that XLA fuses differently then draw and quantize the same.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import fp4jax
from tests import contract
from tests.contract import settle

RECIPE = "averis"  # splits off means, and draws for gradients
WIDTH = 32
X = jnp.asarray(contract.gridded((2, 8, WIDTH), 1))
WEIGHTS = jnp.asarray(contract.gridded((2, WIDTH, WIDTH), 2, offset=0.0))
TARGET = jnp.asarray(contract.gridded((2, 8, WIDTH), 3))
KEY = jax.random.key(4)


def loss_of(y):
    """Its gradient is TARGET, which is on the grid."""
    return jnp.sum(y.astype(jnp.float32) * TARGET)


def product(x, w, key, recipe=RECIPE):
    return fp4jax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), recipe=recipe, key=key)


def plain_loss(weights, x, keys):
    for w, key in zip(weights, keys, strict=True):
        x = settle(product(x, w, key))
    return loss_of(x)


plain_value_and_grad = jax.value_and_grad(plain_loss, argnums=(0, 1))
plain_step = contract.jit(plain_value_and_grad)
"""(weights, x, keys) → (loss, (dW of both layers, dX)) of the plain calls."""


class SlotLayer(nnx.Module):
    """A layer of flax.nnx, with a slot."""

    def __init__(self, w):
        self.linear = nnx.Linear(WIDTH, WIDTH, use_bias=False, kernel_init=lambda *_: w, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return settle(self.linear(x))

    @property
    def stream(self):
        return self.linear.dot_general.stream


class OwnLayer(nnx.Module):
    """A layer as others write it, for interception."""

    def __init__(self, w):
        self.w = nnx.Param(w)

    def __call__(self, x):
        return settle(jnp.einsum("...d,df->...f", x, self.w[...]))

    @property
    def stream(self):
        return self.fp4.stream


LAYERS = {"slot": SlotLayer, "own": OwnLayer}


class Stack(nnx.Module):
    def __init__(self, kind: str):
        self.layers = nnx.List([LAYERS[kind](w) for w in WEIGHTS])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def nnx_model(kind: str) -> Stack:
    model = Stack(kind)
    fp4jax.nnx.quantize(model, RECIPE, rngs=nnx.Rngs(fp4=7))
    return model


def next_keys(model: Stack) -> list[jax.Array]:
    """The keys that the layers draw in their next call."""
    return [nnx.clone(layer.stream)() for layer in model.layers]


class DotGeneral(nn.Module):
    """Keeps the key that the slot of the same class name draws."""

    @nn.compact
    def __call__(self, *args, **kwargs):
        self.sow("keys", "key", self.make_rng("fp4"))
        return jax.lax.dot_general(*args, **kwargs)


class LinenLayer(nn.Module):
    """A layer with or without a slot; with `record` it keeps the key that its product draws."""

    kind: str
    record: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        if self.kind == "slot":
            cls = DotGeneral if self.record else fp4jax.linen.dot_general_cls(RECIPE)
            return settle(nn.Dense(WIDTH, use_bias=False, dot_general_cls=cls, name="linear")(x)), None
        if self.record:
            self.sow("keys", "key", self.make_rng("fp4"))
        return settle(x @ self.param("w", nn.initializers.zeros, (WIDTH, WIDTH))), None


def linen_model(kind: str, module: nn.Module):
    """The module under the recipe: by its slots, or by interception."""
    return module if kind == "slot" else fp4jax.linen.quantize(module, RECIPE)


class LinenStack(nn.Module):
    """Two layers, each made by `lift(LinenLayer)`."""

    kind: str = "own"
    record: bool = False
    lift: Callable = lambda layer: layer

    @nn.compact
    def __call__(self, x):
        for number in range(len(WEIGHTS)):
            x, _ = self.lift(LinenLayer)(self.kind, self.record, name=f"layer_{number}")(x)
        return x
