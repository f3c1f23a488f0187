"""The closed forms: the design's numbers to the digits given, and integrals computed another way."""

import numpy as np
import pytest
from scipy import integrate
from scipy.stats import norm

from fp4jax.analysis.geometry import activations, finite_width, outliers, perturbations, relu, ternary
from fp4jax.analysis.geometry.depth import depth_ratios

RATES = np.array([0.01, 0.02, 0.05, 0.10])


def agrees(values, printed, digits):
    np.testing.assert_allclose(np.asarray(values), printed, rtol=0, atol=0.5000001 * 10.0**-digits)


def gaussian_mean(function, r, scale=1.0):
    """E[function(u, scale v)] for correlation r, by adaptive quadrature in polar coordinates."""
    theta = np.arccos(r)

    def at_angle(phi):
        return function(np.cos(phi), scale * np.cos(phi - theta))

    # Degree 2 in the radius: E[rho²] = 2.
    breaks = sorted({np.pi / 2, -np.pi / 2, theta - np.pi / 2, theta + np.pi / 2})
    breaks = [(b + np.pi) % (2 * np.pi) - np.pi for b in breaks]
    edges = [-np.pi, *sorted(breaks), np.pi]
    return sum(integrate.quad(at_angle, a, b)[0] for a, b in zip(edges, edges[1:], strict=False)) * 2 / (2 * np.pi)


def test_theorem_3_limit_and_the_papers_form():
    agrees(perturbations.SMALL_RATE_RATIO, 2.7519, 4)
    agrees(perturbations.ratio_paper(RATES[:3]), [2.610, 2.538, 2.378], 3)
    agrees(perturbations.ratio_paper(0.1), 2.1766, 4)  # the paper prints 2.178
    assert perturbations.ratio_exact(1e-9) == pytest.approx(perturbations.SMALL_RATE_RATIO, rel=1e-5)


def test_exact_limit():
    agrees(perturbations.ratio_exact(RATES), [2.6683, 2.6141, 2.4790, 2.2920], 4)


def test_radial_fractions():
    agrees(perturbations.sign_perturbation(RATES).radial_fraction, [0.00958, 0.01880, 0.04523, 0.08644], 5)
    agrees(perturbations.magnitude_perturbation(RATES).radial_fraction, [0.64213, 0.64415, 0.64771, 0.65109], 5)
    np.testing.assert_allclose(
        perturbations.sign_perturbation(RATES).radial_fraction, perturbations.sign_error(RATES) / 2, rtol=1e-12
    )


def test_slope_is_that_of_the_exact_ratio():
    agrees(perturbations.ratio_slope(), 0.1686, 4)
    p = 1e-6  # of the terms in sqrt(p) and p the first is left, up to a thousandth
    measured = (1.0 - perturbations.ratio_exact(p) / perturbations.SMALL_RATE_RATIO) / np.sqrt(p)
    assert measured == pytest.approx(perturbations.ratio_slope(), abs=2e-3)


def test_the_papers_slope():
    agrees(4 / (3 * np.pi), 0.4244, 4)
    p = 1e-8
    paper = (1.0 - perturbations.ratio_paper(p) / perturbations.SMALL_RATE_RATIO) / np.sqrt(p)
    agrees(paper, 0.4244, 3)


@pytest.mark.parametrize("exponent", [6, 12, 16, 18, 100, 300])
def test_rates_near_zero_keep_their_digits(exponent):
    """Where 1 - 2p rounds to 1: the leading orders, of which the next is smaller by a factor p."""
    p = 10.0**-exponent
    slope = perturbations.ratio_slope() * np.sqrt(p)
    assert perturbations.ratio_exact(p) == pytest.approx(
        perturbations.SMALL_RATE_RATIO * (1 - slope), rel=3 * p + 1e-14
    )
    assert perturbations.sign_error(p) == pytest.approx(perturbations.sign_error_leading(p), rel=p + 1e-14)
    assert perturbations.magnitude_correlation(p) <= 1.0
    alpha = np.sqrt(p)
    flips = outliers.outlier_flip_energy_leading(alpha)
    assert outliers.outlier_flip_energy(alpha) == pytest.approx(flips, rel=2 * p + 1e-14)
    assert outliers.leverage(alpha, 2048) == pytest.approx(
        outliers.leverage_leading(alpha, 2048) * outliers.leverage(0.01, 2048) / outliers.leverage_leading(0.01, 2048),
        rel=1e-3,
    )


