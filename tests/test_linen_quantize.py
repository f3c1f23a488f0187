"""Whole Linen models under a policy, by interception: what is replaced, what is said, and what calls may look like."""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from tests import contract
from tests.contract import assert_identical

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

X = jnp.asarray(contract.gridded((2, 8, 24), 1))
KEY = jax.random.key(4)


class Own(nn.Module):
    """A linear layer without a slot, that also records something."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(0.1), self.shape)
        y = jnp.einsum(equation, x, w)
        self.sow("intermediates", "y", y)
        return y


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        q, k, v = Own((3, 2, 24, 16), name="qkv")("btd,cndh->cbtnh", x)
        a = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        y = Own((2, 16, 24), name="out")("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", a, v))
        return nn.Dense(24, name="up")(y), None


def test_a_whole_model_by_interception():
    model = fp4jax.linen.quantize(Attention(), fp4jax.Policy.of(("up", "bf16"), (".", "averis")))
    variables = jax.eval_shape(Attention().init, jax.random.key(0), X)
    assert jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0), X)) == jax.tree.structure(variables)
    params = {"params": variables["params"]}
    assert {path: recipe.name for path, recipe in model.layers(params, X).items()} == {
        "qkv": "averis", "out": "averis", "up": "bf16",
    }  # fmt: skip

    def run(params, x, key):
        return model.apply(params, x, rngs={"fp4": key}, mutable=["intermediates"])

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    assert str(jax.make_jaxpr(run)(zeros, X, KEY)).count("custom_vjp_call") == 2
    _, recorded = jax.eval_shape(run, params, X, KEY)
    assert recorded["intermediates"]["out"]["y"][0].shape == (2, 8, 24)


def test_a_model_that_jits_itself():
    """`nn.jit` keeps traces by module and shapes: each policy has its own, and a call that finds one is no error."""
    plain = nn.jit(Attention)()
    variables = {"params": jax.eval_shape(plain.init, jax.random.key(0), X)["params"]}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    policies = "fp8+nearest", fp4jax.Policy.of(("up", "bf16"), (".", "fp8+nearest"))
    models = [plain, *(fp4jax.linen.quantize(plain, policy) for policy in policies)]

    def products(model):
        return str(jax.make_jaxpr(lambda variables, x: model.apply(variables, x)[0])(zeros, X)).count("custom_vjp_call")

    assert [products(model) for model in (*models, *models)] == [0, 3, 2, 0, 3, 2]
    assert sorted(models[1].layers(zeros, X)) == ["out", "qkv", "up"]


def test_a_scanned_model_without_its_stream_says_what_to_pass():
    for split, works in (({"params": True, "fp4": True}, True), ({"params": True}, False)):
        stack = nn.scan(nn.remat(Attention), variable_axes={"params": 0}, split_rngs=split, length=2)()
        model = fp4jax.linen.quantize(stack, "averis")
        params = {"params": jax.eval_shape(stack.init, jax.random.key(0), X, None)["params"]}

        def loss(params, model=model):
            return jnp.sum(model.apply(params, X, None, rngs={"fp4": KEY})[0])

        if works:
            jax.eval_shape(jax.grad(loss), params)
            continue
        with pytest.raises(ValueError, match=r"under nn.scan also split_rngs=\{'fp4': True\}"):
            jax.eval_shape(jax.grad(loss), params)


def test_a_model_is_refused_with_the_cure():
    params = {"params": jax.eval_shape(Attention().init, jax.random.key(0), X)["params"]}
    with pytest.raises(ValueError, match="rule 'mlp' matches none of the 3 linear layers"):
        fp4jax.linen.quantize(Attention(), fp4jax.Policy.of(("mlp", "averis"))).layers(params, X)
    with pytest.raises(ValueError, match="Dropout has no linear layer"):
        fp4jax.linen.quantize(nn.Dropout(0.5, deterministic=True), "averis").layers({}, X)
    with pytest.raises(ValueError, match="takes a flax.linen module, got int"):
        fp4jax.linen.quantize.__wrapped__(3, "averis")  # the suite's type checker would be first


def test_weights_of_numpy_are_converted():
    """As checkpoints give them."""
    model = fp4jax.linen.quantize(Attention(), "nvfp4+nearest")
    shapes = jax.eval_shape(Attention().init, jax.random.key(0), X)["params"]
    params = {"params": jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)}
    assert str(jax.make_jaxpr(lambda x: model.apply(params, x))(X)).count("custom_vjp_call") == 3


class Table(nn.Module):
    """A weight that a method other than `__call__` multiplies by, and one that nothing does."""

    def setup(self):
        self.table = self.param("table", nn.initializers.ones, (24, 24))

    def __call__(self, x):
        return x + self.table[:8]

    def decode(self, x):
        return x @ self.table.T


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (24, 24))
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=2)[0]


class TableAndUp(nn.Module):
    def setup(self):
        self.table = Table()
        self.up = nn.Dense(24)

    def __call__(self, x):
        return self.table.decode(self.up(self.table(x)))


def test_what_stays_in_high_precision_is_said(caplog):
    params = jax.eval_shape(TableAndUp().init, jax.random.key(0), X)
    with caplog.at_level("WARNING", "fp4jax"):
        layers = fp4jax.linen.quantize(TableAndUp(), "nvfp4+nearest").layers(params, X)
    assert set(layers) == {"up"}
    assert "table owns a weight and multiplied nothing by it" in caplog.text
    assert "its method decode is not __call__ and stays as it is: table" in caplog.text


def test_a_product_that_cannot_be_replaced_names_its_layer_and_the_rule_helps():
    params = jax.eval_shape(Scanned().init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="^model multiplies by its weight inside a scan.*'bf16'"):
        fp4jax.linen.quantize(Scanned(), "nvfp4+nearest").layers(params, X)
    policy = fp4jax.Policy.of(("^model", "bf16"), (".", "nvfp4+nearest"))
    layers = fp4jax.linen.quantize(Scanned(), policy).layers(params, X)
    assert {path: recipe.name for path, recipe in layers.items()} == {"model": "bf16"}


def test_a_module_that_would_lose_its_policy_is_not_given_away():
    model = fp4jax.linen.quantize(nn.Dense(24), "nvfp4+nearest")
    with pytest.raises(ValueError, match="bind gives a module that is not under the policy: use apply"):
        model.bind({"params": {"kernel": jnp.ones((24, 24)), "bias": jnp.ones(24)}})
    with pytest.raises(ValueError, match="clone gives a module"):
        model.clone(features=8)


class Noisy(nn.Module):
    """A weight to which data is added: interception cannot tell it from a learned position."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (24, 24))
        return nn.Dense(24, name="up")(x) @ (w + jax.random.normal(self.make_rng("noise"), w.shape))


