"""Whole Equinox models: which layers are found, what is said of the rest, and what is refused."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from tests import contract

eqx = pytest.importorskip("equinox", reason="make test-examples installs it")

pytestmark = [pytest.mark.peer, pytest.mark.standard_promotion]

X = jnp.ones((16, 32))


class Experts(eqx.Module):
    """Weights in a tuple."""

    weights: tuple[jax.Array, ...]

    def __call__(self, x):
        return sum(w @ x for w in self.weights)


class Table(eqx.Module):
    """A weight, and no call."""

    table: jax.Array

    def decode(self, x):
        return self.table @ x


class Model(eqx.Module):
    first: eqx.nn.Linear
    experts: Experts
    table: Table
    norm: eqx.nn.LayerNorm

    def __call__(self, x):
        return self.table.decode(self.experts(self.norm(self.first(x))))


def model():
    weights = tuple(jnp.ones((32, 32)) for _ in range(2))
    return Model(
        eqx.nn.Linear(32, 32, key=jax.random.key(0)), Experts(weights), Table(jnp.ones((8, 32))), eqx.nn.LayerNorm(32)
    )


def program(model, x=X) -> str:
    return str(jax.make_jaxpr(lambda x: jax.vmap(model)(x))(x))


def test_docstrings_are_true():
    result = doctest.testmod(fp4jax.equinox)
    assert result.failed == 0 and result.attempted > 0


def test_what_is_left_is_said(caplog):
    with caplog.at_level("WARNING", "fp4jax"):
        assert set(fp4jax.equinox.layers(model(), "averis")) == {"first", "experts"}
    assert "weights left in high precision: modules of Model without a __call__: table" in caplog.text
    with pytest.raises(ValueError, match="LayerNorm has no linear layer"):
        fp4jax.equinox.quantize(eqx.nn.LayerNorm(32), "averis")


def test_every_own_weight_is_multiplied_by_under_the_recipe():
    """NumPy's arrays, as checkpoints give them, too."""
    for convert in (jnp.asarray, np.asarray):
        arrays = jax.tree.map(lambda leaf: convert(leaf) if eqx.is_array(leaf) else leaf, model())  # noqa: B023
        assert program(fp4jax.equinox.quantize(arrays, "nvfp4+nearest")).count("custom_vjp_call") == 3


def test_a_method_that_is_not_replaced_is_said(caplog):
    class Linear(eqx.nn.Linear):
        def transposed(self, x):
            return self.weight.T @ x

    layer = fp4jax.equinox.quantize(Linear(32, 32, key=jax.random.key(0)), "nvfp4+nearest")
    assert layer.in_features == 32
    with caplog.at_level("WARNING", "fp4jax"):
        jax.eval_shape(layer.transposed, X[0])
    assert "its method transposed is not __call__ and stays as it is: model" in caplog.text


def test_a_product_that_cannot_be_replaced_names_its_layer():
    class Masked(eqx.Module):
        weight: jax.Array

        def __call__(self, x, *, key=None):
            return (self.weight * jnp.sign(x)) @ x

    stack = fp4jax.equinox.quantize(eqx.nn.Sequential([eqx.nn.Lambda(jnp.sin), Masked(jnp.ones((32, 32)))]), "averis")
    with pytest.raises(ValueError, match=r"^layers.1 multiplies by a weight that data has masked"):
        jax.eval_shape(jax.vmap(stack), X)


def test_a_layer_draws_anew_where_it_is_quantized_with_a_key_for_every_step():
    layer = eqx.nn.Linear(32, 32, key=jax.random.key(0))
    x = jnp.asarray(contract.gridded((16, 32), 1))

    @contract.jit
    def gradients(keys):
        def loss(xs):
            def step(_, x_and_key):
                x, key = x_and_key
                return None, jax.vmap(fp4jax.equinox.quantize(layer, "averis", key=key))(x)

            return jnp.sum(jnp.sin(jax.lax.scan(step, None, (xs, keys))[1]))

        return jax.grad(loss)(jnp.stack([x, x]))

    keys = jax.random.split(jax.random.key(1))
    same, own = gradients(keys[jnp.zeros(2, int)]), gradients(keys)
    assert np.array_equal(same[0], same[1]) and np.array_equal(same[0], own[0])
    assert not np.array_equal(own[0], own[1])


def test_a_list_that_the_call_changes_is_refused():
    class Losing(eqx.Module):
        weight: jax.Array

        def __call__(self, x, losses):
            losses.append(jnp.sum(x))
            return self.weight @ x

    layer = fp4jax.equinox.quantize(Losing(jnp.ones((32, 32))), "nvfp4+nearest")
    with pytest.raises(ValueError, match="^model changes a list or dictionary among its arguments in place"):
        jax.eval_shape(lambda x: layer(x, []), X[0])
