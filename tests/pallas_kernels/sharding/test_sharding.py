"""Cut over 8 devices, the kernels give the bits of the plain-JAX path on one: codes, scales, draws and statistics."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax import numerics
from fp4jax.numerics import NVFP4, QTensor, hadamard, key_words, quantize_blocks
from pallas_kernels import compat
from pallas_kernels.column_stats import column_stats
from pallas_kernels.column_stats import local as stats_local
from pallas_kernels.column_sums import column_sums
from pallas_kernels.quantize import elements, local, quantize_2d, quantize_columns, quantize_copies, quantize_rows
from tests.combinations import half_quick
from tests.pallas_kernels.quantize.test_quantize_rows import assert_same, values
from tests.pallas_kernels.sharding import in_xla

needs_interpreter = pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12")
SHAPE = (8, 64, 96)  # [sequences, tokens, features]
CUTS = {
    "sequences": P("data"),
    "all axes of the mesh": P(("data", "tensor")),
    "sequences and features": P("data", None, "tensor"),
    "tokens": P("tensor", "data"),
    "tokens and features": P(None, "data", "tensor"),
    "not at all": P(),
}
STOCHASTIC = key_words(jax.random.key(7))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def emulated(monkeypatch):
    in_xla.install(monkeypatch)


def on(mesh, spec, function, *arrays):
    """(what the function gives for arrays cut by `spec`, its program)."""
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array in arrays]
    program = jax.jit(function).lower(*placed).compile()
    return program(*placed), program.as_text()


def mean_of(x):
    return jax.jit(numerics.column_stats)(x).mean(x.shape[0] * x.shape[1])


@functools.cache
def on_one(variant, axis):
    """(the array of `SHAPE` that is cut, the mean to subtract or None, what the plain path gives on one device)."""
    x = values(SHAPE, jnp.bfloat16)
    center = mean_of(x) if "centered" in variant else None
    want = x if center is None else x.astype(jnp.float32) - center
    want = hadamard(want, -2) if "hadamard" in variant else want
    words = STOCHASTIC if "stochastic" in variant else None
    twin = functools.partial(quantize_blocks, format=NVFP4, axes=(axis,), pack_axis=axis, words=words)
    return x, center, jax.jit(twin)(want)


def variants(*names):
    return {name: name for name in names}


@half_quick({"variant": variants("", "centered", "stochastic", "centered stochastic"), "cut": variants(*CUTS)})
def test_rows(cut, variant, mesh, emulated):
    x, center, want = on_one(variant, -1)
    words = STOCHASTIC if "stochastic" in variant else None
    run = functools.partial(quantize_rows, words=words, center=center, partitioned=True, interpret=True)
    got, program = on(mesh, CUTS[cut], run, x)
    assert_same(got, want)
    assert_nothing_is_gathered(program)
    assert got.codes.sharding.is_equivalent_to(NamedSharding(mesh, CUTS[cut]), 3)


COLUMNS = variants("", "stochastic", "centered stochastic", "centered stochastic hadamard")


@half_quick({"variant": COLUMNS, "cut": variants(*CUTS)})
def test_columns(cut, variant, mesh, emulated):
    x, center, want = on_one(variant, -2)
    words = STOCHASTIC if "stochastic" in variant else None
    run = functools.partial(
        quantize_columns, words=words, center=center, hadamard="hadamard" in variant, partitioned=True, interpret=True
    )
    got, program = on(mesh, CUTS[cut], run, x)
    assert_same(got, want)
    assert_nothing_is_gathered(program)
    assert got.codes.sharding.is_equivalent_to(NamedSharding(mesh, CUTS[cut]), 3)


@pytest.mark.parametrize("words", [None, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("spec", [P("data"), P("tensor", "data"), P(None, ("tensor", "data"))], ids=str)
def test_2d(spec, words, mesh, emulated):
    x = values((64, 256), jnp.float32)
    got, program = on(mesh, spec, functools.partial(quantize_2d, words=words, partitioned=True, interpret=True), x)
    twin = functools.partial(quantize_blocks, format=NVFP4, axes=(-2, -1), pack_axis=-2, words=words)
    assert_same(got, jax.jit(twin)(x))
    assert_nothing_is_gathered(program)
    for part in (got.codes, got.scales):
        assert part.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@pytest.mark.parametrize("cut", ["sequences and features", "tokens and features", "not at all"])
@pytest.mark.parametrize("variant", ["centered stochastic sums", "stochastic hadamard"])
def test_copies(cut, variant, mesh, emulated):
    x = values(SHAPE, jnp.bfloat16)
    center = mean_of(x) if "centered" in variant else None
    words = STOCHASTIC, STOCHASTIC + 1
    flags = {name: name in variant for name in ("hadamard", "sums")}
    run = functools.partial(quantize_copies, words=words, center=center, partitioned=True, interpret=True, **flags)
    (along, down, *sums), program = on(mesh, CUTS[cut], run, x)
    residual = x if center is None else x.astype(jnp.float32) - center
    transformed = hadamard(residual, -2) if flags["hadamard"] else residual
    for got, of, axis, drawn in ((along, residual, -1, words[0]), (down, transformed, -2, words[1])):
        twin = functools.partial(quantize_blocks, format=NVFP4, axes=(axis,), pack_axis=axis, words=drawn)
        assert_same(got, jax.jit(twin)(of))
    assert len(sums) == flags["sums"]
    for total in sums:
        represented = np.asarray(jax.jit(QTensor.dequantize)(down), np.float64)
        want, scale = (part.sum((0, 1), keepdims=True) for part in (represented, np.abs(represented)))
        assert (np.abs(np.asarray(total) - want) <= 1e-6 * scale).all()
    assert_nothing_is_gathered(program)


# No whole blocks along axes that no device shares, which a kernel pads itself; 8 rows fill as many bytes as there are.
RAGGED = [(8, 197, 100), (8, 8, 36)]


@pytest.mark.parametrize("shape", [RAGGED[0], pytest.param(RAGGED[1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "kernel, axes, variants",
    [
        (quantize_rows, (-1,), ["", "centered stochastic"]),
        (quantize_columns, (-2,), ["", "centered stochastic", "stochastic hadamard", "centered hadamard"]),
        (quantize_2d, (-2, -1), ["", "stochastic"]),
    ],
    ids=["rows", "columns", "2d"],
)
def test_ragged_axes_that_are_not_cut(kernel, axes, variants, shape, mesh, emulated):
    x, spec = values(shape, jnp.bfloat16), P(("data", "tensor"))
    for variant in variants:
        center = {"center": mean_of(x)} if "centered" in variant else {}
        flags = {"hadamard": True} if "hadamard" in variant else {}
        words = STOCHASTIC if "stochastic" in variant else None
        run = functools.partial(kernel, words=words, partitioned=True, interpret=True, **center, **flags)
        got, program = on(mesh, spec, run, x)
        want = x.astype(jnp.float32) - center["center"] if center else x
        want = hadamard(jnp.pad(want, [(0, 0), (0, -shape[1] % 16), (0, 0)]), -2) if flags else want
        twin = functools.partial(quantize_blocks, format=NVFP4, axes=axes, pack_axis=max(-2, axes[0]), words=words)
        assert_same(got, jax.jit(twin)(want))
        assert_nothing_is_gathered(program)
        assert got.codes.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


def test_copies_of_ragged_rows(mesh, emulated):
    x, words = values((8, 48, 100), jnp.bfloat16), (STOCHASTIC, STOCHASTIC + 1)
    run = functools.partial(quantize_copies, words=words, center=mean_of(x), partitioned=True, interpret=True)
    copies, program = on(mesh, P(("data", "tensor")), run, x)
    residual = x.astype(jnp.float32) - mean_of(x)
    for got, axis, drawn in zip(copies, (-1, -2), words, strict=True):
        twin = functools.partial(quantize_blocks, format=NVFP4, axes=(axis,), pack_axis=axis, words=drawn)
        assert_same(got, jax.jit(twin)(residual))
    assert_nothing_is_gathered(program)


def test_codes_of_a_ragged_axis_do_not_cut_it(mesh, emulated):
    """8 rows become 8 bytes of codes, which may be wanted in parts: x is not, where nothing else says how it is cut."""
    x = values((16, 8, 32), jnp.bfloat16)
    wanted = NamedSharding(mesh, P(None, "data"))

    @jax.jit
    def run(x):
        q = quantize_columns(-x, partitioned=True, interpret=True)
        return dataclasses.replace(q, codes=jax.lax.with_sharding_constraint(q.codes, wanted))

    assert_same(run(x), jax.jit(lambda x: quantize_blocks(-x, NVFP4, axes=(-2,), pack_axis=-2))(x))


@functools.cache
def stats_on_one(shape, batch_dims):
    x = values(shape, jnp.float32)
    return x, jax.jit(functools.partial(numerics.column_stats, batch_dims=batch_dims))(x)


@half_quick(
    {"shape": {"wide": SHAPE, "narrow": (8, 96, 6)}, "cut": variants(*CUTS), "batch_dims": {"one": 0, "batch": 1}}
)
def test_column_stats(shape, cut, batch_dims, mesh, emulated):
    x, want = stats_on_one(shape, batch_dims)
    run = functools.partial(column_stats, batch_dims=batch_dims, partitioned=True, interpret=True)
    got, program = on(mesh, CUTS[cut], run, x)
    for name in want._fields:
        np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.asarray(getattr(want, name)), err_msg=name)
    # What is gathered are sums of stretches, of 8 rows or more for these shapes.
    assert all(size <= x.size // 8 for size in gathered(program))


@pytest.mark.parametrize("cut", CUTS)
def test_column_sums(cut, mesh, emulated):
    _, _, q = on_one("stochastic", -2)

    def run(codes, scales):
        return column_sums(dataclasses.replace(q, codes=codes, scales=scales), partitioned=True, interpret=True)

    got, program = on(mesh, CUTS[cut], run, q.codes, q.scales)
    values_of = np.asarray(jax.jit(QTensor.dequantize)(q), np.float64)
    want, scale = values_of.sum((0, 1), keepdims=True), np.abs(values_of).sum((0, 1), keepdims=True)
    assert (np.abs(np.asarray(got) - want) <= 1e-6 * scale).all()
    assert_nothing_is_gathered(program)


def test_column_sums_of_a_ragged_axis(mesh, emulated):
    x = values((8, 197, 100), jnp.float32)
    q = jax.jit(lambda x: quantize_blocks(x, NVFP4, axes=(-2,), pack_axis=-2, words=STOCHASTIC))(x)

    def run(codes, scales):
        return column_sums(dataclasses.replace(q, codes=codes, scales=scales), partitioned=True, interpret=True)

    got, program = on(mesh, P(("data", "tensor")), run, q.codes, q.scales)
    represented = np.asarray(q.dequantize(), np.float64)
    want, scale = (part.sum((0, 1), keepdims=True) for part in (represented, np.abs(represented)))
    assert (np.abs(np.asarray(got) - want) <= 1e-6 * scale).all()
    assert_nothing_is_gathered(program)


def test_an_axis_of_the_mesh_may_cut_in_parts(mesh, emulated):
    """32 rows cut by 4 become 2 x 16: each of the two axes is cut by a part of "data"."""
    x = values((32, 96), jnp.bfloat16)

    def run(x):
        halves = x.reshape(2, 16, 96)
        return quantize_rows(halves, words=STOCHASTIC, batch_dims=1, partitioned=True, interpret=True)

    got, program = on(mesh, P("data"), run, x)
    want = functools.partial(quantize_blocks, format=NVFP4, axes=(-1,), pack_axis=-1, words=STOCHASTIC, batch_dims=1)
    assert_same(got, jax.jit(want)(x.reshape(2, 16, 96)))
    # A program's results are cut by whole axes, so codes are gathered behind the kernel; x is not.
    assert max(gathered(program)) < x.size


def gathered(program: str) -> list[int]:
    """Elements of every array that an all-gather makes; none travels in another way but by reductions."""
    assert not re.findall(r"all-to-all|collective-permute", program)
    made = re.findall(r" = (.*?) all-gather[\w-]*\(", program)
    shapes = [shape for types in made for shape in re.findall(r"\w+\[([\d,]*)\]", types)]
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


def assert_nothing_is_gathered(program: str) -> None:
    assert gathered(program) == []


@pytest.mark.parametrize(
    "kernel, shape, spec, message",
    [
        (quantize_rows, (4, 32, 96), P(None, None, "data"), r"axis -1 .* into 4 shards by the mesh's 'data'.*block of"),
        (quantize_columns, (4, 32, 96), P(None, ("data", "tensor")), r"axis -2 .* 8 shards .* 'data', 'tensor'.*block"),
        (quantize_2d, (32, 96), P("data"), r"axis -2 .* into 4 shards .*block of 16x16"),
        (quantize_columns, (4, 20, 32), P(None, "tensor"), r"axis -2 .* shape \(4, 20, 32\) .* divides by 32"),
        (column_stats, (8, 20, 32), P("tensor", "data"), r"axis -2 .*'data'.* stretch of 8 rows.*divides by 32"),
    ],
    ids=["rows", "columns", "2d", "padding", "stats"],
)
def test_a_shard_that_would_cut_a_block_is_refused(kernel, shape, spec, message, mesh, emulated):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{message}.*or use backend"):
        on(mesh, spec, functools.partial(kernel, partitioned=True, interpret=True), values(shape, jnp.bfloat16))


def test_one_random_number_for_two_columns_is_not_cut(mesh, emulated):
    x = values((32, 6), jnp.float32)
    plain = functools.partial(quantize_columns, partitioned=True, interpret=True)
    on(mesh, P(None, "tensor"), plain, x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="axis -1 .*the two columns of one random number"):
        on(mesh, P(None, "tensor"), functools.partial(plain, words=STOCHASTIC), x)


# The kernels themselves, a shard at a time.


@needs_interpreter
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_a_kernel_counts_from_where_its_shard_begins(columns, dtype):
    x = values((3, 32, 96), dtype)
    axis = -2 if columns else -1
    want = jax.jit(lambda x: quantize_blocks(x, NVFP4, axes=(axis,), pack_axis=axis, words=STOCHASTIC))(x)
    factors = elements.factors(want.amax)
    hashes = tuple(h.reshape(3, 32) for h in elements.row_hashes(STOCHASTIC, 1, 96))
    run = functools.partial(local.quantize_columns, hadamard=False) if columns else local.quantize_rows
    for start, stop in ((0, 48), (48, 96)):
        here = slice(start, stop)
        there = here if columns else slice(start // 2, stop // 2)
        begins = (jnp.full(1, start, jnp.uint32),)
        codes, scales = run(x[1:, 16:, here], factors, (), tuple(h[1:, 16:] for h in hashes), begins, interpret=True)
        rows = slice(8, None) if columns else slice(16, None)
        np.testing.assert_array_equal(np.asarray(codes), np.asarray(want.codes[1:, rows, there]))
        blocks = (slice(1, None), here) if columns else (slice(16, None), slice(start // 16, stop // 16))
        np.testing.assert_array_equal(np.asarray(scales), np.asarray(want.scales[1:][:, *blocks]))


@needs_interpreter
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_both_copies_count_from_where_their_shard_begins(dtype):
    x = values((2, 32, 96), dtype)
    along, down = (
        jax.jit(functools.partial(quantize_blocks, format=NVFP4, axes=(a,), pack_axis=a, words=STOCHASTIC))(x)
        for a in (-1, -2)
    )
    factors = elements.factors(along.amax), elements.factors(down.amax)
    hashes = tuple(h.reshape(2, 32)[1:] for h in elements.row_hashes(STOCHASTIC, 1, 64))
    begins = (jnp.full(1, 48, jnp.uint32),)
    flags = {"hadamard": False, "sums": False, "interpret": True}
    got = local.quantize_copies(x[1:, :, 48:], factors, (), hashes, hashes, begins, **flags)
    want = along.codes[1:, :, 24:], along.scales[1:, :, 3:], down.codes[1:, :, 48:], down.scales[1:, :, 48:]
    for part, wanted in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(wanted))


@needs_interpreter
@pytest.mark.parametrize("rows", [8, 24, 32, 96])
def test_stretches_are_subtrees(rows):
    x = values((4 * rows, 256), jnp.float32)
    sums, minima, maxima = stats_local.stretches(x.reshape(4, rows, 256), interpret=True)
    want = jax.jit(numerics.column_stats)(x)
    assert sums.shape[1] == rows // (rows & -rows)
    got = numerics.ColumnStats(
        stats_local.tree_sum(sums.reshape(-1, 256))[None],
        jnp.min(minima, axis=0),
        jnp.max(maxima, axis=0),
    )
    for name in want._fields:
        np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.asarray(getattr(want, name)), err_msg=name)
