"""`dot_general` against the equations in float64 (tests/oracle.py), and what it promises beyond them.

Data are multiples of 2^-10, so that sums over tokens, and with them means and codes, do not depend on the order of
additions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import numerics
from fp4jax.dot import dot_general, prepare
from fp4jax.numerics import NVFP4
from fp4jax.recipes import Center, MeanSplit, Operand, Recipe, Source, list_recipes, recipe
from fp4jax.statistics import GRADIENT_STATISTICS
from tests import contract, oracle
from tests.contract import assert_close, assert_identical

KEY = jax.random.key(3)
BATCH, LENGTH, INPUTS, OUTPUTS = 3, 11, 37, 21  # nothing divides by a block
SLOW = pytest.mark.slow
REAL = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 4 != 2


def data(shape, seed, spread=1.0, offset=1.0):
    rng = np.random.default_rng(seed)
    x = spread * rng.standard_normal(shape) + offset * rng.standard_normal(shape[-1])
    return np.asarray(np.round(x * 1024) / 1024, np.float32)


def operands(*batch, tokens=(BATCH, LENGTH), inputs=INPUTS, outputs=OUTPUTS):
    """X, W, D"""
    return data((*batch, *tokens, inputs), 1), data((*batch, inputs, outputs), 2), data((*batch, *tokens, outputs), 3)


@functools.cache
def masked_product(name, batch_dims=0):
    """Compiled (x, w, g, row_mask, key) → y, dx, dw, statistics."""

    def product(x, w, g, row_mask, key):
        batch = tuple(range(batch_dims))
        numbers = (((x.ndim - 1,), (batch_dims,)), (batch, batch))

        def dot(x, w, probe):
            return dot_general(x, w, numbers, recipe=name, key=key, row_mask=row_mask, probe=probe)

        y, pull = jax.vjp(dot, x, w, jnp.zeros(len(GRADIENT_STATISTICS)))
        return y, *pull(g)

    compiled = contract.jit(product)
    return lambda *args: tuple(np.asarray(t) for t in compiled(*args))


transformed = jax.jit(numerics.hadamard, static_argnames=("axis", "size"))


@functools.partial(jax.jit, static_argnums=(1, 2))
def factors(x, rank, batch_dims):
    return numerics.low_rank_factors(x, rank, batch_dims, 1)


def oracle_layer(name, x, w, g, row_mask=None, batch_dims=0):
    def transform(x, axis, size, signs):  # fp4jax's own: its float32 order of additions decides the bfloat16 rounding
        return transformed(x, axis=axis, size=size, signs=None if signs is None else signs.astype(np.float32))

    return oracle.linear_layer(
        x, w, g, name, words=contract.words(KEY), batch_dims=batch_dims, row_mask=row_mask, hadamard_fn=transform,
        factors_fn=factors,
    )  # fmt: skip


def assert_equals_oracle(got, layer):
    """A single code that differed would show a hundred times over: only the order of float32 sums is allowed for."""
    for tensor, expected in zip(got, (layer.y, layer.dx, layer.dw), strict=True):
        assert tensor.shape == expected.shape and expected.any()
        assert np.abs(tensor - expected).max() < 3e-6 * np.abs(expected).max()


# ---------------------------------------------------------------- against the oracle

SERVED = [name for name in list_recipes() if name != "bf16"]  # the oracle quantizes
VARIANTS = [name for name in contract.ROWS if name not in list_recipes()]
QUICK_VARIANTS = ("averis+sr_all", "averis+mean_bf16", "averis_centered+nearest")
# Quick ones by the time they compile; each of the others is a slow test.
QUICK = {*SERVED, *QUICK_VARIANTS} - {"quartet2", "metis", "averis_best", "averis_hadamard", "averis_centered_hadamard"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else SLOW) for n in SERVED + VARIANTS])
def test_equals_oracle(name):
    x, w, g = operands()
    everything = np.ones(REAL.shape, bool)
    *got, _ = masked_product(name)(x, w, g, everything, KEY)
    assert_equals_oracle(got, oracle_layer(name, x, w, g))

    poison = np.where(REAL[..., None], np.float32(0), np.float32(np.nan))
    *got, _ = masked_product(name)(x + poison, w, g + poison, REAL, KEY)
    assert_equals_oracle(got, oracle_layer(name, x, w, g, REAL))
    assert not got[0][~REAL].any() and not got[1][~REAL].any()


@pytest.mark.parametrize(
    "name",
    ["averis_centered", *(pytest.param(n, marks=SLOW) for n in (*SERVED, *QUICK_VARIANTS) if n != "averis_centered")],
)
def test_experts_equal_oracle(name):
    """A batch dimension: means, tensor scales and draws of its own for every matrix."""
    x, w, g = operands(2)
    x, g = x * np.float32([1, 64]).reshape(2, 1, 1, 1), g * np.float32([8, 1]).reshape(2, 1, 1, 1)
    mask = np.stack([REAL, ~REAL])
    *got, _ = masked_product(name, batch_dims=1)(x, w, g, mask, KEY)
    assert_equals_oracle(got, oracle_layer(name, x, w, g, mask, batch_dims=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SERVED, *QUICK_VARIANTS))
@pytest.mark.parametrize("exponent", [0, -20, 12])
@pytest.mark.parametrize("tokens, inputs, outputs", [((33,), 47, 65), ((2, 2, 17), 16, 48), ((1, 1), 64, 16)], ids=str)
def test_other_shapes_and_magnitudes_equal_oracle(name, exponent, tokens, inputs, outputs):
    x, w, g = operands(tokens=tokens, inputs=inputs, outputs=outputs)
    x, g = x * np.float32(2.0**exponent), g * np.float32(2.0**-exponent)
    mask = np.ones(tokens, bool)
    *got, _ = masked_product(name)(x, w, g, mask, KEY)
    expected = oracle_layer(name, x, w, g)
    if tokens == (1, 1) and isinstance(recipe(name).wgrad.lhs.split, MeanSplit):  # one token is its own mean
        assert not expected.operands["fprop.x"].codes.any() or recipe(name).fprop.lhs.split.center is not Center.MEAN
    assert_equals_oracle(got, expected)


# ---------------------------------------------------------------- the algebra of splits

PLAIN = Operand()


@pytest.mark.parametrize(
    "center, which",
    [(Center.MEAN, "all"), *((Center.QUANTIZED_MEAN, which) for which in ("fprop.x", "wgrad.x", "wgrad.g", "all"))],
)
def test_a_split_in_high_precision_changes_nothing(center, which):
    """Exact for any centre. A centre off the mean leaves column sums, and dW is wrong without their corrections."""
    mean = PLAIN if center is Center.MEAN else Operand(NVFP4)
    split = Operand(split=MeanSplit(center, mean))

    def choose(slot, operand):
        return split if which == slot or which == "all" and not slot.endswith(".w") else operand

    mine = Recipe("mine").map_operands(choose)
    x, w, g = operands(inputs=40)
    y, dx, dw, _ = masked_product(mine)(x, w, g, REAL, KEY)
    x, g = x * REAL[..., None], g * REAL[..., None]
    for got, expected in ((y, x @ w), (dx, g @ w.T), (dw, np.einsum("btk,btn->kn", x, g))):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# ---------------------------------------------------------------- row masks


# A backward that is made from the forward's quantized copies changes with them.
FROM_ORIGINALS = [
    n for n in SERVED if all(operand.source is Source.ORIGINAL for operand in recipe(n).slots.values())
]  # fmt: skip


@pytest.mark.parametrize("name", [FROM_ORIGINALS[0], *(pytest.param(n, marks=SLOW) for n in FROM_ORIGINALS[1:])])
def test_a_forward_in_high_precision_leaves_the_gradients_alone(name):
    everything = np.ones(REAL.shape, bool)
    y, dx, dw, _ = masked_product(f"{name}+fwd_bf16")(*operands(), everything, KEY)
    quantized_y, quantized_dx, quantized_dw, _ = masked_product(name)(*operands(), everything, KEY)
    x, w, _ = operands()
    assert_close(y, x @ w)
    assert np.abs(quantized_y - y).max() > 0.01 * np.abs(y).max()
    assert_identical(dx, quantized_dx)
    assert_identical(dw, quantized_dw)


@pytest.mark.parametrize(
    "name", ["averis_centered", *(pytest.param(n, marks=SLOW) for n in SERVED if n != "averis_centered")]
)
def test_real_rows_alone(name):
    """Masked rows at the end of a sequence are padding: the result is that of the rows in front, draws included."""
    x, w, g = operands(tokens=(1, 19))
    y, dx, dw, statistics = masked_product(name)(x, w, g, np.arange(19)[None] < 13, KEY)
    alone = masked_product(name)(x[:, :13], w, g[:, :13], np.ones((1, 13), bool), KEY)
    assert_close((y[:, :13], dx[:, :13], dw, statistics), alone)
    assert not y[:, 13:].any() and not dx[:, 13:].any()


@pytest.mark.parametrize(
    "name",
    ["averis", *(pytest.param(n, marks=SLOW) for n in ("nvfp4", "averis_centered_hadamard", "averis+per_sequence"))],
)
def test_no_real_row(name):
    x, w, g = operands()
    for tensor in masked_product(name)(x, w, g, np.zeros(REAL.shape, bool), KEY):
        assert not tensor.any()


# ---------------------------------------------------------------- layouts

LAYOUTS = {
    # axes of x by name (b, t tokens; k, h contracted), axes of w (n, m free), contraction order
    "several contracted axes": ("btkh", "khn", "kh"),
    "contracted in another order": ("bkth", "hnk", "hk"),
    "tokens last": ("khbt", "nmkh", "kh"),
    "several free axes of w": ("bhtk", "nkmh", "kh"),
}
SIZES = dict(b=3, t=11, k=6, h=7, n=9, m=3)


@pytest.mark.parametrize("layout", [pytest.param(n, marks=SLOW if n.startswith("several") else ()) for n in LAYOUTS])
def test_any_layout_equals_the_canonical_one(layout):
    lhs, rhs, contracted = LAYOUTS[layout]
    free = "".join(c for c in rhs if c not in contracted)
    canonical = data([SIZES[c] for c in "bt" + contracted], 4), data([SIZES[c] for c in contracted + free], 5)
    x = canonical[0].transpose([("bt" + contracted).index(c) for c in lhs])
    w = canonical[1].transpose([(contracted + free).index(c) for c in rhs])
    numbers = (tuple(map(lhs.index, contracted)), tuple(map(rhs.index, contracted))), ((), ())
    tokens = "".join(c for c in lhs if c not in contracted)
    assert tokens == "bt"
    merged = canonical[0].reshape(3, 11, 42), canonical[1].reshape(42, -1)
    g = data((3, 11, merged[1].shape[1]), 6)

    @contract.jit
    def both(x, w, merged_x, merged_w, g, key):
        shape = (3, 11, *(SIZES[c] for c in free))
        got = contract.product_and_gradients("averis", x, w, g.reshape(shape), key, numbers)
        return got, contract.product_and_gradients("averis", merged_x, merged_w, g, key)

    (y, dx, dw), expected = both(x, w, *merged, g, KEY)
    back = (
        dx.transpose([lhs.index(c) for c in "bt" + contracted]),
        dw.transpose([rhs.index(c) for c in contracted + free]),
    )
    got = (y, *back)
    assert_identical([t.reshape(e.shape) for t, e in zip(got, expected, strict=True)], expected)
    exact = np.einsum("btk,kn->btn", *merged)
    assert np.linalg.norm(expected[0] - exact) < 0.2 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvfp4", "averis_centered"])
def test_batch_axes_anywhere_equal_the_canonical_layout(name):
    x, w, g = operands(2)

    @contract.jit
    def both(x, w, g, mask, key):
        def moved(x, w):  # [B, K, E, T] and [K, N, E]; a mask has lhs' axes without K
            y = dot_general(
                x.transpose(1, 3, 0, 2), w.transpose(1, 2, 0), (((1,), (0,)), ((2,), (2,))), recipe=name, key=key,
                row_mask=mask.transpose(1, 0, 2),
            )  # fmt: skip
            return y

        def canonical(x, w):
            return dot_general(x, w, (((3,), (1,)), ((0,), (0,))), recipe=name, key=key, row_mask=mask)

        results = []
        for dot in (moved, canonical):
            y, pull = jax.vjp(dot, x, w)
            results.append((y, *pull(g)))
        return results

    got, expected = both(x, w, g, np.stack([REAL, ~REAL]), KEY)
    assert_identical(got, expected)


def test_a_vector_is_one_token():
    x, w, _ = operands()
    y = jax.jit(lambda x, w: dot_general(x, w, (((0,), (0,)), ((), ())), recipe="nvfp4+nearest"))
    matrix = jax.jit(lambda x, w: dot_general(x, w, (((1,), (0,)), ((), ())), recipe="nvfp4+nearest"))
    assert_identical(y(x[0, 0], w), matrix(x[0, :1], w)[0])


# ---------------------------------------------------------------- statistics of the gradient


# What counts below knows NVFP4 without a low-rank split; transforms along the features pad them with codes.
UNCOUNTED = ("fp8", "mxfp8", "mxfp4", "ternary", "ternary_absmean", "metis", "averis_best", "quartet2", "tetrajet2")
QUICK_STATISTICS = ("nvfp4", "nvfp4_hadamard", "averis")
SLOW_STATISTICS = [n for n in (*SERVED, *QUICK_VARIANTS) if n not in QUICK_STATISTICS and n not in UNCOUNTED]


def in_blocks_of_16(a):
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % 16)])
    return a.reshape(*a.shape[:-1], -1, 16)


def statistics_of(name, x, w, g, mask):
    """GRADIENT_STATISTICS by the oracle's operands."""
    layer, value = oracle_layer(name, x, w, g, mask), recipe(name)
    real = mask[..., None]
    masked = np.where(real, g, 0).astype(np.float64)
    mean = oracle.column_mean(g, real.astype(np.float64)).astype(np.float64)
    added = center = np.zeros_like(mean)
    if split := value.dgrad.lhs.split:
        added = layer.operands["mean.g"].exact() if split.mean.format else mean
        center = added if split.center is Center.QUANTIZED_MEAN else mean
    found = []
    for slot, axis in (("dgrad.g", -1), ("wgrad.g", -2)):
        operand, quantized = layer.operands[slot], value.slots[slot]
        size = operand.codes.shape[axis] - g.shape[axis]
        in_blocks = [
            np.pad(np.where(real, g - row, 0), [(0, size if i == axis % 3 else 0) for i in range(3)])
            for row in (added, center)
        ]
        if quantized.hadamard:
            in_blocks = [oracle.hadamard(rows, axis).astype(np.float64) for rows in in_blocks]
        codes, scales, target = (
            in_blocks_of_16(np.moveaxis(a, axis, -1)) for a in (operand.codes & 7, operand.scale_bytes, in_blocks[1])
        )
        filled = (target != 0).any(-1)
        found += [
            np.square(masked).sum(), real.sum() * np.square(mean).sum(), np.square(np.where(real, g - center, 0)).sum(),
            np.square(operand.exact() - in_blocks[0]).sum(),
            (target != 0).sum(), ((target != 0) & ((codes == 0) | (scales == 0))).sum(),
            ((codes == 7) & (scales != 0)).sum(),
            filled.sum(), (filled & (scales[..., 0] == 0)).sum(), (scales[..., 0] == 126).sum(),
        ]  # fmt: skip
    return [*found, *split_statistics_of(layer, value, x, mean, added, real)]


