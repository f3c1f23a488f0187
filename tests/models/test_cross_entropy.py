import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fp4jax.models.cross_entropy import Layout, cross_entropy, layout
from fp4jax.plan.program import Executions
from fp4jax.reporting.optimized_hlo import Program

BATCH, LENGTH, HIDDEN, VOCABULARY = 4, 8, 16, 48


def inputs(dtype=jnp.float32, scale: float = 1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = (scale * jax.random.normal(keys[0], (BATCH, LENGTH, HIDDEN))).astype(dtype)
    head = jax.random.normal(keys[1], (VOCABULARY, HIDDEN))
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCABULARY)
    weights = jnp.round(jax.random.uniform(keys[3], (BATCH, LENGTH)), 1)
    return hidden, head, targets, weights


def exact(hidden, head, targets, weights):
    """Loss and both gradients in float64, from head and hidden as they are multiplied."""
    head = np.asarray(head.astype(hidden.dtype), np.float64)
    hidden, targets, weights = np.asarray(hidden, np.float64), np.asarray(targets), np.asarray(weights, np.float64)
    logits = hidden @ head.T
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    one_hot = np.eye(VOCABULARY)[targets]
    slope = (np.exp(log_p) - one_hot) * weights[..., None]
    loss = -(log_p * one_hot).sum(-1)
    return (loss * weights).sum(), slope @ head, np.einsum("btv,btd->vd", slope, hidden)


def value_and_gradients(arrays, cut=None, scale=1.0):
    hidden, head, targets, weights = arrays

    def scaled(hidden, head):
        return scale * cross_entropy(hidden, head, targets, weights, cut)

    value, gradients = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(hidden, head)
    return value, *gradients


@pytest.mark.parametrize("cut", [None, Layout(1, 1), Layout(1, 4), Layout(1, 8), Layout(2, 2), Layout(4, 1)])
def test_loss_and_gradients_in_float32(cut):
    arrays = inputs()
    for found, expected in zip(value_and_gradients(arrays, cut), exact(*arrays), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [Layout(1, 1), Layout(2, 4)])
def test_bfloat16_sums_in_float32(cut):
    arrays = inputs(jnp.bfloat16)
    loss, hidden_gradient, head_gradient = value_and_gradients(arrays, cut)
    expected = exact(*arrays)
    assert (hidden_gradient.dtype, head_gradient.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)  # products of bfloat16 are exact in float32
    largest = [float(np.abs(gradient).max()) for gradient in expected[1:]]
    np.testing.assert_allclose(hidden_gradient.astype(jnp.float32), expected[1], atol=2**-7 * largest[0])
    np.testing.assert_allclose(head_gradient, expected[2], atol=2**-7 * largest[1])


def test_the_value_without_gradients_is_the_same():
    arrays = inputs()
    value = jax.jit(functools.partial(cross_entropy, cut=Layout(1, 4)))(*arrays)
    np.testing.assert_allclose(value, value_and_gradients(arrays, Layout(1, 4))[0], rtol=1e-6)  # sums fused otherwise


def test_gradients_carry_what_the_loss_is_multiplied_by():
    arrays = inputs()
    for found, expected in zip(value_and_gradients(arrays, scale=-3.0), exact(*arrays), strict=True):
        np.testing.assert_allclose(found, -3 * expected, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow_and_positions_without_weight_give_nothing():
    hidden, head, targets, weights = inputs(scale=100.0)
    found = value_and_gradients((hidden, head, targets, weights.at[:, 4:].set(0.0)))
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    assert not bool(jnp.any(found[1][:, 4:]))
    assert bool(jnp.any(found[1][:, :4]))


def test_no_more_logits_than_a_chunk_are_held():
    hidden = jax.ShapeDtypeStruct((4, 256, 16), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((8192, 16), jnp.float32)
    targets, weights = (jax.ShapeDtypeStruct((4, 256), dtype) for dtype in (jnp.int32, jnp.float32))

    def temporaries(chunks: int) -> int:
        gradients = jax.grad(functools.partial(cross_entropy, cut=Layout(1, chunks)), argnums=(0, 1))
        return jax.jit(gradients).lower(hidden, head, targets, weights).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 256 * 8192 * 4
    assert temporaries(1) > logits
    assert temporaries(16) < logits / 4


def test_the_fewest_chunks_that_fit():
    assert layout(4, 256, 1000, logits_at_once=4 * 256 * 1000) == Layout(1, 1)
    assert layout(4, 256, 1000, logits_at_once=4 * 256 * 1000 - 1) == Layout(1, 2)
    assert layout(4, 250, 1000, logits_at_once=4 * 60 * 1000) == Layout(1, 5)  # chunks are equal
    assert layout(4, 256, 1000, logits_at_once=1) == Layout(1, 256)  # never less than a position


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_on_a_mesh(sizes):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    hidden, head, targets, weights = (
        jnp.tile(x, (2, *[1] * (x.ndim - 1))) if x.shape[0] == BATCH else x for x in inputs()
    )
    expected = value_and_gradients((hidden, head, targets, weights), Layout(1, 1))
    batch = PartitionSpec(("data", "fsdp"))
    with jax.set_mesh(mesh):
        cut = Layout(layout(8, LENGTH, VOCABULARY).shards, 4)
        assert cut.shards == sizes[0] * sizes[1]
        arrays = [jax.device_put(x, NamedSharding(mesh, batch)) for x in (hidden, targets, weights)]
        arrays.insert(1, jax.device_put(head, NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))))
        found = value_and_gradients(arrays, cut)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_head_is_gathered_and_its_gradient_summed_once_however_many_chunks():
    mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    batch, head = (
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
        NamedSharding(mesh, PartitionSpec("tensor", "fsdp")),
    )
    arguments = [
        jax.ShapeDtypeStruct((8, 32, 16), jnp.float32, sharding=batch),
        jax.ShapeDtypeStruct((512, 16), jnp.float32, sharding=head),
        jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=batch),
        jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=batch),
    ]

    def travelling(cut: Layout) -> int:
        gradients = jax.value_and_grad(functools.partial(cross_entropy, cut=cut), argnums=(0, 1))
        with jax.set_mesh(mesh):
            compiled = jax.jit(gradients, out_shardings=(None, (batch, head))).lower(*arguments).compile()
        return sum(found["bytes"] for found in Executions(Program(compiled.as_text())).collectives().values())

    size = 512 * 16 * 4
    assert travelling(Layout(8, 8)) < 2.1 * size
    assert travelling(Layout(1, 8)) > 8 * size  # without a part of the gradient for each device: a sum for each chunk
