"""What an intercepted call of an NNX module changes: written back as the plain call would leave it, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

import fp4jax

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

X = jnp.ones((4, 16))


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """The shapes of the products that were replaced, which are made in high precision: compiled in no time."""
    shapes = []

    def product(lhs, rhs, dimension_numbers, *_, **__):
        shapes.append((lhs.shape, rhs.shape))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers)

    monkeypatch.setattr(fp4jax.nnx, "dot_general", product)
    return shapes


class Layer(nnx.Module):
    """A weight of its own beside `change(layer, y, argument)`, which may change anything."""

    def __init__(self, change=lambda layer, y, argument: y, param=nnx.Param):
        self.change = nnx.static(change)
        self.w = param(2 * jnp.eye(16))
        self.steps = 0
        self.dropout = nnx.Dropout(0.5)
        self.kept = nnx.List([])
        self.log = []
        self.inner = nnx.List([])

    def __call__(self, x, argument=None):
        return self.change(self, x @ self.w[...], argument)


def quantized(change, inner=()):
    model = Layer(change)
    model.inner.extend(inner)
    fp4jax.nnx.quantize(model, "nvfp4+nearest")
    return model


def sow(layer, y, _):
    layer.sow(nnx.Intermediate, "y", y)
    return y


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_a_call_sows_is_kept():
    model = quantized(sow)
    for count in (1, 2):
        y = model(X)
        assert len(model.y.get_value()) == count
        np.testing.assert_array_equal(model.y.get_value()[-1], y)


def test_what_is_captured_is_that_of_the_whole_model():
    model = quantized(lambda layer, y, _: layer.inner[0](sow(layer, y, _)), [Layer(sow)])
    y, kept = nnx.capture(lambda model, x: model(x), nnx.Intermediate)(model, X)
    np.testing.assert_array_equal(kept["inner"][0]["y"].get_value()[0], y)
    np.testing.assert_array_equal(2 * kept["y"].get_value()[0], y)


def test_streams_and_modules_among_the_arguments_advance():
    """As in a plain call: also where the stream is the layer's own, under jit and grad."""
    model, rngs = quantized(lambda layer, y, rngs: layer.dropout(y, rngs=rngs)), nnx.Rngs(dropout=1)

    @nnx.jit
    def gradients(model, rngs):
        return nnx.grad(lambda model, rngs: jnp.sum(model(X, rngs)))(model, rngs)

    expected = Layer(model.change)(X, nnx.Rngs(dropout=1))
    np.testing.assert_array_equal(model(X, rngs), expected)
    gradients(model, rngs)
    assert rngs.dropout.count[...] == 2


def add(layer, y, _):
    layer.steps += 1
    return y


def store(layer, y, _):
    layer.last = y
    return y


def keep(layer, y, _):
    layer.kept.append(nnx.Intermediate(y))
    return y


def delete(layer, y, _):
    del layer.steps
    return y


def record(layer, y, _):
    layer.log.append(y)
    return y


def append(layer, y, argument):
    argument["losses"].append(jnp.sum(y))
    return y


def assign(layer, y, argument):
    argument["losses"] = y
    return y


@pytest.mark.parametrize(
    "change, message",
    [
        (add, "^model changes the attribute 'steps' in its call, .*by a rule"),
        (store, "^model changes the attribute 'last' in its call"),
        (delete, "^model changes the attribute 'steps' in its call"),
        (keep, "^model changes the attribute '0' in its call"),
        (record, "^model changes the attribute 'log' in its call"),
        (append, "^model changes a list or dictionary among its arguments in place.*return what it adds"),
        (assign, "^model changes a list or dictionary among its arguments in place"),
    ],
)
def test_what_would_be_lost_is_refused(change, message):
    model, argument = quantized(change), {"losses": []}
    with pytest.raises(ValueError, match=message):
        model(X, argument)
    assert model.steps == 0 and argument == {"losses": []}


def test_a_weight_that_its_variable_computes_is_followed(products):
    class Tripled(nnx.Param):
        def get_value(self, **options):
            return 3 * super().get_value(**options)

    model = Layer(param=Tripled)
    fp4jax.nnx.quantize(model, "nvfp4+nearest")
    np.testing.assert_array_equal(model(X), 6 * X)
    assert products == [(X.shape, (16, 16))]


def test_numpy_in_a_dataclass_is_data(products):
    @struct.dataclass
    class Batch:
        x: np.ndarray

    class OfBatch(Layer):
        def __call__(self, batch):
            return batch.x @ self.w[...]

    model = OfBatch()
    fp4jax.nnx.quantize(model, "nvfp4+nearest")
    np.testing.assert_array_equal(model(Batch(np.asarray(X))), 2 * X)
    assert products == [(X.shape, (16, 16))]