def split_statistics_of(layer, value, x, d_mean, added, real):
    """Energies of dW, of all that the split adds to the residuals' product, and of the terms with column sums."""
    if not value.wgrad.lhs.split:
        return [np.square(layer.dw).sum(), 0, 0]
    residuals = [layer.operands[slot].exact() for slot in ("wgrad.x", "wgrad.g")]
    ones = np.pad(real.astype(np.float64), [(0, 0), (0, residuals[0].shape[1] - x.shape[1]), (0, 0)])
    if value.wgrad.lhs.hadamard:
        ones = oracle.hadamard(ones, -2).astype(np.float64)
    flat_x, flat_d, ones = (a.reshape(-1, a.shape[-1]) for a in (*residuals, ones))
    rank_one = {
        "mean.x": oracle.column_mean(x, real.astype(np.float64)).astype(np.float64),
        "mean.g": d_mean,
    }
    means = [layer.operands[slot].exact() if slot in layer.operands else rank_one[slot] for slot in rank_one]
    x_mean, d_mean = (mean.reshape(1, -1) for mean in means)
    cross = (flat_x.T @ ones) @ d_mean + x_mean.T @ (ones.T @ flat_d)
    return [np.square(term).sum() for term in (layer.dw, cross + real.sum() * x_mean.T @ d_mean, cross)]


