"""`fp4jax.einsum`: `jnp.einsum` in high precision, the dot under a recipe; whichever operand holds the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax.equation import einsum
from tests import contract
from tests.contract import assert_close, assert_identical

# Equation, shapes, which operand holds the weights.
EQUATIONS = [
    ("btd,df->btf", (2, 3, 4), (4, 5), 1),
    ("btd,ndh->btnh", (2, 3, 4), (2, 4, 5), 1),
    ("bsd,cndh->cbsnh", (2, 3, 4), (2, 3, 4, 5), 1),  # jnp.einsum swaps the operands of this one
    ("btnh,nhd->btd", (2, 3, 4, 5), (4, 5, 6), 1),
    ("...d,df->...f", (2, 3, 4), (4, 5), 1),
    ("df,...d->f...", (4, 5), (2, 3, 4), 0),
    ("gck,gkn->gcn", (2, 3, 4), (2, 4, 5), 1),
    ("ck,gkn->cng", (3, 4), (2, 4, 5), 1),
    ("btd,df", (2, 3, 4), (4, 5), 1),
    ("btsd,dfe->btf", (2, 3, 2, 4), (4, 5, 6), 1),  # s and e are summed in one operand alone
    ("d,df->f", (4,), (4, 5), 1),
]


@pytest.mark.parametrize("equation, first, second, weight", EQUATIONS, ids=[row[0] for row in EQUATIONS])
def test_in_high_precision_it_is_jnp_einsum(equation, first, second, weight):
    operands = [jnp.asarray(contract.gridded(shape, seed)) for seed, shape in enumerate((first, second))]

    def loss(function, *operands):
        y = function(equation, *operands)
        return jnp.sum(jnp.sin(y)), y

    def ours(equation, *operands):
        return einsum(equation, *operands, recipe="bf16", weight=weight)

    @jax.jit
    def both(*operands):
        return [
            jax.value_and_grad(lambda *o, f=function: loss(f, *o), argnums=(0, 1), has_aux=True)(*operands)
            for function in (ours, jnp.einsum)
        ]

    got, expected = both(*operands)
    assert got[0][1].shape == expected[0][1].shape
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_under_a_recipe_it_is_the_dot():
    """With the weights as first operand and its axes in another order: transposed before and after."""
    x, w = jnp.asarray(contract.inputs()[0]), jnp.asarray(contract.weights())

    @contract.jit
    def run(x, w):
        numbers = (((2,), (0,)), ((), ()))
        expected = fp4jax.dot_general(x, w, numbers, recipe="averis+nearest")
        swapped = einsum("fd,btd->fbt", w.T, x, recipe="averis+nearest", weight=0)
        return expected, einsum("btd,df->btf", x, w, recipe="averis+nearest"), swapped.transpose(1, 2, 0)

    expected, straight, swapped = run(x, w)
    assert_identical(straight, expected)
    assert_close(swapped, expected)


@pytest.mark.parametrize(
    "equation, ranks, message",
    [
        ("ab,bc,cd->ad", (2, 2), "takes two operands.*has 3: multiply the others by jnp.einsum"),
        ("ab->ab", (2, 2), "has 1"),
        ("aab,bc->ac", (3, 2), "repeats 'a' in one operand.*take the diagonal first"),
        ("ab,bc->az", (2, 2), "must name letters of the operands"),
        ("abc,bc->a", (2, 2), "gives 'abc' for an operand of 2 axes"),
        ("a.b,bc->ac", (2, 2), "has '.'"),
        ("...b,bc->c", (3, 2), "sums over '...'"),
    ],
)
def test_errors_name_the_cure(equation, ranks, message):
    operands = [jnp.ones((4,) * rank) for rank in ranks]
    with pytest.raises(ValueError, match=message) as error:
        einsum(equation, *operands, recipe="bf16")
    assert "\n" not in str(error.value)


def test_other_errors():
    x, w = jnp.ones((2, 32)), jnp.ones((32, 16))
    with pytest.raises(ValueError, match="axes of sizes 32 and 16"):
        einsum("ab,cb->ac", x, w, recipe="bf16")
    with pytest.raises(ValueError, match="weight says which operand .* must be 0 or 1, got 2"):
        einsum("ab,bc->ac", x, w, recipe="bf16", weight=2)
    with pytest.raises(ValueError, match="rounds gradients stochastically: pass key"):
        jax.eval_shape(jax.grad(lambda x: einsum("ab,bc->ac", x, w, recipe="averis").sum()), x)