def test_small_angle_series_meet_the_differences():
    below, above = (np.nextafter(relu._SMALL_ANGLE, side) for side in (0.0, 1.0))
    for function in (relu.error_at_angle, relu.flip_error_at_angle):
        assert function(below) == pytest.approx(function(above), rel=1e-12)


def test_sign_error_leading_orders():
    p = np.array([1e-4, 1e-6])
    np.testing.assert_allclose(perturbations.sign_error_leading(p), perturbations.sign_error(p), rtol=1e-4)
    np.testing.assert_allclose(relu.flip_error(1 - 2 * p), 16 * p**1.5 / (3 * np.pi), rtol=1e-3)
    np.testing.assert_allclose(relu.smooth_error(1 - 2 * p), 2 * p - 8 * p**1.5 / np.pi, rtol=1e-4)


def test_normalizations_differ_by_the_perturbed_norm():
    assert perturbations.magnitude_scale(0.01) ** 2 == pytest.approx(1.3592, abs=1e-4)
    assert perturbations.ratio_own_norm(0.01) == pytest.approx(3.627, abs=1e-3)
    # The chord of an angle is its sine to leading order.
    assert perturbations.ratio_chord(1e-8) == pytest.approx(perturbations.ratio_own_norm(1e-8), rel=1e-4)


@pytest.mark.parametrize("r", [-1.0, -0.5, 0.0, 0.3, 0.98, 1.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.2])
def test_relu_moments_equal_integrals(r, scale):
    moments = relu.relu_perturbation(scale, r)
    energy = lambda a, b: (max(a, 0.0) - max(b, 0.0)) ** 2  # noqa: E731
    assert moments.energy == pytest.approx(gaussian_mean(energy, r, scale), abs=1e-9)
    closing = gaussian_mean(lambda a, b: energy(a, b) * (a > 0 > b), r, scale)
    opening = gaussian_mean(lambda a, b: energy(a, b) * (a < 0 < b), r, scale)
    assert (moments.closing, moments.opening) == pytest.approx((closing, opening), abs=1e-9)
    cross = gaussian_mean(lambda a, b: max(a, 0.0) * (max(b, 0.0) - max(a, 0.0)), r, scale)
    assert moments.radial_fraction * moments.energy / 2 == pytest.approx(cross**2, abs=1e-9)
    assert moments.both_open + moments.closing + moments.opening == pytest.approx(moments.energy)
    assert relu.relu_error(r) == pytest.approx(relu.flip_error(r) + relu.smooth_error(r), abs=1e-15)


def test_fourth_moments_equal_a_sample():
    u, v = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 400_000).T
    a = np.maximum(u, 0)
    d = 1.3 * np.maximum(v, 0) - a
    sample = [np.mean(a ** (4 - k) * d**k) for k in range(5)]
    np.testing.assert_allclose(relu.relu_fourth_moments(1.3, 0.7), sample, rtol=0.03)
    np.testing.assert_allclose(relu.relu_fourth_moments(1.0, 1.0), [1.5, 0, 0, 0, 0], atol=1e-14)


def test_fact_1_and_theorem_1():
    assert perturbations.sign_alignment(perturbations.gaussian_cv()) == pytest.approx(2 / np.pi)
    w = np.random.default_rng(1).standard_t(5, 1000)
    magnitude = np.abs(w)
    cv = magnitude.std() / magnitude.mean()
    cosine = w @ np.sign(w) / np.linalg.norm(w) / np.sqrt(len(w))
    assert perturbations.sign_alignment(cv) == pytest.approx(cosine**2)
    best = np.linalg.norm(w - magnitude.mean() * np.sign(w)) ** 2 / (w @ w)
    assert perturbations.scaling_bound(cv) == pytest.approx(best)
    assert perturbations.scaling_bound(0.0) == 0.0


def test_random_signs_leave_an_alignment_of_order_1_over_n():
    rng, n = np.random.default_rng(2), 40
    w, signs = rng.standard_normal((20_000, n)), rng.choice([-1.0, 1.0], (20_000, n))
    energy = np.sum(w * w, axis=1)
    scrambled = np.sum(w * np.abs(w) * signs, axis=1) ** 2 / energy**2
    alone = np.sum(w * signs, axis=1) ** 2 / (n * energy)
    for sample, expected in ((scrambled, perturbations.random_sign_alignment(n)), (alone, 1 / n)):
        assert abs(sample.mean() - expected) < 4 * sample.std() / np.sqrt(len(sample))
    assert perturbations.random_sign_alignment(n) > 2.5 / n


def test_proposition_1():
    sign, magnitude = perturbations.linear_radial_fractions(RATES)
    np.testing.assert_allclose(sign, RATES)
    np.testing.assert_allclose(magnitude, 2 / np.pi)