@pytest.mark.parametrize("name", [*QUICK_STATISTICS, *(pytest.param(n, marks=SLOW) for n in SLOW_STATISTICS)])
def test_statistics(name):
    x, w, g = operands()
    g[..., :16] *= np.float32(
        2.0**-30
    )  # blocks that underflow: zero scales; of every token, so that no mean hides them
    for mask in (np.ones(REAL.shape, bool), REAL):
        statistics = masked_product(name)(x, w, g, mask, KEY)[-1]
        expected = statistics_of(name, x, w, g, mask)
        for key, found, value in zip(GRADIENT_STATISTICS, statistics, expected, strict=True):
            # Noise before a Hadamard transform rounds; a sum of energies that nearly cancel is good to dW's last bits.
            assert found == pytest.approx(value, rel=1e-3, abs=1e-9 * expected[-3]), key
        named = dict(zip(GRADIENT_STATISTICS, statistics, strict=True))
        assert named["dgrad.g.zero_scales"] > 0 or recipe(name).dgrad.lhs.split
        assert named["dgrad.g.underflows"] > 0 < named["wgrad.g.saturated"]


def test_statistics_of_high_precision_are_energies_only():
    x, w, g = operands()
    statistics = dict(zip(GRADIENT_STATISTICS, masked_product("bf16")(x, w, g, REAL, KEY)[-1].tolist(), strict=True))
    expected = dict(zip(GRADIENT_STATISTICS, statistics_of("nvfp4", x, w, g, REAL), strict=True))
    for name, value in statistics.items():
        if name.rpartition(".")[-1] in ("energy", "mean_energy", "residual_energy"):
            rel = 0.1 if name == "wgrad.energy" else 1e-5  # the expected one is of quantized operands
            assert value == pytest.approx(expected[name], rel=rel) and value > 0, name
        else:
            assert value == 0, name


