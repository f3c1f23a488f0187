"""Recipes whose statistics are each shard's own: what they compute on one device, and that a mesh computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax.axes import MESH_AXES
from fp4jax.config import mesh_of
from fp4jax.dot import dot_general, prepare
from fp4jax.recipes import Center, Gemm, LowRankSplit, MeanAxes, MeanSplit, Operand, Recipe, recipe
from fp4jax.statistics import GRADIENT_STATISTICS, forward_statistics
from tests import contract
from tests.test_layout_invariance import inputs

SHARDS = 8
KEY = jax.random.key(3)
DIMENSION_NUMBERS = (((2,), (0,)), ((), ()))
SLOW = pytest.mark.slow
SPLITS = [
    "averis+nearest",  # centred on the mean, both means quantized
    "averis_centered+nearest",
    *(pytest.param(name, marks=SLOW) for name in ("nvfp4+nearest", "averis_hadamard+nearest", "fp8")),
    pytest.param("averis_centered+nearest+per_sequence", marks=SLOW),
]


def tensors():
    x, d, w, _ = inputs(experts=False)
    return tuple(np.asarray(t, np.float32) for t in (x, w, d))


def product(name, x, w, d, key=KEY, prepared=False, row_mask=None, dimension_numbers=DIMENSION_NUMBERS):
    """(Y, dX, dW)"""
    batch_dims = len(dimension_numbers[1][0])
    options = {}
    if prepared:
        options["lhs_q"] = prepare(x, name, key=key, row_mask=row_mask, batch_dims=batch_dims)
        options["rhs_q"] = prepare(w, name, "rhs", key=key, batch_dims=batch_dims)

    def dot(x, w):
        return dot_general(x, w, dimension_numbers, recipe=name, key=key, row_mask=row_mask, **options)

    y, pull = jax.vjp(dot, x, w)
    return y, *pull(d)


def on_one_device(name, *arrays, **options):
    return jax.device_get(contract.jit(functools.partial(product, name, **options))(*arrays))


def in_float64(parts):
    """Their sum, rounded once."""
    return np.sum([*parts], axis=0, dtype=np.float64).astype(np.float32)


@pytest.mark.parametrize("name", SPLITS)
def test_each_shard_is_what_it_is_alone(name):
    """Codes are the same bits, so Y and dX are; dW is the sum of the shards', taken here in float64."""
    x, w, d = tensors()
    whole = on_one_device(f"{name}+shards{SHARDS}", x, w, d)
    step = jax.jit(functools.partial(product, name), compiler_options={"xla_backend_optimization_level": 0})
    parts = [jax.device_get(step(x[i : i + 1], w, d[i : i + 1])) for i in range(SHARDS)]
    contract.assert_close(whole[:2], [np.concatenate([part[i] for part in parts]) for i in (0, 1)])
    contract.assert_close(whole[2:], [in_float64(part[2] for part in parts)])
    assert not np.allclose(whole[0], on_one_device(name, x, w, d)[0], rtol=0, atol=1e-3 * np.abs(whole[0]).max())


EXACT_SPLITS = {
    "mean": MeanSplit(Center.MEAN, Operand()),
    "mean of a sequence": MeanSplit(Center.MEAN, Operand(), MeanAxes.SEQUENCE),
    "low rank": LowRankSplit(0.05, Operand()),
}


@pytest.mark.parametrize("split", EXACT_SPLITS)
def test_the_split_is_exact(split):
    """With nothing quantized all terms add up to the plain products, whatever is taken off which shard."""
    taken = Operand(split=EXACT_SPLITS[split])
    exact = Recipe(split, Gemm(taken, Operand()), Gemm(taken, Operand()), Gemm(taken, taken), shards=SHARDS)
    x, w, d = tensors()
    found = on_one_device(exact, x, w, d)
    x, w, d = (t.astype(np.float64) for t in (x, w, d))
    expected = x @ w, d @ w.T, np.einsum("btk,btn->kn", x, d)
    contract.assert_close(found, [t.astype(np.float32) for t in expected])


@pytest.mark.parametrize("name", ["averis_hadamard+sr_all", pytest.param("quartet2", marks=SLOW)])
def test_one_shard_is_the_recipe_without_shards(name):
    """Draws too: they count shards as they count matrices, and the first is number 0."""
    arrays = tensors()
    contract.assert_close(on_one_device(f"{name}+shards1", *arrays), on_one_device(name, *arrays))


def test_shards_draw_noise_of_their_own():
    """Else the same sequence would be rounded alike in every shard, and the error of dW would not average out."""
    x, w, d = tensors()
    same = [np.repeat(t[:1], SHARDS, axis=0) for t in (x, d)]
    _, dx, _ = on_one_device(f"nvfp4+shards{SHARDS}", same[0], w, same[1])
    assert np.any(dx[0] != dx[1])


def test_prepared_operands():
    arrays, name = tensors(), f"averis+shards{SHARDS}"
    contract.assert_close(on_one_device(name, *arrays, prepared=True), on_one_device(name, *arrays))
    x, w = map(jnp.asarray, arrays[:2])
    with pytest.raises(ValueError, match=r"prepared for recipe averis\+shards8, this product has averis\+shards4"):
        jax.eval_shape(
            lambda x, w: dot_general(
                x, w, DIMENSION_NUMBERS, recipe="averis+shards4", lhs_q=prepare(x, name, key=KEY)
            ),
            x, w,
        )  # fmt: skip