def test_the_report_shows_what_interception_cannot_tell(caplog):
    model = fp4jax.linen.quantize(Noisy(), "nvfp4+nearest")
    params = jax.eval_shape(Noisy().init, {"params": KEY, "noise": KEY}, X)

    def forward(params, x, key):
        return model.apply(params, x, rngs={"noise": key})

    with caplog.at_level("WARNING", "fp4jax"):
        report = fp4jax.report(forward, params, X, KEY, compile_program=False)
    assert "model owns a weight and multiplied nothing by it" in caplog.text
    assert "1 of 2 products" in str(report) and "not given to fp4jax (1)" in str(report)
    assert "params.params.w" in str(report)


class CastInSetup(nn.Module):
    """A weight that is an attribute in another dtype, and beside it a weight and a mask that are none of this."""

    def setup(self):
        self.raw = self.param("raw", nn.initializers.ones, (24, 24))
        self.mask = jnp.tri(24)
        self.w = self.param("w", nn.initializers.ones, (24, 40)).astype(jnp.bfloat16)

    def __call__(self, x):
        return (x @ self.raw @ self.mask).astype(jnp.bfloat16) @ self.w


def test_a_weight_that_setup_has_cast_is_said_with_the_cure(caplog):
    params = jax.eval_shape(CastInSetup().init, jax.random.key(0), X)
    fp4jax.linen.quantize(CastInSetup(), "nvfp4+nearest").layers(params, X)
    assert caplog.messages == [
        "weights left in high precision: setup changes the weight in w, which is not followed: cast or reshape it in "
        "__call__: model"
    ]