def test_statistics_add_up_over_microbatches_and_experts():
    x, w, g = operands(2)
    everything = np.ones((2, *REAL.shape), bool)

    @contract.jit
    def microbatches(x, w, g, key):
        def loss(probe):
            def one(total, xwg):
                x, w, g = xwg
                y = dot_general(
                    x, w, contract.DIMENSION_NUMBERS, recipe="averis_centered+nearest", key=key, probe=probe
                )
                return total + jnp.vdot(y, g), None

            return jax.lax.scan(one, 0.0, (x, w, g))[0]

        return jax.grad(loss)(jnp.zeros(len(GRADIENT_STATISTICS)))

    expected = sum(
        np.asarray(statistics_of("averis_centered+nearest", *xwg, everything[0])) for xwg in zip(x, w, g, strict=True)
    )
    np.testing.assert_allclose(microbatches(x, w, g, KEY), expected, rtol=2e-4)
    experts = masked_product("averis_centered+nearest", batch_dims=1)(x, w, g, everything, KEY)[-1]
    np.testing.assert_allclose(experts, expected, rtol=2e-4)


# ---------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("name", ["nvfp4", "averis_centered"])
def test_dgrad_is_unbiased(name):
    """Over keys, dX averages to D Q(W)ᵀ, D clipped where a block's rounded scale does not reach its maximum."""
    count = 400
    x, w, g = operands(tokens=(2, 17), inputs=24, outputs=40)

    @contract.jit
    def moments(x, w, g, keys):
        def dx(key):
            dot = functools.partial(dot_general, dimension_numbers=contract.DIMENSION_NUMBERS, recipe=name, key=key)
            return jax.vjp(lambda x: dot(x, w), x)[1](g)[0]

        samples = jax.lax.map(dx, keys)
        return samples.mean(0), samples.std(0, ddof=1)

    mean, deviation = (np.asarray(t, np.float64) for t in moments(x, w, g, jax.random.split(KEY, count)))
    layer = oracle_layer(name, x, w, g)
    q, center = layer.operands["dgrad.g"], np.zeros(1)
    if name == "averis_centered":
        center = layer.operands["mean.g"].exact()
    largest = 6 * q.scales.astype(np.float64) * (q.amax / np.float32(2688))
    unrounded = np.clip(g - center, -largest, largest) + center
    z = (mean - unrounded @ layer.operands["dgrad.w"].exact().T) * np.sqrt(count) / deviation
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 5 / np.sqrt(z.size / 40)  # the 24 columns of a row share their draws
    assert 0.8 < z.std() < 1.2


