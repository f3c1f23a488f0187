"""The contract of `dot_general`, for every recipe and variant (the table is in tests/contract.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.dot import dot_general, prepare
from fp4jax.recipes import list_recipes, recipe
from tests import contract
from tests.contract import assert_close, assert_identical, product, rows

KEY = jax.random.key(5)
# Programs that take long to compile: quick for every recipe and one split of the other kind.
QUICK_DEEP = ("bf16", "nvfp4", "nvfp4_hadamard", "averis", "averis_centered", "averis_centered+per_sequence", "ternary")
DEEP = [p for p in rows(*QUICK_DEEP) if p.values[0] in (*list_recipes(), *QUICK_DEEP, *contract.QUICK_VARIANTS)]
SLOW_RECIPES = [pytest.param(name, marks=pytest.mark.slow) for name in list_recipes()]


def run(name, key=KEY):
    (x, g), w = contract.inputs(), contract.weights()
    return product(name)(x, w, g, key)


def exact():
    (x, g), w = contract.inputs(), contract.weights()
    return x @ w, g @ w.T, np.einsum("btk,btn->kn", x, g)


def test_the_table_is_complete():
    assert set(list_recipes()) <= set(contract.ROWS)
    assert contract.ROWS.count("averis") == 1
    assert sum(name.startswith("averis+") for name in contract.ROWS) == 10
    assert not [name for name in contract.ROWS if name.startswith("bf16+")]


def worst(name):
    """The largest error that a recipe may make: of one or two bits in a weight, and not of its rounding."""
    return 0.8 if name.startswith("ternary") else 0.3


@pytest.mark.parametrize("name", rows())
def test_results(name):
    """Shapes and dtypes of the operands; finite; near the product in high precision, but not equal to it."""
    gemms = recipe(name).fprop, recipe(name).dgrad, recipe(name).wgrad
    got = run(name)
    for tensor, expected, gemm in zip(got, exact(), gemms, strict=True):
        assert tensor.shape == expected.shape and tensor.dtype == np.float32
        assert np.isfinite(tensor).all()
        error = np.linalg.norm(tensor - expected) / np.linalg.norm(expected)
        assert error < 1e-6 if gemm.is_high_precision else error < worst(name)
    errors = [np.linalg.norm(a - b) for a, b in zip(got, exact(), strict=True)]
    assert recipe(name).is_high_precision or max(errors) > 1e-3 * np.linalg.norm(exact()[0])


@pytest.mark.parametrize("name", rows())
def test_the_key_decides_what_is_drawn(name):
    first, again, other = run(name), run(name), run(name, jax.random.key(6))
    assert_identical(again, first)
    y, dx, dw = (not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert y == recipe(name).forward_draws
    assert dx == dw == recipe(name).gradient_draws


@pytest.mark.parametrize("name", rows())
def test_no_second_compile(name):
    run(name), run(name, jax.random.key(1))
    (x, g), w = contract.inputs(), contract.weights()
    product(name)(2 * x, w + 1, -g, jax.random.key(2))
    assert product(name).traces == 1 and product(name).compiled._cache_size() == 1


@pytest.mark.parametrize("name", DEEP)
def test_scan_accumulation_and_prepared_operands(name):
    """Layers scanned, rematerialized by name, microbatches scanned, W prepared once: equals a loop of products."""
    inputs = contract.step_inputs()
    got = contract.train_step(name, "linear_inputs", prepared=True)(*inputs)
    assert_close(got, contract.train_step_in_a_loop(name, *inputs))


@pytest.mark.parametrize(
    "name, prepared",
    [
        ("averis_centered", True),
        *(
            pytest.param(n, p, marks=pytest.mark.slow)
            for n, p in (
                ("averis_centered", False),
                ("nvfp4_hadamard", True),
                ("averis+sr_all", True),
                ("averis_hadamard", True),
            )
        ),
    ],
)
def test_rematerialization_repeats_every_bit(name, prepared):
    inputs = contract.step_inputs()
    expected = contract.train_step(name, "none", prepared)(*inputs)
    assert_close(expected, contract.train_step_in_a_loop(name, *inputs))
    for remat in ("full", "linear_inputs") if prepared else ("full",):
        assert_identical(contract.train_step(name, remat, prepared)(*inputs), expected)


def vmapped(name, x, w, g, key, axes):
    """Y, dX, dW of the product mapped over `axes` of X and W."""

    def dot(x, w):
        return dot_general(x, w, contract.DIMENSION_NUMBERS, recipe=name, key=key)

    y, pull = jax.vjp(jax.vmap(dot, in_axes=axes), x, w)
    return y, *pull(g)


@pytest.mark.parametrize("name", DEEP)
def test_vmap(name):
    """Over X alone the examples are more tokens of one product; over X and W a batch dimension."""
    (x, g), w = contract.inputs(), contract.weights()
    groups = [t.reshape(contract.EXPERTS, -1, *t.shape[1:]) for t in (x, g)]
    ws = contract.weights(contract.EXPERTS) * np.float32([1, 4])[:, None, None]

    @contract.jit
    def mapped(x, w, ws, g, key):
        batch = contract.product_and_gradients(name, x, ws, g, key, (((3,), (1,)), ((0,), (0,))))
        return vmapped(name, x, w, g, key, (0, None)), vmapped(name, x, ws, g, key, (0, 0)), batch

    as_tokens, as_batch, batch = mapped(groups[0], w, ws, groups[1], KEY)
    y, dx, dw = run(name)
    assert_close(as_tokens, (y.reshape(as_tokens[0].shape), dx.reshape(as_tokens[1].shape), dw))
    assert_close(as_batch, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["averis_best", "quartet2"])
def test_vmap_of_a_gradient_is_that_of_a_batch_dimension(name):
    """What is prepared for the backward has the batch axes too, fresh signs included."""
    xs, gs = contract.inputs(contract.EXPERTS)
    ws = contract.weights(contract.EXPERTS)

    @contract.jit
    def both(xs, ws, gs, key):
        mapped = jax.vmap(lambda x, w, g: contract.product_and_gradients(name, x, w, g, key))(xs, ws, gs)
        return mapped, contract.product_and_gradients(name, xs, ws, gs, key, (((3,), (1,)), ((0,), (0,))))

    assert_close(*both(xs, ws, gs, KEY))


@pytest.mark.parametrize("name", ["averis_centered", *(pytest.param(n, marks=pytest.mark.slow) for n in QUICK_DEEP)])
def test_vmap_over_keys_alone_draws_for_every_key(name):
    (x, g), w = contract.inputs(), contract.weights()
    keys = jax.random.split(KEY, 3)
    dot = jax.vmap(lambda x, w, g, key: contract.product_and_gradients(name, x, w, g, key), (None, None, None, 0))
    for got, *expected in zip(contract.jit(dot)(x, w, g, keys), *(run(name, key) for key in keys), strict=True):
        assert_close(got, np.stack(expected))


@pytest.mark.parametrize("name", ["nvfp4", pytest.param("averis_centered_hadamard", marks=pytest.mark.slow)])
def test_jit_equals_eager(name):
    """Forward only: op by op, every operation of every shape is compiled by itself."""
    (x, _), w = contract.inputs(), contract.weights()
    y = dot_general(*map(jnp.asarray, (x, w)), contract.DIMENSION_NUMBERS, recipe=name)
    assert_close(y, run(name)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "averis", "averis_centered_hadamard"])
def test_jit_equals_eager_with_gradients(name):
    (x, g), w = contract.inputs(), contract.weights()
    assert_close(product(name).eager(*map(jnp.asarray, (x, w, g)), KEY), run(name))


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("name", rows())
def test_scale_equivariance(name):
    (x, g), w = contract.inputs(), contract.weights()
    y, dx, dw = product(name)(x, w, g, KEY)
    for a, b, c in ((-20, 7, -30), (13, -9, 30)):
        factors = (np.float32(2.0**e) for e in (a, b, c))
        got = product(name)(*(t * f for t, f in zip((x, w, g), factors, strict=True)), KEY)
        expected = (t * np.float32(2.0**e) for t, e in ((y, a + b), (dx, c + b), (dw, a + c)))
        assert_identical(got, tuple(expected))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("name", rows())
def test_what_is_not_finite_is_never_hidden(name, bad):
    (x, g), w = contract.inputs(), contract.weights()
    for i, reaches in enumerate([(0, 2), (0, 1), (1, 2)]):  # x reaches y and dw; w y and dx; g dx and dw
        tensors = [x.copy(), w.copy(), g.copy()]
        tensors[i][(1,) * tensors[i].ndim] = bad
        results = product(name)(*tensors, KEY)
        for j, result in enumerate(results):
            assert np.isfinite(result).all() == (j not in reaches)


# ---------------------------------------------------------------- dtypes

DTYPES = [
    (jnp.float32, jnp.float32, None),
    (jnp.bfloat16, jnp.bfloat16, None),
    (jnp.float16, jnp.float16, None),
    (jnp.bfloat16, jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.float32, jnp.bfloat16, None),
]


def with_dtypes(name, lhs, rhs, preferred):
    """(function of x, w, g, key; its arguments)"""
    (x, g), w = contract.inputs(), contract.weights()
    x, w = jnp.asarray(x, lhs), jnp.asarray(w, rhs)
    numbers = contract.DIMENSION_NUMBERS
    reference = jax.eval_shape(lambda x, w: jax.lax.dot_general(x, w, numbers, preferred_element_type=preferred), x, w)

    def gradients(x, w, g, key):
        def dot(x, w):
            return dot_general(x, w, numbers, None, preferred, recipe=name, key=key)

        y, pull = jax.vjp(dot, x, w)
        return y, *pull(g)

    return gradients, (x, w, jnp.asarray(g, reference.dtype), KEY), reference


def assert_dtypes(result, args, reference):
    y, dx, dw = result
    assert (y.shape, y.dtype) == (reference.shape, reference.dtype)
    assert (dx.shape, dx.dtype) == (args[0].shape, args[0].dtype)
    assert (dw.shape, dw.dtype) == (args[1].shape, args[1].dtype)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(np.dtype(t).name if t else "auto" for t in d))
@pytest.mark.parametrize("name", ["bf16", "averis"])
def test_dtypes_are_lax(name, dtypes):
    function, args, reference = with_dtypes(name, *dtypes)
    assert_dtypes(jax.eval_shape(function, *args), args, reference)


@pytest.mark.standard_promotion
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "nvfp4_hadamard", "averis", "averis_centered_hadamard"])
def test_values_in_every_dtype(name):
    expected = exact()
    for dtypes in (DTYPES[1], DTYPES[4], DTYPES[5]):
        function, args, reference = with_dtypes(name, *dtypes)
        result = contract.jit(function)(*args)
        assert_dtypes(result, args, reference)
        for got, tensor in zip(result, expected, strict=True):
            error = np.linalg.norm(np.asarray(got, np.float32) - tensor) / np.linalg.norm(tensor)
            assert error < (0.01 if recipe(name).is_high_precision else 0.3)


@pytest.mark.parametrize("name", ["averis"])
def test_bfloat16_operands_quantize_like_their_float32_copies(name):
    """Only the result is rounded: no step in between is done in bfloat16."""
    (x, g), w = contract.inputs(), contract.weights()
    narrow, args, _ = with_dtypes(name, jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wide = product(name)(x, w, g, KEY)  # the grid is exact in bfloat16
    y, dx, dw = contract.jit(narrow)(*args)
    assert_close(y, wide[0])
    assert_close((dx, dw), tuple(jnp.asarray(t, jnp.bfloat16) for t in wide[1:]), 2**-8)


# ---------------------------------------------------------------- shapes

SHAPES = [  # lhs, rhs, dimension numbers
    ((1, 16), (16, 17), (((1,), (0,)), ((), ()))),
    ((33, 47), (47, 65), (((1,), (0,)), ((), ()))),
    ((2, 3, 17, 33), (33, 18), (((3,), (0,)), ((), ()))),
    ((2, 3, 2, 9, 24), (2, 3, 24, 18), (((4,), (2,)), ((0, 1), (0, 1)))),
    ((2, 7, 6, 4), (6, 4, 3, 8), (((2, 3), (0, 1)), ((), ()))),
]


@pytest.mark.parametrize("name", SLOW_RECIPES)
def test_values_in_every_shape(name):
    for lhs, rhs, numbers in SHAPES:
        x, w = (jnp.asarray(contract.gridded(shape, 11 + len(shape))) for shape in (lhs, rhs))
        g = jax.random.normal(KEY, jax.eval_shape(lambda a, b, n=numbers: jax.lax.dot_general(a, b, n), x, w).shape)

        def exact(x, w, g, numbers=numbers):
            y, pull = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, numbers), x, w)
            return y, *pull(g)

        def quantized(x, w, g, key, numbers=numbers):
            return contract.product_and_gradients(name, x, w, g, key, numbers)

        for got, tensor in zip(contract.jit(quantized)(x, w, g, KEY), exact(x, w, g), strict=True):
            assert got.shape == tensor.shape and got.dtype == tensor.dtype
            error = np.linalg.norm(got - tensor) / np.linalg.norm(tensor)
            # Stochastic rounding of noise alone, and in averis of its mean too, costs up to 0.5; of one token, which
            # metis splits off whole and rounds as two factors, as much as the token.
            bound = 1.1 if name.startswith("metis") else max(0.6, 1.2 * worst(name))
            assert error < (1e-6 if recipe(name).is_high_precision else bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvfp4_hadamard", "averis_centered"])
def test_vmap_over_weights_alone_is_a_batch_dimension(name):
    (x, g), ws = contract.inputs(), contract.weights(contract.EXPERTS)
    gs = np.stack([g, -2 * g])

    @contract.jit
    def both(x, ws, gs, key):
        xs = jnp.broadcast_to(x, (contract.EXPERTS, *x.shape))
        dot = jax.vmap(
            lambda w: dot_general(
                x, w, contract.DIMENSION_NUMBERS, recipe=name, key=key, lhs_q=prepare(x, name, key=key)
            )
        )
        y, pull = jax.vjp(dot, ws)
        expected_y, _, expected_dw = contract.product_and_gradients(name, xs, ws, gs, key, (((3,), (1,)), ((0,), (0,))))
        return (y, *pull(gs)), (expected_y, expected_dw)

    got, expected = both(x, ws, gs, KEY)
    assert_close(got, expected)