class SetUp(nn.Module):
    def setup(self):
        self.w = self.param("w", nn.initializers.ones, (24, 24))

    def __call__(self, x):
        return self.twice(x)

    def twice(self, x):
        return x @ self.w @ self.w


class Derived(nn.Dense):
    def __call__(self, x):
        return nn.relu(super().__call__(x))


def test_layers_written_in_setup_or_derived_are_no_reason_for_warnings(caplog):
    for model in (SetUp(), Derived(24)):
        params = jax.eval_shape(model.init, jax.random.key(0), X)
        assert set(fp4jax.linen.quantize(model, "nvfp4+nearest").layers(params, X)) == {"model"}
    assert not caplog.messages


def test_every_model_is_warned_about_once(caplog):
    params = jax.eval_shape(TableAndUp().init, jax.random.key(0), X)
    for count in (1, 2):
        model = fp4jax.linen.quantize(TableAndUp(), "nvfp4+nearest")
        for _ in range(2):
            model.layers(params, X)
            jax.eval_shape(model.apply, params, X)
        assert sum("multiplied nothing" in message for message in caplog.messages) == count
        assert sum("method decode" in message for message in caplog.messages) == count


class Switched(nn.Module):
    """Takes a Python flag, and has a method that needs no variables."""

    @nn.compact
    def __call__(self, x, double, scale=None):
        return nn.Dense(24, name="up")(2 * x if double else x)

    def helper(self, number):
        return number + 1


def test_layers_takes_what_apply_takes():
    params = jax.eval_shape(functools.partial(Switched().init, double=True), jax.random.key(0), X)
    model = fp4jax.linen.quantize(Switched(), "averis+sr_all")
    assert set(model.layers(params, X, True)) == {"up"}
    assert set(model.layers(params, X, double=False, scale=X, rngs={"fp4": KEY}, mutable=["intermediates"])) == {"up"}
    with pytest.raises(ValueError, match="averis.sr_all rounds stochastically in the forward"):
        jax.eval_shape(lambda params, x: model.apply(params, x, True), params, X)


def test_a_method_of_an_unbound_module_runs():
    assert fp4jax.linen.quantize(Switched(), "averis").helper(1) == 2


def test_a_quantized_model_can_be_copied():
    model = fp4jax.linen.quantize(nn.Dense(24), "nvfp4+nearest")
    for other in (copy.copy(model), copy.deepcopy(model)):
        assert other.policy == model.policy and other.module.features == 24
    assert not hasattr(model, "__jax_array__")


class Integers(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", lambda key, shape: jnp.ones(shape, jnp.int8), (24, 8))
        numbers = (((2,), (0,)), ((), ()))
        y = jax.lax.dot_general(x.astype(jnp.int8), w, numbers, preferred_element_type=jnp.int32)
        return nn.Dense(24, name="up")(y.astype(x.dtype))


def test_a_rule_helps_a_layer_of_integers():
    model, params = Integers(), Integers().init(jax.random.key(0), X)
    quantized = fp4jax.linen.quantize(model, "bf16")
    assert_identical(quantized.apply(params, X), model.apply(params, X))
    layers = fp4jax.linen.quantize(model, fp4jax.Policy.of(("up", "nvfp4+nearest"), ("model", "bf16"))).layers(
        params, X
    )
    assert {path: recipe.name for path, recipe in layers.items()} == {"model": "bf16", "up": "nvfp4+nearest"}


def test_a_misspelt_rule_is_found_when_call_is_named():
    params = jax.eval_shape(nn.Dense(24).init, jax.random.key(0), X)
    model = fp4jax.linen.quantize(nn.Dense(24), fp4jax.Policy.of(("mlp", "averis"), (".", "nvfp4+nearest")))
    with pytest.raises(ValueError, match="rule 'mlp' matches none"):
        jax.eval_shape(lambda params: model.apply(params, X, method="__call__"), params)
