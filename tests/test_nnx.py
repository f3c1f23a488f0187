"""The slot in flax.nnx: a layer with it is the product with the key of its stream, which is part of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp4jax
from fp4jax.nnx import DotGeneral
from tests import contract
from tests.contract import assert_close, assert_identical

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

X = jnp.asarray(contract.gridded((2, 8, 24), 1))
FEATURES = 40


def linear(recipe="averis", **options):
    slot = DotGeneral(recipe, rngs=nnx.Rngs(fp4=3), **options)
    return nnx.Linear(24, FEATURES, use_bias=False, dot_general=slot, rngs=nnx.Rngs(0))


def several_axes(recipe="averis"):
    slot = DotGeneral(recipe, rngs=nnx.Rngs(fp4=3))
    return nnx.LinearGeneral((6, 4), (8, 5), axis=(-2, -1), use_bias=False, dot_general=slot, rngs=nnx.Rngs(0))


def sine_loss(layer, x):
    y = layer(x)
    return jnp.sum(jnp.sin(y)), y


@nnx.jit
def output_and_gradients(layer, x):
    (_, y), (parameters, dx) = nnx.value_and_grad(sine_loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, dx, parameters["kernel"][...]


@pytest.mark.parametrize(
    "make, shape", [(linear, (2, 8, 24)), pytest.param(several_axes, (2, 8, 6, 4), marks=pytest.mark.slow)]
)
def test_layer_is_the_product_with_the_key_of_its_stream(make, shape):
    layer, x = make(), X.reshape(shape)
    kernel, stream = layer.kernel[...], nnx.clone(layer.dot_general.stream)
    contracted = len(shape) - 2
    numbers = (tuple(range(2, 2 + contracted)), tuple(range(contracted))), ((), ())

    @contract.jit
    def expected(x, kernel, key):
        def loss(x, kernel):
            y = fp4jax.dot_general(x, kernel, numbers, recipe="averis", key=key)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)
        return y, *gradients

    steps = [output_and_gradients(layer, x) for _ in range(2)]
    for got in steps:
        assert_close(got, expected(x, kernel, stream()))
    assert_identical(steps[0][0], steps[1][0])
    assert not np.array_equal(steps[0][1], steps[1][1])


def test_the_stream_is_saved_and_restored_with_the_model():
    layer = linear()
    output_and_gradients(layer, X)
    graph, state = nnx.split(layer)
    state = jax.tree.map(jnp.copy, state)
    assert layer.dot_general.stream.count[...] == 1
    assert any("stream" in path for path, _ in nnx.to_flat_state(state))
    continued = output_and_gradients(layer, X)
    resumed = output_and_gradients(nnx.merge(graph, state), X)
    assert_identical(resumed, continued)


def test_every_slot_forks_a_stream_of_its_own():
    rngs = nnx.Rngs(fp4=3)
    first, second = DotGeneral("averis", rngs=rngs), DotGeneral("averis", rngs=rngs)
    assert first.stream() != second.stream()
    default = DotGeneral("averis", rngs=nnx.Rngs(3))
    assert default.stream is not None


def test_evaluation_draws_nothing():
    layer = linear()
    layer.eval()
    assert layer.dot_general.deterministic
    y = nnx.jit(lambda layer, x: layer(x))(layer, X)
    assert layer.dot_general.stream.count[...] == 0
    layer.train()
    assert_close(y, output_and_gradients(layer, X)[0])
    layer.eval()
    with pytest.raises(ValueError, match="averis rounds gradients stochastically: pass key"):
        output_and_gradients(layer, X)


def test_forward_noise_is_drawn_in_evaluation_too():
    layer = linear("averis+sr_all", deterministic=True)
    assert nnx.eval_shape(lambda layer: layer(X), layer).shape == (2, 8, FEATURES)


def test_streams_exist_where_the_recipe_draws():
    assert DotGeneral("averis+nearest").stream is None and DotGeneral("bf16").stream is None
    with pytest.raises(ValueError, match=r"recipe averis rounds stochastically: pass rngs=nnx.Rngs\(fp4=0\)"):
        DotGeneral("averis")
    with pytest.raises(ValueError, match="unknown recipe 'averes'"):
        DotGeneral("averes")
    other = DotGeneral("averis", rngs=nnx.Rngs(noise=1), rng_stream="noise")
    assert other.stream is not None
    with pytest.raises(NotImplementedError, match="gemm='native'"):
        nnx.eval_shape(lambda layer: layer(X), linear(gemm="native"))


def test_attention():
    """All of its four products; the three that share a slot draw one key after another."""
    slots = [DotGeneral("nvfp4", rngs=nnx.Rngs(fp4=seed)) for seed in (1, 2)]
    attention = nnx.MultiHeadAttention(
        num_heads=2, in_features=24, qkv_features=32, decode=False, rngs=nnx.Rngs(0),
        qkv_dot_general=slots[0], out_dot_general=slots[1],
    )  # fmt: skip

    @nnx.jit
    def step(attention, x):
        loss, gradients = nnx.value_and_grad(lambda attention, x: jnp.mean(jnp.square(attention(x))))(attention, x)
        return loss, gradients

    loss, gradients = step(attention, X)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert slots[0].stream.count[...] == 3 and slots[1].stream.count[...] == 1


class Own(nnx.Module):
    """A linear layer without a slot."""

    def __init__(self, equation, shape, rngs):
        self.equation = equation
        self.w = nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Attention(nnx.Module):
    """A model as others write it: its own layers, a weight of its own beside children, Dropout."""

    def __init__(self, rngs):
        self.qkv = Own("btd,cndh->cbtnh", (3, 2, 24, 16), rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (2, 16, 24), rngs=rngs)
        self.up = nnx.Linear(24, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Param(0.1 * jax.random.normal(rngs.params(), (32, 24)))

    def __call__(self, x):
        q, k, v = self.qkv(x)
        a = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        y = self.up(self.out(jnp.einsum("bnts,bsnh->btnh", a, v)))
        return self.dropout(y) @ self.down[...]


POLICY = fp4jax.Policy.of(("up", "bf16"), (".", "averis"))


def test_a_whole_model_and_back():
    model = Attention(nnx.Rngs(0))
    before, classes = nnx.state(model), [type(module) for _, module in nnx.iter_modules(model)]
    layers = fp4jax.nnx.quantize(model, POLICY, rngs=nnx.Rngs(fp4=0))
    assert {path: recipe.name for path, recipe in layers.items()} == {
        "model": "averis", "qkv": "averis", "out": "averis", "up": "bf16",
    }  # fmt: skip
    assert isinstance(model.qkv, Own) and type(model.qkv) is not Own
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(
        nnx.state(Attention(nnx.Rngs(0)), nnx.Param)
    )
    graph, state = nnx.split(model)
    program = str(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, X))
    assert program.count("custom_vjp_call") == 3
    with pytest.raises(ValueError, match=r"is quantized already; call fp4jax.nnx.restore"):
        fp4jax.nnx.quantize(model, POLICY, rngs=nnx.Rngs(0))
    assert sorted(fp4jax.nnx.restore(model)) == ["model", "out", "qkv"]
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)
    assert {type(module) for _, module in nnx.iter_modules(model)} >= set(classes)


@pytest.mark.slow
def test_an_intercepted_layer_is_the_product_with_its_key():
    layer = Own("btd,df->btf", (24, FEATURES), nnx.Rngs(0))
    fp4jax.nnx.quantize(layer, "averis", rngs=nnx.Rngs(fp4=3))
    slot = linear()
    slot.kernel[...] = layer.w[...]

    @nnx.jit
    def gradients(layer, x):
        (_, y), (parameters, dx) = nnx.value_and_grad(sine_loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, dx, jax.tree.leaves(parameters)

    assert_close(gradients(layer, X), gradients(slot, X))
    assert layer.fp4.stream.count[...] == 1


def test_a_model_is_refused_with_the_cure():
    model = Attention(nnx.Rngs(0))
    with pytest.raises(ValueError, match="rule 'mlp' matches none of the 4 linear layers"):
        fp4jax.nnx.quantize(model, fp4jax.Policy.of(("mlp", "averis")), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"pass rngs=nnx.Rngs\(fp4=0\)"):
        fp4jax.nnx.quantize(model, "averis")
    assert type(model.qkv) is Own
    with pytest.raises(ValueError, match="Dropout has no linear layer"):
        fp4jax.nnx.quantize(nnx.Dropout(0.5), "averis", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no quantized layers to restore"):
        fp4jax.nnx.restore(model)


class Foreign(nnx.Module):
    """What the slots do not serve: weights in containers, a subclass with a call of its own, a module without one."""

    class Scaled(nnx.Linear):
        def __call__(self, x):
            return 0.5 * (x @ self.kernel[...])

    class Table(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Param(jax.random.normal(rngs.params(), (24, 24)))

        def decode(self, x):
            return x @ self.table[...].T

    def __init__(self, rngs):
        self.experts = nnx.List([nnx.Param(jnp.eye(24)), nnx.Dict(w=nnx.Param(jnp.eye(24)))])
        self.scaled = Foreign.Scaled(24, 24, rngs=rngs)
        self.table = Foreign.Table(rngs)

    def __call__(self, x):
        return self.table.decode(self.scaled(x @ self.experts[0][...] @ self.experts[1]["w"][...]))


def program(model, x=X) -> str:
    graph, state = nnx.split(model)
    return str(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x))


def test_what_a_foreign_module_owns_is_found(caplog):
    model = Foreign(nnx.Rngs(0))
    with caplog.at_level("WARNING", "fp4jax"):
        assert set(fp4jax.nnx.quantize(model, "nvfp4+nearest")) == {"model", "scaled"}
    assert "weights left in high precision: modules of Foreign without a __call__: table" in caplog.text
    assert program(model).count("custom_vjp_call") == 3


def test_weights_of_numpy_are_converted():
    """As checkpoints give them."""
    model = Foreign(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(np.asarray, nnx.state(model, nnx.Param)))
    assert isinstance(model.scaled.kernel[...], np.ndarray)
    fp4jax.nnx.quantize(model, "nvfp4+nearest")
    assert str(jax.make_jaxpr(lambda x: model(x))(X)).count("custom_vjp_call") == 3


def test_a_refused_model_is_as_it_was():
    def own(*args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs)

    for refused, change in [
        (r"up has a dot_general of its own.*\(its path, 'bf16'\)", {"dot_general": own}),
        ("up has a kernel of 3 axes in place of 2.*inside the function that is vmapped", {"kernel": nnx.Param(
            jnp.ones((2, 24, 32)))}),
    ]:  # fmt: skip
        model, rngs = Attention(nnx.Rngs(0)), nnx.Rngs(fp4=0)
        for name, value in change.items():
            setattr(model.up, name, value)
        modules = [(path, type(module)) for path, module in nnx.iter_modules(model)]
        structure = jax.tree.structure(nnx.state(model))
        with pytest.raises(ValueError, match=refused):
            fp4jax.nnx.quantize(model, "averis", rngs=rngs)
        for wrong in ({"gemm": "other"}, {"rngs": None}, {"rngs": nnx.Rngs(params=0)}):
            with pytest.raises(ValueError, match="must be one of|pass rngs"):
                fp4jax.nnx.quantize(model, fp4jax.Policy.of(("up", "bf16"), (".", "averis")), **{"rngs": rngs} | wrong)
        assert [(path, type(module)) for path, module in nnx.iter_modules(model)] == modules
        assert jax.tree.structure(nnx.state(model)) == structure
        assert rngs.fp4.count[...] == 0


def test_a_product_that_cannot_be_replaced_names_its_layer():
    class Scanned(Own):
        def __call__(self, x):
            return jax.lax.scan(lambda x, _: (x @ self.w[...], None), x, None, length=2)[0]

    model = nnx.Dict(inner=Scanned("", (24, 24), nnx.Rngs(0)))
    fp4jax.nnx.quantize(model, "nvfp4+nearest")
    with pytest.raises(ValueError, match="^inner multiplies by its weight inside a scan"):
        nnx.eval_shape(lambda model: model.inner(X), model)
