"""The simulations agree with the closed forms, at sizes of seconds; and their pieces do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.analysis.geometry import experiments, finite_width, perturbations, simulation
from fp4jax.analysis.geometry.tables import Row, Table, render

SETTINGS = experiments.Settings(
    seed=3, widths={96: 24, 128: 24}, depth_widths={96: 10, 192: 10}, inputs=16, cheap_draws=8, cheap_inputs=1 << 16
)


SLOW = (experiments.depth_tables, experiments.activation_tables)


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(e, marks=[pytest.mark.slow] * (e in SLOW), id=e.__name__) for e in experiments.EXPERIMENTS],
)
def test_simulations_are_within_3_standard_errors(experiment):
    for table in experiment(SETTINGS):
        assert table.rows
        wrong = [row for row in table.rows if row.deviation is not None and abs(row.deviation) > 3.0]
        assert not wrong, render(Table(table.name, table.title, wrong))


def test_width_corrections_matter():
    """At these widths the limit itself would be refused: what agrees is the closed form at the width."""
    transverse = experiments.energies(_block(96, 48)["output"])[0].mean(axis=-1)
    estimate = experiments.ratio(transverse[:, 0, 0], transverse[:, 0, 1])
    assert abs(estimate.deviation(finite_width.ratio_at_width(0.01, 96))) < 3.0
    assert abs(estimate.deviation(float(perturbations.ratio_exact(0.01)))) > 3.0


def _block(width, draws):
    return simulation.run_draws(
        simulation.block_draw, 0, draws, rates=jnp.array([0.01], jnp.float32), width=width, inputs=32
    )


def test_perturbations_have_equal_norms_and_do_what_they_say():
    key = jax.random.key(0)
    w = jax.random.normal(key, (64, 64), jnp.float32)
    flip = jax.random.uniform(jax.random.fold_in(key, 1), w.shape) < 0.1
    flipped, raised = map(np.asarray, simulation._sign_and_magnitude(w, flip))
    w, flip = np.asarray(w), np.asarray(flip)
    np.testing.assert_array_equal(np.abs(flipped), np.abs(w))
    np.testing.assert_array_equal(np.sign(flipped) != np.sign(w), flip)
    np.testing.assert_array_equal(np.sign(raised), np.sign(w))
    np.testing.assert_allclose(np.abs(raised) - np.abs(w), np.mean(np.abs(raised) - np.abs(w)), rtol=1e-4)
    assert np.linalg.norm(raised - w) == pytest.approx(np.linalg.norm(flipped - w), rel=1e-5)


def test_draws_depend_on_seed_and_index_alone():
    arguments = dict(threshold=jnp.float32(0.0), width=32, inputs=4)
    first = simulation.run_draws(simulation.ternary_draw, 5, 3, **arguments)
    again = simulation.run_draws(simulation.ternary_draw, 5, 2, **arguments)
    other = simulation.run_draws(simulation.ternary_draw, 6, 2, **arguments)
    np.testing.assert_array_equal(first["hidden"][:2], again["hidden"])
    assert not np.any(first["hidden"][:2] == other["hidden"])
    assert not np.any(first["hidden"][0] == first["hidden"][1])


def test_energies_of_known_vectors():
    y, moved = np.array([3.0, 0.0]), np.array([4.0, 3.0])
    d = moved - y
    sums = np.array([[[y @ y], [y @ d], [d @ d]]])
    transverse, sine2, chord = (x[0, 0] for x in experiments.energies(sums))
    assert transverse == pytest.approx(9.0)
    assert sine2 == pytest.approx(9.0 / 25.0)
    assert chord == pytest.approx(2.0 * (1.0 - 0.8))
    repeated = np.repeat(sums, 2, axis=0)
    assert experiments.radial_fraction(repeated).value == pytest.approx(1.0 / 10.0)


def test_flipped_shares_are_a_distribution_with_the_right_mean_and_spread():
    shares, weights = finite_width.flipped_shares(0.02, 300)
    rng = np.random.default_rng(0)
    w2 = rng.standard_normal((20_000, 300)) ** 2
    sample = (w2 * (rng.random(w2.shape) < 0.02)).sum(axis=1) / w2.sum(axis=1)
    assert weights.sum() == pytest.approx(1.0)
    assert weights @ shares == pytest.approx(0.02, rel=1e-3)
    assert np.sqrt(weights @ shares**2 - 0.02**2) == pytest.approx(sample.std(), rel=0.02)


def test_a_wide_block_reaches_the_limit():
    assert finite_width.ratio_at_width(0.05, 10**6) == pytest.approx(float(perturbations.ratio_exact(0.05)), rel=1e-4)


def test_render_leaves_out_empty_columns_and_marks_deviations():
    estimate = experiments.mean(np.array([1.0, 1.2]))
    text = render(Table("x", "a title", [Row("a", 1.0, 1.1), Row("b", 1.0, None, estimate)], {"seed": 1}))
    assert text.splitlines()[0] == "a title"
    assert "at width" not in text
    assert "+1.0" in text and "-9.09%" in text
    assert "(seed 1)" in text


def test_linear_radial_fraction_of_narrow_layers():
    rng, n, p = np.random.default_rng(1), 16, 0.1
    w, x = rng.standard_normal((20_000, n, n)), rng.standard_normal((20_000, n))
    flip = rng.random(w.shape) < p
    u, d = np.einsum("kij,kj->ki", w, x), np.einsum("kij,kj->ki", -2 * w * flip, x)
    estimate = experiments.ratio(np.sum(u * d, axis=1) ** 2, np.sum(u * u, axis=1) * np.sum(d * d, axis=1))
    expected = finite_width.linear_radial_fraction_at_width(p, n, signs=True)
    assert abs(estimate.deviation(expected)) < 3.0
    assert estimate.standard_error < 0.02 * expected


def test_transverse_energy_of_few_units():
    rng, n, p = np.random.default_rng(2), 48, 0.1
    scale, r = float(perturbations.magnitude_scale(p)), float(perturbations.magnitude_correlation(p))
    u, xi = rng.standard_normal((2, 100_000, n))
    a = np.maximum(u, 0)
    d = scale * np.maximum(r * u + np.sqrt(1 - r * r) * xi, 0) - a
    transverse = np.mean(d * d, axis=1) - np.mean(a * d, axis=1) ** 2 / np.mean(a * a, axis=1)
    estimate, expected = experiments.mean(transverse), finite_width.transverse_at_width(p, n, signs=False)
    limit = float(perturbations.magnitude_perturbation(p).transverse)
    assert estimate.value == pytest.approx(expected, rel=0.005)  # the next order, 1/n²
    assert abs(limit / expected - 1) > 0.03
