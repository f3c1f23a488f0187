"""What `dot_general` and `prepare` refuse, in one line that says why; and when they ask for a key."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.dot import dot_general, prepare
from fp4jax.statistics import GRADIENT_STATISTICS
from tests import contract
from tests.contract import assert_identical

KEY = jax.random.key(3)


def operands():
    """X, W, D"""
    (x, g), w = contract.inputs(), contract.weights()
    return x, w, g


# ---------------------------------------------------------------- keys


def evaluate(name, key=None, **options):
    x, w, _ = operands()
    numbers = contract.DIMENSION_NUMBERS
    return jax.eval_shape(lambda x, w: dot_general(x, w, numbers, recipe=name, key=key, **options), x, w)


def differentiate(name, key=None):
    x, w, _ = operands()

    def loss(x, w):
        return dot_general(x, w, contract.DIMENSION_NUMBERS, recipe=name, key=key).sum()

    return jax.eval_shape(jax.grad(loss), x, w)


def test_keys_are_asked_for_where_bits_are_drawn():
    for name in ("averis", "averis+nearest", "bf16"):
        evaluate(name)
    with pytest.raises(ValueError, match="averis.sr_all rounds stochastically in the forward: pass key=jax.random.key"):
        evaluate("averis+sr_all")
    with pytest.raises(ValueError, match="averis rounds gradients stochastically: pass key=.*or use averis.nearest"):
        differentiate("averis")
    for name, key in (("averis+nearest", None), ("bf16", None), ("averis", KEY), ("averis+sr_all", KEY)):
        differentiate(name, key)
    x, w, _ = map(jnp.asarray, operands())
    for side, operand in (("lhs", x), ("rhs", w)):
        with pytest.raises(ValueError, match="rounds stochastically in the forward"):
            prepare(operand, "averis+sr_all", side)


def test_raw_and_typed_keys_are_the_same():
    x, w, g = operands()
    typed = contract.product("nvfp4")(x, w, g, KEY)
    assert_identical(contract.jit(contract.product("nvfp4").eager)(x, w, g, jax.random.key_data(KEY)), typed)


# ---------------------------------------------------------------- errors

F32 = np.float32
unchecked = inspect.unwrap  # without the type checker of the tests, which would raise first


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lhs=np.ones((2, 3, 32), int)), "lhs must be floating-point to be quantized, got int.*convert it"),
        (dict(rhs=np.ones((32, 16), np.int8)), "rhs must be floating-point to be quantized, got int8"),
        (dict(lhs=np.ones((2, 0, 32), F32)), r"lhs has an empty axis: shape \(2, 0, 32\); every axis needs"),
        (dict(rhs=np.ones((32, 0), F32)), r"rhs has an empty axis: shape \(32, 0\)"),
        (dict(row_mask=np.ones((3,), bool)), r"row_mask must be bool\[2, 3\].*got bool\[3\]"),
        (dict(row_mask=np.ones((2, 3), F32)), r"row_mask must be bool\[2, 3\].*got float32\[2, 3\]"),
        (dict(probe=np.zeros((3,), F32)), "probe must be"),
        (dict(probe=np.zeros((len(GRADIENT_STATISTICS),), np.float16)), "probe must be"),
        (dict(recipe="averes"), "unknown recipe 'averes'; known: bf16"),
        (dict(backend="cuda"), "backend must be one of auto, xla, pallas, got 'cuda'"),
        (dict(gemm="fp4"), "gemm must be one of auto, emulated, native, fused, got 'fp4'"),
        (
            dict(key=np.zeros((3,), np.uint32)),
            r"key must be one JAX random key of 2 or 4 uint32 words, got uint32\[3\]",
        ),
        (dict(key=np.zeros((5, 2), np.uint32)), r"key must be one JAX random key.*got uint32\[5, 2\]"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else None,
)
def test_errors_of_dot_general(change, message):
    arguments = dict(lhs=np.ones((2, 3, 32), F32), rhs=np.ones((32, 16), F32), recipe="averis", key=KEY) | change
    arguments = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message) as raised:
        unchecked(dot_general)(dimension_numbers=contract.DIMENSION_NUMBERS, **arguments)
    assert "\n" not in str(raised.value)


def test_operands_that_do_not_fit_get_the_error_of_lax():
    x, w = jnp.ones((2, 3, 32)), jnp.ones((31, 16))
    with pytest.raises(TypeError, match="contracting dimensions to have equal sizes|contracting"):
        dot_general(x, w, contract.DIMENSION_NUMBERS, recipe="averis")


def test_what_cannot_be_served_raises():
    with pytest.raises(NotImplementedError, match="gemm='native'.*gemm='emulated' gives the same"):
        evaluate("averis", gemm="native")
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="backend='pallas': .*backend='xla' gives the same bits"):
            evaluate("averis", backend="pallas")
        with pytest.raises(NotImplementedError, match="backend='pallas'"):
            prepare(jnp.ones((2, 32)), "averis", backend="pallas")
    assert evaluate("averis", gemm="emulated", backend="xla").shape == (
        contract.BATCH,
        contract.LENGTH,
        contract.OUTPUTS,
    )


@functools.cache
def prepared(name):
    x, w, _ = map(jnp.asarray, operands())
    return jax.jit(lambda x, w: (prepare(x, name), prepare(w, name, "rhs")))(x, w)


def test_errors_of_prepared_operands():
    x, w, _ = map(jnp.asarray, operands())
    xq, wq = prepared("nvfp4+nearest")
    dot = functools.partial(dot_general, recipe="nvfp4+nearest")
    numbers = contract.DIMENSION_NUMBERS
    for options in (dict(lhs_q=xq), dict(rhs_q=wq)):
        with pytest.raises(
            ValueError, match="_q was prepared for recipe nvfp4.nearest, this product has averis: prepare"
        ):
            dot_general(x, w, numbers, recipe="averis", **options)
    for not_prepared in (dataclasses.replace(xq, purpose=None), xq.forward.residual):
        with pytest.raises(ValueError, match="lhs_q must come from fp4jax.prepare"):
            unchecked(dot_general)(x, w, numbers, recipe="nvfp4+nearest", lhs_q=not_prepared)
    with pytest.raises(ValueError, match=r"with lhs_q or axes, lhs must be \[\*batch, \*tokens, K\]"):
        dot(x.transpose(0, 2, 1), w, (((1,), (0,)), ((), ())), lhs_q=xq)
    with pytest.raises(ValueError, match=r"with rhs_q or axes, rhs must be \[\*batch, K, N\]"):
        dot(x, w.T, (((2,), (1,)), ((), ())), rhs_q=wq)
    with pytest.raises(ValueError, match=r"with rhs_q or axes, rhs must be \[\*batch, K, N\]"):
        dot(x, w.reshape(contract.INPUTS, 4, 10), numbers, rhs_q=wq)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(x=np.ones((2, 32), F32), side="left"),
            r"side must be 'lhs' \(activations\) or 'rhs' \(weights\), got 'left'",
        ),
        (dict(x=np.ones((2, 32), np.int32)), "floating array of >= 2 axes, got int32"),
        (dict(x=np.ones((32,), F32)), "floating array of >= 2 axes"),
        (dict(x=np.ones((0, 32), F32)), "non-empty floating array"),
        (dict(x=np.ones((2, 32), F32), batch_dims=1), "of >= 3 axes"),
        (dict(x=np.ones((2, 32, 16), F32), side="rhs"), r"weights are \[\*batch, K, N\].*got shape \(2, 32, 16\)"),
        (dict(x=np.ones((32, 16), F32), side="rhs", row_mask=np.ones((32,), bool)), "have no row mask"),
        (dict(x=np.ones((2, 32), F32), recipe="averes"), "unknown recipe 'averes'"),
        (dict(x=np.ones((2, 32), F32), backend="cuda"), "backend must be one of"),
        (dict(x=np.ones((2, 32), F32), row_mask=np.ones((3,), bool)), r"row_mask must be bool\[2\]"),
    ],
)
def test_errors_of_prepare(arguments, message):
    arguments = {
        k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in (dict(recipe="averis") | arguments).items()
    }
    with pytest.raises(ValueError, match=message) as raised:
        unchecked(prepare)(**arguments)
    assert "\n" not in str(raised.value)


def test_no_gradient_flows_through_prepare():
    x, _, _ = operands()

    def loss(x):
        return jax.tree.reduce(jnp.add, [leaf.sum() for leaf in jax.tree.leaves(prepare(x, "bf16"))])

    assert not contract.jit(jax.grad(loss))(x).any()
