"""The plain product under JAX's transforms, on meshes, and with mixed precision."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp4jax
from fp4jax.dot import LINEAR_INPUTS
from tests import contract
from tests.contract import assert_close, assert_identical
from tests.interop.models import (
    KEY,
    RECIPE,
    TARGET,
    WEIGHTS,
    WIDTH,
    LinenStack,
    X,
    linen_model,
    loss_of,
    next_keys,
    nnx_model,
    plain_loss,
    plain_step,
    product,
)  # fmt: skip

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

KEYS = list(jax.random.split(KEY, 2))
POLICIES = {
    "nothing": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "linear inputs": jax.checkpoint_policies.save_only_these_names(LINEAR_INPUTS),
}


@pytest.mark.parametrize(
    "policy", ["linear inputs", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nothing", "dots"))]
)
def test_checkpoint(policy):
    loss = jax.checkpoint(plain_loss, policy=POLICIES[policy])
    got = contract.jit(jax.value_and_grad(loss, argnums=(0, 1)))(list(WEIGHTS), X, KEYS)
    assert_identical(got, plain_step(list(WEIGHTS), X, KEYS))


def test_vmap_over_examples_makes_them_tokens_of_one_product():
    """Which share statistics and sum the weight gradient: the whole batch in one call."""

    def loss(w, x):
        return loss_of(jax.vmap(lambda x: product(x, w, KEY))(x))

    step, plain = (jax.value_and_grad(f, argnums=(0, 1)) for f in (loss, lambda w, x: loss_of(product(x, w, KEY))))
    assert_close(contract.jit(step)(WEIGHTS[0], X), contract.jit(plain)(WEIGHTS[0], X))


def test_second_derivatives_are_refused():
    with pytest.raises(NotImplementedError, match="can be differentiated once.*recipe='bf16'"):
        jax.eval_shape(jax.hessian(lambda x: loss_of(product(x, WEIGHTS[0], KEY))), X)


def test_vmap_over_keys_and_weights_makes_independent_products():
    """Each as it would be alone: its own statistics and draws, its own gradients."""
    one = jax.value_and_grad(lambda w, key: loss_of(product(X, w, key)))
    got, dw = contract.jit(jax.vmap(one))(WEIGHTS, jnp.stack(KEYS))
    for number, key in enumerate(KEYS):
        assert_close((got[number], dw[number]), contract.jit(one)(WEIGHTS[number], key))


def test_shard_map_quantizes_every_shard_by_itself():
    """With the statistics of its own tokens, and the gradient of a replicated weight summed."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def loss(w, x, target):
        return jnp.sum(product(x, w, KEY) * target)

    def mapped(w, x, target):
        local = jax.shard_map(
            lambda w, x, target: jax.lax.psum(loss(w, x, target), "data"),
            mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(),
        )  # fmt: skip
        return local(w, x, target)

    step = contract.jit(jax.value_and_grad(loss))
    parts = [step(WEIGHTS[0], X[i : i + 1], TARGET[i : i + 1]) for i in range(2)]
    got = contract.jit(jax.value_and_grad(mapped))(WEIGHTS[0], X, TARGET)
    assert_close(got, jax.tree.map(jnp.add, *parts))


def place(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize("library", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_explicit_mesh(library):
    """Of 8 devices, batch and features sharded: one device's numbers, but for the order of the last sums."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    if library == "linen":
        variables = {"params": {f"layer_{number}": {"w": w} for number, w in enumerate(WEIGHTS)}}
        model = linen_model("own", LinenStack("own"))
        record = LinenStack("own", True)
        keys = jax.tree.leaves(record.apply(variables, X, rngs={"fp4": KEY}, mutable=["keys"])[1])

        def forward(variables, x):
            return model.apply(variables, x, rngs={"fp4": KEY})
    else:
        stack = nnx_model("slot")
        keys, (graph, variables, rest) = next_keys(stack), nnx.split(stack, nnx.Param, ...)

        def forward(variables, x):
            return nnx.merge(graph, variables, place(mesh, rest), copy=True)(x)

    def loss(variables, x, target):
        return jnp.sum(forward(variables, x) * target)

    expected, (dw, dx) = plain_step(list(WEIGHTS), X, keys)
    with jax.set_mesh(mesh):
        args = place(mesh, variables, None, "tensor"), place(mesh, X, "data"), place(mesh, TARGET, "data")
        got, (gradients, got_dx) = contract.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*args)
        assert jax.typeof(got_dx).sharding.spec[0] == "data"
        assert all(jax.typeof(leaf).sharding.spec[1] == "tensor" for leaf in jax.tree.leaves(gradients))
    assert_close(*jax.tree.map(np.asarray, ((got, jax.tree.leaves(gradients), got_dx), (expected, dw, dx))))


class Cast(nn.Module):
    """Someone's layer that keeps float32 parameters and computes in another dtype."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.zeros, (WIDTH, WIDTH))
        return jnp.einsum("btd,df->btf", x.astype(self.dtype), w.astype(self.dtype))


def mixed(library: str, dtype):
    """(loss and its gradient to a float32 weight, key of the product)."""
    if library == "nnx":
        layer = nnx.Linear(
            WIDTH, WIDTH, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0),
            kernel_init=lambda *_: WEIGHTS[0], dot_general=fp4jax.nnx.DotGeneral(RECIPE, rngs=nnx.Rngs(fp4=7)),
        )  # fmt: skip
        key = nnx.clone(layer.dot_general.stream)()
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        return lambda w, x: nnx.merge(graph, {"kernel": nnx.Param(w)}, rest, copy=True)(x), key
    keys = []

    class Record(Cast):
        @nn.compact
        def __call__(self, x):
            keys.append(self.make_rng("fp4"))

    Record(dtype).apply({}, X, rngs={"fp4": KEY})
    model = fp4jax.linen.quantize(Cast(dtype), RECIPE)
    return lambda w, x: model.apply({"params": {"w": w}}, x, rngs={"fp4": KEY}), keys[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("library", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_float32_parameters_computed_in_another_dtype(library, dtype):
    forward, key = mixed(library, dtype)

    def step(forward, w, x):
        return jax.value_and_grad(lambda w, x: loss_of(forward(w, x)), argnums=(0, 1))(w, x)

    def plain(w, x):
        y = product(x.astype(dtype), w.astype(dtype), key)
        assert y.dtype == dtype
        return y

    got, expected = (contract.jit(functools.partial(step, f))(WEIGHTS[0], X) for f in (forward, plain))
    assert got[1][0].dtype == jnp.float32
    assert_identical(got, expected)
