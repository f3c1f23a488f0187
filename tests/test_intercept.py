"""Which products `intercept.call` replaces: those of data and a weight, found by what each array is computed from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import intercept

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
W = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32))


def doubled(lhs, rhs, dimension_numbers, **options):
    """A product that shows: twice the right one; it is given activations first."""
    doubled.calls.append((lhs.shape, rhs.shape))
    return 2 * jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)


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
        lambda x, w: jnp.einsum("td,sd,sk->tk", x, x, x),
    ],
)
def test_others_are_not(function):
    y, replaced = run(function)
    assert replaced == 0 and not doubled.calls
    np.testing.assert_allclose(y, function(X, W), rtol=2e-5)


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


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="layer multiplies two of its own weights.*leave it out by a rule"):
        run(lambda x, w: x @ (w @ w))
    with pytest.raises(ValueError, match="layer multiplies by its weight inside a scan"):
        run(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=2)[0])
    y, replaced = run(lambda x, w: jax.lax.scan(lambda x, _: (x + w[:1], None), x, None, length=2)[0] @ w)
    assert replaced == 1