def test_theorem_4():
    theorem = ternary.sign_quantization()
    agrees(theorem.cos2, 0.6366, 4)
    agrees(theorem.degrees, 37.07, 2)
    agrees(theorem.sin2, 0.3634, 4)
    agrees(theorem.norm_difference, 0.4042, 4)
    agrees(theorem.gate_flips, 0.206, 3)
    np.testing.assert_allclose(ternary.ternary_linear_error(0.0), 1 - 2 / np.pi)
    agrees(ternary.ternary_linear_error(0.0)[1], 0.36338, 5)
    agrees(theorem.after_relu.energy, 0.15971, 5)
    agrees(theorem.after_relu.radial_fraction, 0.36489, 5)
    agrees(ternary.equal_norm_rate(), 0.0908, 4)
    agrees(ternary.equal_norm_ratio(), 1.437, 3)


@pytest.mark.parametrize("threshold", [0.0, ternary.ABSMEAN_THRESHOLD, 1.5])
def test_ternary_moments_equal_integrals(threshold):
    kept = 2 * integrate.quad(norm.pdf, threshold, np.inf)[0]
    inner = 2 * integrate.quad(lambda w: w * norm.pdf(w), threshold, np.inf)[0]
    assert ternary.ternary_correlation(threshold) == pytest.approx(inner / np.sqrt(kept))
    assert ternary.ternary_scale(threshold) == pytest.approx(np.sqrt(2 / np.pi * kept))
    energy, radial = ternary.ternary_linear_error(threshold)
    error = lambda w: (w - np.sqrt(2 / np.pi) * (w > threshold)) ** 2 * 2 * norm.pdf(w)  # noqa: E731
    assert energy == pytest.approx(integrate.quad(error, 0, threshold)[0] + integrate.quad(error, threshold, np.inf)[0])
    assert radial * energy == pytest.approx((1 - np.sqrt(2 / np.pi) * inner) ** 2)
    at_zero = ternary.ternary_after_relu(0.0)
    assert at_zero.energy == pytest.approx(ternary.sign_quantization().after_relu.energy)


def test_theorem_6_and_its_crossover():
    alphas = np.array([0.0221, 0.024, 0.1, 0.26, 0.5])
    agrees(outliers.leverage(alphas, 2048)[:2], [1.00, 1.18], 2)
    agrees(outliers.leverage(0.1, 2048), 19.98, 2)
    agrees(outliers.leverage(alphas, 2048)[3:], [133, 538], 0)
    for n in (16, 2048):
        assert outliers.leverage(outliers.leverage_crossover(n), n) == pytest.approx(1.0)
    # The leading order leaves out the other input's own correction, 4/(3 pi sqrt(n)).
    small = alphas[:3]
    np.testing.assert_allclose(outliers.leverage_leading(small, 1 << 20), outliers.leverage(small, 1 << 20), rtol=0.02)
    assert outliers.leverage_leading(0.01, 1 << 30) == pytest.approx(outliers.leverage(0.01, 1 << 30), rel=1e-3)


def test_proposition_3():
    alphas = np.array([0.0, 0.01, 0.1, 0.5, 1.0])
    np.testing.assert_allclose(
        outliers.outlier_gate_flip_rate(alphas), relu.gate_flip_rate(1 - 2 * alphas**2), atol=1e-9
    )
    assert outliers.outlier_flip_energy(0.01) == pytest.approx(outliers.outlier_flip_energy_leading(0.01), rel=1e-3)


def test_appendix_f():
    gammas = np.array([0.1, 0.3, 0.5, 0.9, 0.99])
    ratios = outliers.column_ratio(gammas)
    agrees(ratios[0], 3.38, 2)
    agrees(ratios[1:4], [10.1, 19.0, 106.9], 1)
    agrees(ratios[4], 991, 0)
    np.testing.assert_allclose(outliers.damage_fraction(np.array([0.0, 0.5, 1.0])), [0.0, 0.5, 1.0])
    few, many = outliers.group_amplitudes(0.3, 2000)
    assert 100 * few**2 + 1900 * many**2 == pytest.approx(1.0)
    assert 2000 * outliers.group_amplitudes(1.0, 2000)[0] ** 2 == pytest.approx(20.0)  # 1/f, and no more


def test_flipped_set_counts_its_energy_alone():
    assert outliers.flipped_set_error(0.03) == pytest.approx(perturbations.sign_error(0.03))
    assert outliers.flipped_set_gate_flip_rate(0.25) == pytest.approx(outliers.outlier_gate_flip_rate(0.5))