def test_experts_and_rows_that_do_not_count():
    """Of each expert, each shard of its slots by itself."""
    x, d, w, mask = inputs(experts=True)
    x, d, w = (np.asarray(t, np.float32) for t in (x, d, w))
    numbers = (((2,), (1,)), ((0,), (0,)))
    options = {"row_mask": mask, "dimension_numbers": numbers, "key": None}
    found = on_one_device("averis+nearest+shards2", x, w, d, **options)
    half = x.shape[1] // 2
    halves = [
        on_one_device("averis+nearest", x[:, s], w, d[:, s], **options | {"row_mask": mask[:, s]})
        for s in (slice(0, half), slice(half, None))
    ]
    contract.assert_close(found[:2], [np.concatenate([half[i] for half in halves], axis=1) for i in (0, 1)])
    contract.assert_close(found[2:], [in_float64(half[2] for half in halves)])


def test_examples_under_vmap_are_more_tokens_of_every_shard():
    x, w, d = tensors()
    name = "averis+nearest+shards4"
    in_examples = [t.reshape(4, 2, *t.shape[1:]).swapaxes(0, 1) for t in (x, d)]
    y, dx, dw = contract.jit(
        lambda x, w, d: jax.vmap(lambda x, d: product(name, x, w, d), out_axes=(0, 0, None))(x, d)
    )(in_examples[0], w, in_examples[1])
    expected = on_one_device(name, x, w, d)
    back = [t.swapaxes(0, 1).reshape(expected[0].shape[:1] + t.shape[2:]) for t in (y, dx)]
    contract.assert_close([*back, dw], expected)


def test_statistics_are_added_over_shards():
    x, w, d = tensors()
    name, plain = f"averis+nearest+shards{SHARDS}", "averis+nearest"

    def of(name, x, w):
        chosen = recipe(name)
        return forward_statistics(x, prepare(x, chosen), w, prepare(w, chosen, "rhs"), chosen)

    def of_gradient(name, x, w, d):
        probe = jnp.zeros(len(GRADIENT_STATISTICS))
        dot = lambda probe: dot_general(x, w, DIMENSION_NUMBERS, recipe=name, probe=probe)  # noqa: E731
        return jax.vjp(dot, probe)[1](d)[0]

    whole, parts = contract.jit(functools.partial(of, name))(x, w), contract.jit(functools.partial(of, plain))
    alone = np.array([parts(x[i : i + 1], w) for i in range(SHARDS)])
    slots = np.split(alone, 4, axis=1)  # fprop.x, fprop.w, dgrad.w, wgrad.x
    expected = np.concatenate([slots[0].sum(0), slots[1][0], slots[2][0], slots[3].sum(0)])
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    gradient = contract.jit(functools.partial(of_gradient, name))(x, w, d)
    alone = contract.jit(functools.partial(of_gradient, plain))
    sums = np.sum([alone(x[i : i + 1], w, d[i : i + 1]) for i in range(SHARDS)], axis=0)
    np.testing.assert_allclose(gradient[:-3], sums[:-3], rtol=1e-5)  # those of wgrad are of the sum


@pytest.mark.parametrize("mesh", ["fsdp", pytest.param("two devices", marks=SLOW), pytest.param("tensor", marks=SLOW)])
def test_any_mesh_computes_the_same(mesh):
    sizes, tokens, weights = {
        "fsdp": (mesh_of(fsdp=8), P("fsdp"), P("fsdp")),
        "two devices": (mesh_of(data=2), P("data"), P()),
        "tensor": (mesh_of(data=2, tensor=4), P("data", None, "tensor"), P("tensor")),
    }[mesh]
    devices = jax.devices()[: np.prod([*sizes.values()])]
    here = jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)
    x, w, d = tensors()
    name = f"averis+shards{SHARDS}"
    gradient = P(tokens[0])
    placed = [
        jax.device_put(t, NamedSharding(here, s)) for t, s in zip((x, w, d), (tokens, weights, gradient), strict=True)
    ]
    with jax.set_mesh(here):
        found = on_one_device(name, *placed)
    contract.assert_close(found, on_one_device(name, x, w, d))


@pytest.mark.slow
def test_explicit_axes():
    """Prepared operands have the axis of shards where the tokens' first axis was, and its sharding."""
    here = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x, w, d = tensors()
    name = f"averis+shards{SHARDS}"
    specs = P("data"), P(), P("data")
    placed = [jax.device_put(t, NamedSharding(here, s)) for t, s in zip((x, w, d), specs, strict=True)]
    with jax.set_mesh(here):
        found = on_one_device(name, *placed, prepared=True)
        codes = jax.jit(lambda x: prepare(x, name, key=KEY))(placed[0]).forward.residual.codes
    assert codes.sharding.spec == P("data", None, None, None)
    contract.assert_close(found, on_one_device(name, x, w, d))


def test_tokens_that_do_not_divide():
    x, w = map(jnp.asarray, tensors()[:2])
    with pytest.raises(ValueError, match="cuts the first token axis into 3 shards, and it has 8: use a multiple of 3"):
        dot_general(x, w, DIMENSION_NUMBERS, recipe="averis+shards3")
    with pytest.raises(ValueError, match="into 3 shards, and it has 8"):
        prepare(x, "averis+shards3")
