"""Which products `intercept.call` replaces: those of data and a weight, found by what each array is computed from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import source_info_util

import fp4jax
from fp4jax import intercept

P = jax.sharding.PartitionSpec
MESH = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
CONV = ("NWC", "OIW", "NWC")
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
W = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32))


def doubled(lhs, rhs, dimension_numbers, **options):
    """A product that shows: twice the right one; it is given activations first."""
    doubled.calls.append((lhs.shape, rhs.shape))
    return 2 * jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)


def checked(lhs, rhs, dimension_numbers, **options):
    return fp4jax.dot_general(lhs, rhs, dimension_numbers, recipe="bf16", **options)


def own_product(x, w):
    return x @ w


def run(function, x=X, w=W):
    doubled.calls = []
    return intercept.call(lambda: function(x, w), [w], doubled, "layer")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w,
        lambda x, w: jnp.dot(x, w.T),
        lambda x, w: jnp.einsum("td,df->ft", x, w),
        lambda x, w: (w @ x.T).T,
        lambda x, w: jnp.einsum("td,ndh->tnh", x, w.astype(jnp.bfloat16).astype(x.dtype).reshape(2, 4, 2)),
        lambda x, w: jax.jit(jnp.matmul)(x, w),
        lambda x, w: jax.checkpoint(lambda x, w: x @ w)(x, w),
        lambda x, w: jnp.tensordot(x, w[:, :2], 1),
        lambda x, w: jnp.dot(x, w),
        lambda x, w: jnp.inner(x, w),
        lambda x, w: x @ w[np.asarray([3, 1])].T,
        lambda x, w: jnp.einsum("df,td->tf", w, x),
        lambda x, w: jnp.einsum("td,df,tf->t", x, w, x),
        lambda x, w: x @ jnp.asarray(w, w.dtype),
        lambda x, w: x @ jnp.asarray(w).T.reshape(4, 2, 2)[:, 0],
        lambda x, w: x @ (w / jnp.max(jnp.abs(w))),
        lambda x, w: x @ (w * np.tri(4, dtype=np.float32)),  # masked by a constant
        lambda x, w: jax.jit(lambda x: x @ w)(x),  # closed over
        lambda x, w: jax.lax.dot_general(w, x, (((0,), (1,)), ((), ()))),
        lambda x, w: jax.vmap(lambda x: w @ x)(x),
        lambda x, w: jnp.matmul(*jax.lax.optimization_barrier((x, w))),
        lambda x, w: jnp.matmul(*jax.device_put((x, w), jax.devices()[0])),
        lambda x, w: x @ jax.lax.cond(w[0, 0] > 0, lambda: 2 * w, lambda: w),  # chosen by the weight itself
    ],
)
def test_a_product_with_a_weight_is_replaced(function):
    y, replaced = run(function)
    assert replaced == 1 and 3 in doubled.calls[0][0] and 3 not in doubled.calls[0][1]
    np.testing.assert_allclose(y, 2 * function(X, W), rtol=2e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ x.T,
        lambda x, w: (x * w[:1]) @ x.T,
        lambda x, w: w[jnp.argsort(x[:, 0])] @ x.T,  # rows of an embedding
        lambda x, w: x + w[:1],
        lambda x, w: (x * jax.lax.cond(x[0, 0] > 0, lambda: w[0], lambda: w[1])[None]) @ x.T,  # a vector chosen by data
        lambda x, w: (x[..., None] * w[None]).sum(-2) @ x.T,
        lambda x, w: jnp.einsum("td,tdf->tf", x, w[None] * x[:, :1, None]),  # looks as an activation with a scale does
        lambda x, w: jnp.einsum("td,sd,sk->tk", x, x, x),
    ],
)
def test_others_are_not(function):
    y, replaced = run(function)
    assert replaced == 0 and not doubled.calls
    np.testing.assert_allclose(y, function(X, W), rtol=2e-5)


def test_every_equation_keeps_its_scopes_and_its_line():
    def function():
        with jax.named_scope("mine"):
            return jax.jit(lambda x: jnp.sin(x) @ W)(X)

    jaxpr = jax.make_jaxpr(lambda: intercept.call(function, [W], doubled, "layer")[0])()
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["sin", "dot_general", "mul"]
    assert {str(equation.source_info.name_stack) for equation in jaxpr.eqns} == {"mine"}
    for equation in jaxpr.eqns:
        assert "<lambda>" in source_info_util.summarize(equation.source_info)


def test_attention_beside_its_projection():
    def attend(x, w):
        q = x @ w
        return {"y": jax.nn.softmax(q @ x.T) @ x, "none": None, "name": "kept"}

    y, replaced = run(attend)
    assert replaced == 1 and y["name"] == "kept" and y["none"] is None
    np.testing.assert_allclose(y["y"], jax.nn.softmax(2 * (X @ W) @ X.T) @ X, rtol=2e-5)


def test_under_jit_grad_and_vmap():
    def loss(x, w):
        return jnp.sum(run(lambda x, w: jnp.sin(x @ w), x, w)[0])

    expected = jax.grad(lambda x, w: jnp.sum(jnp.sin(2 * (x @ w))), argnums=(0, 1))(X, W)
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(X, W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    rows = jax.vmap(lambda x: run(lambda x, w: w @ x, x)[0])(X)
    np.testing.assert_allclose(rows, 2 * X @ W.T, rtol=2e-5)


@jax.custom_jvp
def own_rule(x, w):
    return x @ w


own_rule.defjvp(lambda primals, tangents: (own_rule(*primals), own_rule(*tangents)))


@jax.custom_vjp
def own_derivative(x, w):
    return x @ w


own_derivative.defvjp(lambda x, w: (x @ w, w), lambda w, d: (d @ w.T, w))


@jax.custom_batching.custom_vmap
def batched(x, w):
    return x @ w


batched.def_vmap(lambda size, is_batched, x, w: (x @ w, True))

SIZES = jnp.asarray([1, 2])
INSIDE = "layer multiplies by its weight inside a "
CHANGED = "layer multiplies by a weight that data has masked, scaled or chosen: mask or scale the activations"


def in_a_scan(step, init):
    return jax.lax.scan(lambda carry, _: (step(carry), None), init, None, length=2)[0]


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x, w: x @ (w @ w), "layer multiplies two of its own weights.*leave it out by a rule"),
        (lambda x, w: in_a_scan(lambda x: x @ w, x), INSIDE + "scan.*fp4jax.dot_general in it"),
        (lambda x, w: in_a_scan(lambda y: jnp.tanh(y @ w) + x, jnp.zeros_like(x)), INSIDE + "scan"),
        (lambda x, w: jax.lax.fori_loop(0, 2, lambda _, x: x @ w, x), INSIDE + "(scan|while)"),
        (lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 0, lambda x: x @ w, x), INSIDE + "while"),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), INSIDE + "cond"),
        (lambda x, w: own_rule(x, w), INSIDE + "custom_jvp_call"),
        (lambda x, w: batched(x, w), INSIDE + "custom_vmap_call"),
        (lambda x, w: jax.nn.silu(own_derivative(x, w)), INSIDE + "custom_vjp_call"),
        (lambda x, w: jax.shard_map(own_product, mesh=MESH, in_specs=P(), out_specs=P())(x, w), INSIDE + "shard_map"),
        (lambda x, w: x @ (w * jnp.sign(x[:1].T)), CHANGED),
        (lambda x, w: x @ jnp.where(x[0] > 0, w, 0).T, CHANGED),
        (lambda x, w: jnp.einsum("td,dnf->tnf", x, w.reshape(4, 2, 2) / x[0, 0]), CHANGED),
        (lambda x, w: jnp.einsum("td,tdf->tf", x, w.reshape(2, 4, 2)[jnp.argsort(x[:, 0]) % 2]), CHANGED),
        (lambda x, w: x @ jnp.einsum("d,df->df", x[0], w), CHANGED),
        (lambda x, w: x @ jax.lax.cond(x[0, 0] > 0, lambda: w, lambda: w.T), CHANGED),
        (lambda x, w: x @ jax.lax.cond(x[0, 0] > 0, lambda w: 2 * w, lambda w: w, w), CHANGED),
        (lambda x, w: x @ jax.lax.switch(jnp.argmax(x[0]), [lambda: w, lambda: w.T, lambda: jnp.eye(4)]), CHANGED),
        (
            lambda x, w: jax.lax.conv_general_dilated(x[None], w[:1, :, None], (1,), "SAME", dimension_numbers=CONV),
            "layer multiplies by its weight in conv_general_dilated.*convolutions run in high precision",
        ),
        (lambda x, w: jax.lax.ragged_dot(x, w.reshape(2, 4, 2), SIZES), "call fp4jax.ragged_dot in it"),
        (
            lambda x, w: jax.lax.linalg.triangular_solve(w, x.T, left_side=True),
            "layer gives its weight and data to triangular_solve, and what that multiplies is not known",
        ),
    ],
)
def test_what_cannot_be_replaced_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        intercept.call(lambda: function(X, W), [W], checked, "layer")
    with pytest.raises(ValueError, match=message):  # a traced weight takes other ways
        jax.eval_shape(lambda x, w: intercept.call(lambda: function(x, w), [w], checked, "layer")[0], X, W)


def test_what_the_product_refuses_names_the_layer():
    def refuse(*args, **options):
        raise ValueError("not this way")

    with pytest.raises(ValueError, match="^layers.3: not this way$"):
        intercept.call(lambda: X @ W, [W], refuse, "layers.3")


def test_a_vector_product_is_replaced_and_what_fp4jax_multiplies_is_left():
    y, replaced = run(lambda x, w: jnp.vdot(x, w[:3]))
    assert replaced == 1
    np.testing.assert_allclose(y, 2 * jnp.vdot(X, W[:3]), rtol=2e-5)
    _, replaced = run(lambda x, w: x @ w + fp4jax.einsum("td,df->tf", x, w, recipe="bf16"))
    assert replaced == 1


def test_a_quantized_product_of_the_layer_s_own_is_left_as_it_is():
    def forward(x, w):
        y, replaced = run(lambda x, w: fp4jax.einsum("td,df->tf", x, w, recipe="nvfp4"), x, w)
        assert replaced == 0
        return y

    assert "custom_vjp_call" in str(jax.make_jaxpr(forward)(jnp.ones((16, 32)), jnp.ones((32, 16))))


def test_a_loop_without_such_a_product_is_kept():
    y, replaced = run(lambda x, w: jax.lax.scan(lambda x, _: (x + w[:1], None), x, None, length=2)[0] @ w)
    assert replaced == 1


def test_a_numpy_weight_is_refused_and_converted():
    weight = np.asarray(W)
    with pytest.raises(ValueError, match="layer owns a NumPy array"):
        intercept.call(lambda: X @ weight, [weight], doubled, "layer")
    converted = intercept.as_jax({"w": weight, "x": X, "n": 3})
    assert isinstance(converted["w"], jax.Array) and converted["x"] is X and converted["n"] == 3
