"""The random bits: frozen by golden vectors, equal to the oracle's, a function of position, and of good quality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fp4jax.numerics import bits, draws, fold, key_words, matrix_draws
from tests import oracle

ROWS = np.array([0, 1, 2, 65537, 2**31, 2**32 - 1], np.uint32)
COLUMNS = np.array([0, 1, 2, 3, 2**32 - 2, 2**32 - 1], np.uint32)

# FROZEN: draws of ROWS x COLUMNS. A change here changes every stochastic rounding of every run ever made.
GOLDEN = {
    "key(0), batch 0": [
        [19719, 22329, 7572, 26102, 33011, 8329],
        [21622, 38015, 47128, 52403, 28723, 37275],
        [17131, 11355, 228, 36697, 44772, 25542],
        [60190, 36201, 56928, 19953, 38343, 53944],
        [36195, 16328, 5302, 57730, 32260, 33958],
        [39831, 4016, 931, 64920, 50403, 34826],
    ],
    "key(20260), batch 0": [
        [26801, 24239, 17269, 34319, 57746, 28677],
        [46621, 1293, 57418, 11982, 38020, 2377],
        [53824, 40400, 17401, 25280, 35107, 60726],
        [32319, 3869, 51126, 28327, 59041, 25740],
        [18502, 14834, 34472, 44449, 63082, 38430],
        [15957, 42757, 2794, 26060, 32962, 23703],
    ],
    "rbg key(0), batch 0": [
        [55462, 61835, 47902, 4571, 13218, 40090],
        [64652, 412, 13630, 1457, 31259, 21944],
        [21402, 47071, 45191, 50645, 15969, 42337],
        [5167, 63033, 1072, 44952, 41906, 47891],
        [63079, 47600, 61668, 37212, 34280, 10792],
        [21813, 19782, 18416, 23144, 22981, 64435],
    ],
}
# FROZEN: rows 1 and 2^32 - 1 of ROWS under key(0), in later matrices of a batch.
GOLDEN_BATCHES = {
    1: [[53113, 9193, 42821, 56023, 19484, 26478], [20243, 21864, 54674, 13596, 30963, 14319]],
    2**32 - 1: [[25250, 8270, 43478, 64614, 41565, 58888], [52599, 59457, 14778, 60218, 2623, 26313]],
}


def words_of(seed):
    return key_words(jax.random.key(seed))


_matrix_draws = jax.jit(matrix_draws, static_argnums=(1, 2, 3))


@jax.jit
def _matrix(words):
    return matrix_draws(words, (1024, 1024), 0)


def matrix(words):
    """A 1024 x 1024 matrix of draws, float64 in [0, 65536)."""
    return np.asarray(_matrix(words)).astype(np.float64)


@jax.jit
def _grid(words, rows, columns, batch):
    return draws(words, rows[:, None], columns[None, :], batch.reshape(1, 1))


def grid(words, rows=ROWS, columns=COLUMNS, batch=0):
    return np.asarray(_grid(words, jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(batch, jnp.uint32)))


# ---------------------------------------------------------------- specification


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("key(0), batch 0", lambda: jax.random.key(0)),
        ("key(0), batch 0", lambda: jax.random.PRNGKey(0)),
        ("key(0), batch 0", lambda: jnp.zeros(2, jnp.uint32)),
        ("key(20260), batch 0", lambda: jax.random.key(20260)),
        ("rbg key(0), batch 0", lambda: jax.random.key(0, impl="rbg")),
        ("rbg key(0), batch 0", lambda: jax.random.PRNGKey(0, impl="rbg")),
    ],
)
def test_golden(name, key):
    assert np.array_equal(grid(key_words(key())), GOLDEN[name])


@pytest.mark.parametrize("batch", GOLDEN_BATCHES)
def test_golden_batches(batch):
    assert np.array_equal(grid(words_of(0), ROWS, COLUMNS, batch)[[1, 5]], GOLDEN_BATCHES[batch])


def test_golden_fold():
    expected = {0: [340428713, 957378929], 1: [380648332, 627455514], 7: [3658038804, 1569463116]}
    for slot, words in expected.items():
        assert np.array_equal(fold(words_of(0), slot), words)


def test_equals_oracle_anywhere():
    rng = np.random.default_rng(0)
    for _ in range(20):
        words, (batch,) = rng.integers(0, 2**32, 2), rng.integers(0, 2**32, 1)
        rows, columns = rng.integers(0, 2**32, 6), rng.integers(0, 2**32, 6)
        got = grid(jnp.asarray(words, jnp.uint32), rows.astype(np.uint32), columns.astype(np.uint32), batch)
        assert np.array_equal(got, oracle.draw(words, rows[:, None], columns[None], batch))
        assert np.array_equal(fold(jnp.asarray(words, jnp.uint32), batch), np.stack(oracle.fold(words, batch)))


def test_mix_is_a_bijection():
    x = np.random.default_rng(0).permutation(2**20).astype(np.uint32) << 12 | np.arange(2**20, dtype=np.uint32) >> 8
    y = np.asarray(bits.mix(jnp.asarray(x)))
    assert np.array_equal(y, oracle.mix(x))
    # Undo the steps: xor-shifts by 15 and more need one or two rounds, odd factors have an inverse modulo 2^32.
    y = y ^ y >> 15 ^ y >> 30
    y = y * np.uint32(pow(0x735A2D97, -1, 2**32))
    y = y ^ y >> 15 ^ y >> 30
    y = y * np.uint32(pow(0x21F0AAAD, -1, 2**32))
    assert np.array_equal(y ^ y >> 16, x)


# ---------------------------------------------------------------- keys


def test_every_form_of_one_key_is_one_stream():
    assert np.array_equal(key_words(jax.random.key(5)), key_words(jax.random.PRNGKey(5)))
    rbg = jax.random.key(5, impl="rbg")
    assert np.array_equal(key_words(rbg), key_words(jax.random.key_data(rbg)))
    assert np.array_equal(jax.jit(key_words)(rbg), key_words(rbg))


def test_all_four_words_of_an_rbg_key_count():
    base = np.array([1, 2, 3, 4], np.uint32)
    seen = {tuple(np.asarray(key_words(jnp.asarray(base))).tolist())}
    for word in range(4):
        changed = base.copy()
        changed[word] ^= 1 << 31
        seen.add(tuple(np.asarray(key_words(jnp.asarray(changed))).tolist()))
    assert len(seen) == 5


@pytest.mark.parametrize(
    "key",
    [
        lambda: jax.random.split(jax.random.key(0), 3),
        lambda: jax.random.split(jax.random.PRNGKey(0), 3),
        lambda: jnp.zeros(2, jnp.int32),
        lambda: jnp.zeros(3, jnp.uint32),
        lambda: jnp.uint32(0),
    ],
    ids=["keys", "raw keys", "int32", "three words", "scalar"],
)
def test_what_is_not_one_key_raises(key):
    with pytest.raises(ValueError, match=r"key must be one JAX random key .* make one with jax\.random\.key"):
        key_words(key())


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("shape, batch_dims", [((40,), 0), ((9, 40), 0), ((3, 5, 9, 40), 0), ((3, 5, 9, 40), 2)])
def test_counters_are_row_major(shape, batch_dims):
    words = words_of(1)
    expected = oracle.draws_like(np.asarray(words), shape, batch_dims)
    assert np.array_equal(_matrix_draws(words, shape, batch_dims), expected)


def test_padding_leaves_the_counters_of_the_logical_shape():
    words = words_of(1)
    padded = np.asarray(_matrix_draws(words, (3, 16, 48), 0, (3, 9, 40)))
    assert np.array_equal(padded[:, :9, :40], oracle.draws_like(np.asarray(words), (3, 9, 40)))


def test_any_tile_with_its_offsets_is_that_part_of_the_whole():
    words = words_of(2)
    whole = np.asarray(_matrix_draws(words, (64, 96), 0))
    for row, column in ((0, 0), (7, 31), (58, 90)):
        tile = grid(words, row + np.arange(6, dtype=np.uint32), column + np.arange(6, dtype=np.uint32))
        assert np.array_equal(tile, whole[row : row + 6, column : column + 6])


def test_sharded_equals_whole():
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    words = words_of(2)
    sharded = jax.jit(lambda w: matrix_draws(w, (64, 96), 0), out_shardings=spec)(words)
    assert len(sharded.sharding.device_set) == 8
    assert np.array_equal(sharded, _matrix_draws(words, (64, 96), 0))


def test_scan_over_folded_words_equals_the_loop():
    words = words_of(3)
    _, scanned = jax.lax.scan(lambda w, i: (w, matrix_draws(fold(w, i), (4, 8), 0)), words, jnp.arange(3))
    for i in range(3):
        assert np.array_equal(scanned[i], _matrix_draws(fold(words, i), (4, 8), 0))


# ---------------------------------------------------------------- quality (fixed keys: these never flicker)


LAGS = [(0, 1), (0, 2), (0, 3), (0, 16), (1, 0), (2, 0), (16, 0), (128, 0), (1, 1), (1, -1), (2, 1), (64, 64)]


@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_uniform(seed):
    values = np.concatenate([matrix(fold(words_of(seed), slot)).ravel() for slot in range(4)])
    counts = np.bincount(values.astype(np.int64), minlength=65536)
    chi2 = np.sum((counts - 64.0) ** 2) / 64
    assert abs(chi2 - 65535) < 5 * np.sqrt(2 * 65535)  # too even is as bad as too uneven
    assert abs(values.mean() - 32767.5) < 5 * 65536 / np.sqrt(12 * values.size)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_serial_correlation(seed):
    u = matrix(words_of(seed)) - 32767.5
    for rows, columns in LAGS:
        a = u[rows:, max(columns, 0) : 1024 + min(columns, 0)]
        b = u[: 1024 - rows, max(-columns, 0) : 1024 + min(-columns, 0)]
        correlation = np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
        assert abs(correlation) < 5 / np.sqrt(a.size), (rows, columns)


def test_bits_are_independent():
    pairs = matrix(words_of(0))[:256].astype(np.uint16).reshape(-1, 2)  # the two draws of one hash: 32 bits
    bit = np.unpackbits(pairs.view(np.uint8), axis=1).astype(np.float32) - np.float32(0.5)
    limit = 5.5 / np.sqrt(len(bit))
    assert np.abs(2 * bit.mean(axis=0)).max() < limit
    correlations = 4 * bit.T @ bit / len(bit) - np.eye(32)
    assert np.abs(correlations).max() < limit


def test_streams_are_independent():
    words = words_of(0)
    streams = {
        "key 0": words,
        "key 1": words_of(1),
        "key 2^31": words_of(2**31),
        "slot 0": fold(words, 0),
        "slot 1": fold(words, 1),
        "slot 2": fold(words, 2),
        "slot 0 of slot 1": fold(fold(words, 1), 0),
        "slot 1 of slot 0": fold(fold(words, 0), 1),
    }
    u = {name: matrix(w).ravel() for name, w in streams.items()}
    two = np.asarray(_matrix_draws(words, (2, 1024, 1024), 1)).astype(np.float64)
    u |= {"batch 0": two[0].ravel(), "batch 1": two[1].ravel()}
    assert np.array_equal(u.pop("batch 0"), u["key 0"])
    table = np.stack(list(u.values())) - 32767.5
    correlations = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlations).max() < 5 / 1024
    for i, a in enumerate(table):
        for b in table[i + 1 :]:
            assert abs(np.sum(a == b) - 16) < 5 * np.sqrt(16) + 4  # equal by chance: 2^20 / 2^16


def test_row_and_column_sums_are_as_spread_as_those_of_independent_draws():
    u = (matrix(words_of(0)) - 32767.5) / (65536 / np.sqrt(12))
    for axis in (0, 1):
        sums = u.sum(axis=axis) / 32
        assert abs(np.mean(sums**2) - 1) < 5 * np.sqrt(2 / 1024)
        assert np.abs(sums).max() < 5
