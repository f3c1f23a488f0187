"""The numbers on arrays whose truth is known: a planted mean, planted spikes, noise."""

import numpy as np
import pytest

from fp4jax.analysis.mean_bias import regeneration
from fp4jax.analysis.mean_bias.attribution import TERMS, TopEntries, shares
from fp4jax.analysis.mean_bias.optimizer import second_moment_share
from fp4jax.analysis.mean_bias.spectrum import Moments, growth_exponent, increments, sign_consistency, spike_rank

TOKENS, FEATURES = 1500, 250  # k = 2


def planted(scale: float = 1.0, mean: float = 2.0, spike: float = 6.0):
    """(X, mu, spike directions): orthogonal parts, the residual exactly without mean."""
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((FEATURES, 3)))[0].T
    coordinates = random.standard_normal((TOKENS, 2))
    noise = 0.2 * random.standard_normal((TOKENS, FEATURES))
    residual = spike * coordinates @ directions[1:] + noise
    residual -= residual.mean(axis=0)
    mu = mean * np.sqrt(FEATURES) * directions[0]
    return scale * (mu + residual), scale * mu, directions[1:]


def spectrum_of(x, chunk=400):
    moments = Moments(x.shape[1])
    for start in range(0, len(x), chunk):
        moments.add(x[start : start + chunk])
    return moments.spectrum()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_energies_are_exact_and_found(scale):
    x, mu, directions = planted(scale)
    s = spectrum_of(x)
    assert s.identity_error < 1e-13
    np.testing.assert_allclose(s.mean, mu, rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(s.ratio, np.sqrt(TOKENS) * np.linalg.norm(mu) / np.linalg.norm(x), rtol=1e-12)
    singular = np.linalg.svd(x - mu, compute_uv=False)
    np.testing.assert_allclose(s.spike_energy, (singular[:2] ** 2).sum(), rtol=1e-9)
    np.testing.assert_allclose(s.tail_energy, (singular[2:] ** 2).sum(), rtol=1e-9)
    assert np.linalg.svd(s.spike @ directions.T, compute_uv=False).min() > 0.99


def test_singular_vectors_agree_with_an_svd_and_cosines_sum_to_one():
    x, mu, _ = planted()
    s = spectrum_of(x)
    _, singular, right = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(s.singular[:5], singular[:5], rtol=1e-10)
    np.testing.assert_allclose(s.cosines(3), np.abs(right[:3] @ mu) / np.linalg.norm(mu), atol=1e-8)
    np.testing.assert_allclose((s.cosines(FEATURES) ** 2).sum(), 1.0, rtol=1e-10)


def test_a_pure_mean_and_no_mean():
    pure = spectrum_of(np.tile(np.arange(1.0, 21.0), (50, 1)))
    assert pure.ratio == pytest.approx(1.0, abs=1e-12) and pure.cosines(1)[0] == pytest.approx(1.0, abs=1e-12)
    assert sign_consistency(np.full(50, 3.0)) == 1.0
    x = np.random.default_rng(1).standard_normal((4000, 16))
    x -= x.mean(axis=0)
    none = spectrum_of(x)
    assert none.ratio < 1e-12
    assert abs(sign_consistency(x[:, 0]) - 0.5) < 0.03
    with pytest.raises(ValueError, match="no tokens"):
        Moments(3).spectrum()


@pytest.mark.parametrize(("features", "rank"), [(576, 5), (100, 1), (99, 1), (8, 1), (1536, 15)])
def test_spike_rank(features, rank):
    assert spike_rank(features) == rank


@pytest.mark.parametrize(("mean", "spike", "largest"), [(2.0, 0.5, "mean"), (0.02, 6.0, "spike"), (0.001, 0.0, "tail")])
def test_top_entries_are_attributed_to_what_made_them(mean, spike, largest):
    x, _, _ = planted(mean=mean, spike=spike)
    s = spectrum_of(x)
    top = TopEntries(s)
    for start in range(0, TOKENS, 400):
        top.add(x[start : start + 400])
    found = top.shares()
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert max(found, key=found.get) == largest and found[largest] > 0.5
    exact = np.sort(np.abs(x).ravel())[::-1][: int(0.001 * x.size)]
    np.testing.assert_allclose(np.abs(top.parts.sum(axis=1)), exact, rtol=1e-9)


def test_shares_need_their_cross_terms():
    found = shares(np.array([[2.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    expected = (5 / 13, 1 / 13, 1 / 13, 4 / 13, 2 / 13, 0.0)
    assert found == pytest.approx(dict(zip(TERMS, expected, strict=True)))
    assert sum(list(found.values())[:3]) < 0.6
    with pytest.raises(ValueError, match="all 0"):
        shares(np.zeros((2, 3)))


def test_increments_and_growth():
    norms, cosines = increments(np.array([[1.0, 0.0], [3.0, 0.0], [3.0, 2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(norms, [2.0, 2.0, np.sqrt(13.0)])
    np.testing.assert_allclose(cosines, [1.0, 0.0, -1.0])
    assert growth_exponent(np.full(400, -0.3)) == pytest.approx(0.5, abs=1e-9)
    few = np.full(400, 1e-3)
    few[7] = 10.0
    assert growth_exponent(few) > 0.7  # most random subsets miss the one feature that carries the mean
    with pytest.raises(ValueError, match="at least 16"):
        growth_exponent(np.ones(15))


def test_expected_embedding_is_the_mean_over_tokens():
    random = np.random.default_rng(2)
    embedding, tokens = random.standard_normal((30, 7)), random.integers(0, 30, (4, 25))
    expected = embedding[tokens.ravel()].mean(axis=0)
    np.testing.assert_allclose(regeneration.expected_embedding(tokens, embedding), expected, rtol=1e-12, atol=1e-14)


def test_operators_regenerate_the_mean_of_gaussian_inputs():
    random = np.random.default_rng(3)
    z, w = random.standard_normal((2, 400_000, 1))
    gate_mean, deviation, up_mean = (np.array(x) for x in ([0.0, -1.0, 2.0], [1.0, 2.0, 0.5], [0.0, 0.3, -1.0]))
    gate = gate_mean + deviation * z
    np.testing.assert_allclose(regeneration.gaussian_mean(regeneration.silu, gate_mean, deviation),
                               regeneration.silu(gate).mean(axis=0), atol=0.01)  # fmt: skip
    up = up_mean + 0.6 * z + 0.8 * w
    measured = (regeneration.silu(gate) * up).mean(axis=0)
    predicted = regeneration.swiglu_mean(gate_mean, deviation, up_mean, 0.6 * deviation)
    np.testing.assert_allclose(predicted, measured, atol=0.02)


def test_where_a_mean_is_regenerated_and_where_not():
    zero, one = np.zeros(1), np.ones(1)
    assert regeneration.gaussian_mean(regeneration.silu, zero, one)[0] > 0.2
    assert abs(regeneration.gaussian_mean(np.tanh, zero, one)[0]) < 1e-12
    assert abs(regeneration.gaussian_mean(lambda x: x * x - 1.0, zero, one)[0]) < 1e-12  # even, and yet none
    assert abs(regeneration.swiglu_mean(zero, one, zero, zero)[0]) < 1e-12
    assert regeneration.swiglu_mean(zero, one, zero, 0.5 * one)[0] > 0.2
    skewed = np.random.default_rng(4).exponential(3.0, 200_000) - 3.0  # not Gaussian: the closed form is off
    closed = regeneration.gaussian_mean(regeneration.silu, zero, 3.0 * one)[0]
    assert abs(closed / regeneration.silu(skewed).mean() - 1.0) > 0.1


def test_attention_passes_the_mean_and_averages_the_residual():
    random = np.random.default_rng(5)
    values = 1.0 + random.standard_normal((256, 40))
    weights = np.full((64, 256), 1.0 / 256)
    mean, residual = regeneration.attention_parts(weights, values)
    np.testing.assert_allclose(mean, np.tile(values.mean(axis=0), (64, 1)), rtol=1e-12)
    assert np.abs(residual).max() < 1e-12
    weights = random.dirichlet(np.full(256, 0.1), 64)
    _, residual = regeneration.attention_parts(weights, values)
    effective = 1.0 / np.mean((weights**2).sum(axis=1))
    assert np.mean(residual**2) == pytest.approx(values.var() / effective, rel=0.15)


def test_second_moment_share():
    mean, nu = np.array([0.0, -3.0, 0.0, 0.0]), np.ones((4, 5))
    assert second_moment_share(nu, mean) == pytest.approx((0.25, 1.0))
    nu[1] = 9.0
    assert second_moment_share(nu, mean) == pytest.approx((0.75, 3.0))
    with pytest.raises(ValueError, match="no direction"):
        second_moment_share(nu, np.zeros(4))
