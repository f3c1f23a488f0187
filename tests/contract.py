"""The table of recipes that the contract suite runs, and the compiled products that its tests share.

A new recipe or variant becomes a row by itself. Inputs are small multiples of a power of two in a power-of-two number
of rows, so that every mean is exact in any order of addition: codes then agree between programs that XLA fuses
differently, and results differ by the order of the last sums only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.dot import LINEAR_INPUTS, dot_general, prepare
from fp4jax.numerics import key_words
from fp4jax.recipes import list_recipes, list_variants, recipe

BATCH, LENGTH, INPUTS, OUTPUTS = 4, 8, 24, 40
LAYERS, MICROBATCHES, EXPERTS = 2, 2, 2
DIMENSION_NUMBERS = (((2,), (0,)), ((), ()))
GRID = 0.25  # the values of X, W and D are multiples of it
TOLERANCE = 4e-6  # of a tensor's largest value: float32 sums in another order


def _rows() -> list[str]:
    """Every recipe, and every variant that it can have."""
    names = []
    for name in list_recipes():
        names.append(name)
        for variant in list_variants():
            try:
                names.append(recipe(f"{name}+{variant}").name)
            except ValueError:  # the recipe has nothing to vary there; test_recipes.py pins which
                continue
    return names


ROWS = _rows()
SLOW_TO_COMPILE = {"quartet2", "metis", "averis_best", "averis_hadamard", "averis_centered_hadamard"}
QUICK_VARIANTS = {
    "averis+nearest", "averis+sr_all", "averis+mean_bf16", "averis_centered+per_sequence", "averis+x_only",
    "averis_centered+d_only", "averis+fwd_bf16",
}  # fmt: skip


def rows(*quick: str):
    """All rows as pytest parameters; `slow` but for those named (by default what compiles fast)."""
    chosen = set(quick) or set(list_recipes()) - SLOW_TO_COMPILE | QUICK_VARIANTS
    assert chosen <= set(ROWS)
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in ROWS]


def jit(function, **options):
    """`jax.jit` for programs that are compiled for one call: without LLVM's optimizations, in half of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def gridded(shape, seed, spread=4.0, offset=2.0):
    """Multiples of GRID, normal with a mean of its own for every column, as float32."""
    rng = np.random.default_rng(seed)
    x = spread * GRID * rng.standard_normal(shape) + offset * rng.standard_normal(shape[-1])
    return np.asarray(np.round(x / GRID) * GRID, np.float32)


def inputs(*batch: int):
    """X [*batch, BATCH, LENGTH, INPUTS] and D."""
    return gridded((*batch, BATCH, LENGTH, INPUTS), 1), gridded((*batch, BATCH, LENGTH, OUTPUTS), 2)


def weights(*batch: int):
    """W [*batch, INPUTS, OUTPUTS]."""
    return gridded((*batch, INPUTS, OUTPUTS), 3, offset=0.0)


class Product:
    """Y, dX and dW of one recipe's product, compiled; counts how often it is traced."""

    def __init__(self, name: str):
        self.traces = 0

        def product(x, w, g, key):
            self.traces += 1
            return product_and_gradients(name, x, w, g, key)

        self.eager = functools.partial(product_and_gradients, name)
        self.compiled = jit(product)

    def __call__(self, x, w, g, key):
        return tuple(np.asarray(leaf) for leaf in self.compiled(*map(jnp.asarray, (x, w, g)), key))


def product_and_gradients(name, x, w, g, key, dimension_numbers=DIMENSION_NUMBERS):
    y, pull = jax.vjp(lambda x, w: dot_general(x, w, dimension_numbers, recipe=name, key=key), x, w)
    return y, *pull(g)


product = functools.cache(Product)


# ---------------------------------------------------------------- a training step on a stack of layers


@jax.custom_vjp
def settle(x):
    """To the grid, forwards and backwards, so that the next layer's means are exact again."""
    return jnp.round(x)


settle.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (jnp.round(g),))


def layer(name, prepared, x, w, wq, key):
    """(Y, next layer's X). `prepared`: X is prepared here and W came in prepared, as in a model's linear layers."""
    options = dict(lhs_q=prepare(x, name, key=key), rhs_q=wq) if prepared else {}
    y = dot_general(x, w, DIMENSION_NUMBERS, recipe=name, key=key, **options)
    return settle(y[..., :INPUTS]), y


REMATERIALIZED = {
    "none": lambda f: f,
    "full": jax.checkpoint,
    "linear_inputs": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(LINEAR_INPUTS)
    ),
}


@functools.cache
def train_step(name: str, remat: str, prepared: bool):
    """Compiled (xs, ws, gs, keys) → Y, dX and the sum of dW: layers scanned, microbatches scanned, W prepared once.

    xs [microbatch, B, T, K], ws [layer, K, N], gs [microbatch, layer, B, T, N] (added to the loss as Y's cotangents).
    """

    def step(xs, ws, gs, keys):
        wqs = jax.lax.map(lambda wk: prepare(wk[0], name, "rhs", key=wk[1]), (ws, keys)) if prepared else None

        def stack(x, ws):
            def body(x, layer_inputs):
                w, wq, key = layer_inputs
                return REMATERIALIZED[remat](functools.partial(layer, name, prepared))(x, w, wq, key)

            return jax.lax.scan(body, x, (ws, wqs, keys))[1]

        def microbatch(total, xg):
            x, g = xg
            ys, pull = jax.vjp(stack, x, ws)
            dx, dws = pull(g)
            return total + dws, (ys, dx)

        total, (ys, dxs) = jax.lax.scan(microbatch, jnp.zeros_like(ws), (xs, gs))
        return ys, dxs, total

    return jit(step)


def train_step_in_a_loop(name: str, xs, ws, gs, keys):
    """The same by one compiled product a layer and microbatch."""
    run, ys, dxs, total = product(name), [], [], np.zeros_like(ws)
    for x, g in zip(xs, gs, strict=True):
        layers = []
        for w, key in zip(ws, keys, strict=True):
            layers.append((x, w, key, run(x, w, np.zeros_like(g[0]), key)[0]))
            x = np.round(layers[-1][-1][..., :INPUTS])
        cotangent = np.zeros_like(g[0])
        for i, (x, w, key, _) in reversed(list(enumerate(layers))):
            _, dx, dw = run(x, w, cotangent + g[i], key)
            total[i] += dw
            cotangent[..., :INPUTS] = np.round(dx)
        ys.append(np.stack([y for *_, y in layers]))
        dxs.append(dx)
    return np.stack(ys), np.stack(dxs), total


def step_inputs():
    """xs, ws, gs and keys of `train_step`."""
    xs, _ = inputs(MICROBATCHES)
    gs = inputs(MICROBATCHES, LAYERS)[1]
    return xs, weights(LAYERS) / 2, gs, jax.random.split(jax.random.key(7), LAYERS)


# ---------------------------------------------------------------- comparisons


def assert_close(got, expected, tolerance=TOLERANCE):
    """Equal up to `tolerance` of the expected tensor's largest value; dtypes and shapes exactly."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(b).all() and b.any()
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def assert_identical(got, expected):
    """Bit for bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


def words(key):
    """The two words of a key, for the oracle."""
    return tuple(int(word) for word in np.asarray(key_words(key)))