# ---------------------------------------------------------------- fewer than 16 features


def test_small_contractions_stay_in_high_precision_and_say_so_once(caplog):
    shapes = [(13, 29), (29, 13)]
    for inputs, outputs in shapes:
        x, w, g = operands(inputs=inputs, outputs=outputs)
        for _ in range(2):
            y, dx, dw, _ = masked_product("nvfp4_hadamard")(x, w, g, np.ones(REAL.shape, bool), KEY)
            jax.eval_shape(lambda w: prepare(w, "nvfp4_hadamard", "rhs", KEY), w)
        layer = oracle_layer("nvfp4_hadamard", x, w, g)
        if inputs < 16:
            assert_close((y, dw), (x @ w, np.einsum("btk,btn->kn", x, g)))
        else:
            assert_equals_oracle((y, layer.dx.astype(np.float32), dw), layer)
        assert_close(dx, g @ w.T)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "nvfp4_hadamard: all three GEMMs of a 13 -> 29 product in high precision (contraction below 16)",
        "nvfp4_hadamard: dgrad of a 29 -> 13 product in high precision (contraction below 16)",
    ]


def test_sixteen_features_are_quantized():
    x, w, g = operands(inputs=16, outputs=16)
    *got, _ = masked_product("nvfp4")(x, w, g, np.ones(REAL.shape, bool), KEY)
    assert_equals_oracle(got, oracle_layer("nvfp4", x, w, g))