def test_activation_constants():
    assert activations.activation_ratio_limit("relu", 0.3) == pytest.approx(perturbations.SMALL_RATE_RATIO)
    for name in ("silu", "gelu"):
        # Nearly linear for small pre-activations, nearly a ReLU for large ones.
        for sigma in (1e-3, 1e3):
            limit = activations.activation_ratio_limit(name, sigma)
            assert limit == pytest.approx(perturbations.SMALL_RATE_RATIO, rel=1e-3)
        assert activations.activation_ratio(name, 1e-8) == pytest.approx(
            activations.activation_ratio_limit(name), rel=1e-3
        )
        f = activations.activation(name)
        x = np.linspace(-5, 5, 101)
        numeric = (f.function(x + 1e-6) - f.function(x - 1e-6)) / 2e-6
        np.testing.assert_allclose(f.derivative(x), numeric, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perturbations.ratio_exact(0.0), r"p must be in \(0, 0.5\), got 0"),
        (lambda: perturbations.ratio_paper(0.5), r"p must be in \(0, 0.5\), got 0.5"),
        (lambda: perturbations.sign_error(np.array([0.1, np.nan])), r"p must be in \(0, 0.5\), got nan"),
        (lambda: perturbations.magnitude_perturbation(-0.1), r"p must be in \(0, 0.5\), got -0.1"),
        (lambda: perturbations.linear_radial_fractions(0.7), r"p must be in \(0, 0.5\), got 0.7"),
        (lambda: depth_ratios(0.5, 2, residual=False), r"p must be in \(0, 0.5\), got 0.5"),
        (lambda: depth_ratios(0.1, 0, residual=False), "layers must be at least 1, got 0"),
        (lambda: finite_width.ratio_at_width(0.1, 15), "n must be at least 16, got 15"),
        (lambda: relu.flipped_angle(1.5), r"share must be in \[0, 1\], got 1.5"),
        (lambda: relu.gate_flip_rate(-1.1), r"r must be in \[-1, 1\], got -1.1"),
        (lambda: outliers.outlier_gate_flip_rate(1.1), r"alpha must be in \[0, 1\], got 1.1"),
        (lambda: outliers.outlier_flip_energy(np.array([0.5, np.nan])), r"alpha must be in \[0, 1\], got nan"),
        (lambda: relu.relu_kernel(1.01), r"r must be in \[-1, 1\], got 1.01"),
        (lambda: relu.relu_error(np.array([0.0, -2.0])), r"r must be in \[-1, 1\], got -2"),
        (lambda: relu.relu_perturbation(-1.0, 0.0), "scale must be finite and at least 0, got -1"),
        (lambda: outliers.leverage(-0.1, 10), r"alpha must be in \[0, 1\], got -0.1"),
        (lambda: outliers.leverage(1.0, 10), r"alpha must be in \[0, 1\) here"),
        (lambda: outliers.leverage(0.1, 1), "n must be at least 2, got 1"),
        (lambda: outliers.column_ratio(1.0), r"gamma must be in \[0, 1\), got 1"),
        (lambda: outliers.damage_fraction(1.1), r"gamma must be in \[0, 1\], got 1.1"),
        (lambda: outliers.column_ratio(0.1, 0.0), r"fraction must be in \(0, 1\), got 0"),
        (lambda: ternary.ternary_correlation(-1.0), "threshold must be finite and at least 0, got -1"),
        (lambda: perturbations.scaling_bound(-1.0), "cv must be finite and at least 0, got -1"),
        (
            lambda: activations.activation_ratio_limit("swish"),
            "unknown activation 'swish'; there are: relu, silu, gelu",
        ),
        (lambda: activations.activation_ratio_limit("silu", 0.0), "sigma must be finite and above 0, got 0"),
    ],
)
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SMALL, SHARES, CORRELATIONS = (np.linspace(*ends, 6) for ends in ((0.01, 0.4), (0.05, 0.95), (-0.9, 0.9)))
VECTORIZED = [
    *((function, SMALL) for function in (
        perturbations.ratio_exact, perturbations.ratio_paper, perturbations.ratio_chord, perturbations.ratio_own_norm,
        perturbations.sign_error, perturbations.sign_error_leading, perturbations.magnitude_scale,
        perturbations.magnitude_correlation, lambda p: perturbations.sign_perturbation(p).radial_fraction,
        lambda p: perturbations.magnitude_perturbation(p).radial_fraction,
        lambda p: perturbations.linear_radial_fractions(p)[0], lambda p: perturbations.linear_radial_fractions(p)[1],
        perturbations.sign_alignment, perturbations.scaling_bound,
    )),
    *((function, CORRELATIONS) for function in (
        relu.relu_kernel, relu.relu_error, relu.gate_flip_rate, relu.flip_error, relu.smooth_error,
        lambda r: relu.relu_perturbation(1.2, r).transverse,
    )),
    *((function, SHARES) for function in (
        outliers.outlier_gate_flip_rate, outliers.outlier_flip_energy, outliers.outlier_flip_energy_leading,
        lambda a: outliers.leverage(a, 64), lambda a: outliers.leverage_leading(a, 64), outliers.flipped_set_error,
        outliers.flipped_set_gate_flip_rate, outliers.column_ratio, outliers.damage_fraction,
        lambda g: outliers.group_amplitudes(g, 64)[0], ternary.ternary_correlation, ternary.ternary_scale,
        lambda t: ternary.ternary_after_relu(t).transverse, lambda t: ternary.ternary_linear_error(t)[1],
    )),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments"), VECTORIZED)
def test_closed_forms_are_vectorized_and_float64(function, arguments):
    single = np.array([function(float(x)) for x in arguments])
    assert np.asarray(function(float(arguments[0]))).dtype == np.float64
    for shape in ((6,), (2, 3)):
        values = function(arguments.reshape(shape))
        assert values.shape == shape and values.dtype == np.float64
        np.testing.assert_allclose(values.ravel(), single, rtol=1e-14)
    assert np.asarray(function(arguments.astype(np.float32))).dtype == np.float64


def test_numbers_of_the_docs():
    """What docs/geometry.md prints of closed forms that are derived there."""
    agrees(perturbations.ratio_own_norm(0.01), 3.627, 3)
    agrees(perturbations.ratio_chord(0.01), 3.652, 3)
    agrees([finite_width.ratio_at_width(p, 512) for p in RATES], [2.644, 2.597, 2.468, 2.285], 3)
    agrees(finite_width.ratio_at_width(0.01, 2048), 2.662, 3)
    agrees(finite_width.ratio_at_width(0.01, 420), 2.639, 3)
    agrees(finite_width.radial_fraction_at_width(0.01, 2048, signs=True), 0.0111, 4)
    for name, at_1, sigma, lowest in (("silu", 2.434, 0.67, 2.388), ("gelu", 2.539, 0.43, 2.359)):
        agrees(activations.activation_ratio_limit(name), at_1, 3)
        agrees(activations.activation_ratio_limit(name, sigma), lowest, 3)
        agrees(min(activations.activation_ratio_limit(name, s) for s in np.arange(0.2, 2.0, 0.01)), lowest, 3)


@pytest.mark.parametrize(
    ("residual", "own_norm"),
    [(False, [3.627, 3.511, 3.394, 3.279, 3.169, 3.065]), (True, [1.369, 1.361, 1.354, 1.347, 1.340, 1.334])],
)
def test_depth_of_the_docs(residual, own_norm):
    ratios = depth_ratios(0.01, 6, residual=residual)
    agrees(ratios.own_norm, own_norm, 3)
    if not residual:
        first = (perturbations.ratio_chord, perturbations.ratio_own_norm, perturbations.ratio_exact)
        found = (ratios.chord, ratios.own_norm, ratios.transverse)
        np.testing.assert_allclose([x[0] for x in found], [f(0.01) for f in first], rtol=1e-12)


@pytest.mark.parametrize(
    ("threshold", "quadrants", "energy", "radial", "transverse", "cos2", "linear"),
    [
        (0.0, [0.1165, 0.0264, 0.0168], 0.1597, 0.365, 0.101, 0.637, (0.363, 0.363)),
        (ternary.ABSMEAN_THRESHOLD, [0.1080, 0.0112, 0.0049], 0.1241, 0.659, 0.042, 0.787, (0.263, 0.645)),
    ],
)
def test_quadrants_of_the_docs(threshold, quadrants, energy, radial, transverse, cos2, linear):
    moments = ternary.ternary_after_relu(threshold)
    agrees([moments.both_open, moments.closing, moments.opening], quadrants, 4)
    agrees(moments.energy, energy, 4)
    agrees([moments.radial_fraction, moments.transverse], [radial, transverse], 3)
    agrees(moments.flip_fraction, 0.27 if threshold == 0 else 0.13, 2)
    agrees(ternary.ternary_correlation(threshold) ** 2, cos2, 3)
    agrees(ternary.ternary_linear_error(threshold), linear, 3)
