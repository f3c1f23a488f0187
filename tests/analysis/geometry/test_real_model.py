"""The real-model experiments on a tiny random Llama, against direct computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax.analysis.geometry import column_flips, figures, real_figures, real_model, real_tables
from fp4jax.analysis.geometry.estimates import Estimate
from fp4jax.analysis.geometry.tables import Grid, render
from fp4jax.data.tokenizers import load_tokenizer
from fp4jax.models.llama import Llama, LlamaConfig
from fp4jax.models.pretrained import LoadedModel
from fp4jax.models.qwen3 import LINEARS, Qwen3, Qwen3Config
from fp4jax.models.qwen3_moe import Qwen3MoEConfig
from fp4jax.policy import policy
from fp4jax.recipes import recipe

pytestmark = pytest.mark.standard_promotion

SIZES = dict(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    dtype="float32", init_std=0.15,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)
SETTINGS = real_tables.RealSettings(
    seed=0, recipes=("nvfp4", "ternary"), rates=(0.01, 0.1, 1.0), draws=2, columns=8, energy_tokens=16
)


def tiny(model_class=Llama, config=None):
    config = config or LlamaConfig(**SIZES)
    return model_class(config, policy=policy("all_linear", "bf16", config.linear_paths), rngs=nnx.Rngs(0))


def loaded():
    parameters = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(tiny()))}
    return LoadedModel(LlamaConfig(**SIZES), parameters, load_tokenizer("embedded"))


@pytest.fixture(scope="module")
def subject():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return real_tables.Subject.of("tiny", loaded(), TOKENS)


@pytest.mark.parametrize("kind", [(Llama, LlamaConfig), (Qwen3, Qwen3Config)], ids=["llama", "qwen3"])
def test_trace_follows_the_model(kind):
    model = tiny(kind[0], kind[1](**SIZES))
    traced = real_model.trace(model, jnp.asarray(TOKENS))
    np.testing.assert_allclose(model.norm(traced["stream"][-1]), model.hidden(jnp.asarray(TOKENS)), atol=2e-5)
    for linear in LINEARS:
        np.testing.assert_allclose(jnp.sum(traced[f"alpha2 {linear}"], axis=1), 1.0, rtol=1e-5)


@pytest.mark.slow
def test_quantized_stack_follows_the_quantized_model(subject):
    tokens = jnp.asarray(TOKENS)
    sums = real_model.quantization_errors(subject.loaded.model("bf16"), tokens, recipe=recipe("nvfp4"))
    plain, quantized = (subject.loaded.model(name) for name in ("bf16", "nvfp4"))
    norm = lambda model: np.asarray(model.hidden(tokens)).reshape(-1, 32)  # noqa: E731
    y2, yd, d2 = np.asarray(sums["stack"], np.float64)[-1]
    cosine = (y2 + yd) / np.sqrt(y2 * (y2 + 2 * yd + d2))
    a, b = norm(plain), norm(quantized)
    expected = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(cosine, expected, atol=1e-5)
    np.testing.assert_allclose(sums["layer"][0], sums["stack"][0], rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(sums["products"])[:, :, 2] > 0)


def test_no_quantization_no_error(subject):
    sums = real_model.quantization_errors(subject.loaded.model("bf16"), jnp.asarray(TOKENS), recipe=recipe("bf16"))
    y2, _, d2 = np.asarray(sums["stack"])[-1]
    assert np.all(d2 <= 1e-8 * y2)


def test_row_alignment():
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((2, 50, 3)), jnp.float32)
    w = np.asarray(kernel)[1, :, 2]
    cosine = w @ np.sign(w) / np.linalg.norm(w) / np.sqrt(50)
    assert real_model.row_alignments(kernel)[1, 2] == pytest.approx(cosine**2, rel=1e-5)


def test_mlp_ratio_of_a_random_layer_is_the_closed_form():
    key = jax.random.key(0)
    x, gate, down = (jax.random.normal(jax.random.fold_in(key, i), (2, 256, 256), jnp.float32) for i in range(3))
    tables = real_model.mlp_ratio_sums(key, jnp.float32(0.05), x, gate / 16, down, activation=jax.nn.relu)
    y2, yd, d2 = np.moveaxis(np.asarray(tables["sums"], np.float64), 2, 0)
    transverse = (d2 - yd**2 / y2).mean(axis=-1)
    np.testing.assert_allclose(transverse[:, 0] / transverse[:, 1], 2.4576, rtol=0.03)
    np.testing.assert_allclose(tables["scale"], 1.0, rtol=0.05)


def test_column_energy_is_that_of_flipping_the_column():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 6)).astype(np.float32), rng.standard_normal((6, 7)).astype(np.float32)
    energies = real_model.column_energies(jnp.asarray(x), jnp.asarray(w), activation=jax.nn.relu)
    flipped = w.copy()
    flipped[4] *= -1
    clean, moved = np.maximum(x @ w, 0), np.maximum(x @ flipped, 0)
    expected = np.mean(np.sum((moved - clean) ** 2, axis=1) / np.sum(clean**2, axis=1))
    assert energies[4] == pytest.approx(expected, rel=1e-4)


def test_outlier_columns_are_the_largest():
    alpha2 = jnp.asarray(np.random.default_rng(0).random((2, 40)), jnp.float32)
    mask = np.asarray(column_flips.outlier_columns(alpha2, 0.05))
    assert mask.sum(axis=1).tolist() == [2, 2]
    for row, chosen in zip(np.asarray(alpha2), mask, strict=True):
        assert row[chosen].min() > row[~chosen].max()


def test_count_matched_flips_match_counts_and_norms(subject):
    path = "layers.mlp.up_proj.kernel"
    kernel = subject.loaded.params[path]
    mask = column_flips.outlier_columns(subject.alpha2("mlp.up_proj"), 0.25)
    seen = []

    def loss(params):
        return jnp.sum((params[path] - kernel) ** 2)  # of the change: its energy

    draw = column_flips.count_matched_flips({path: kernel}, {path: mask}, loss)
    for rate in (0.3, 1.0):
        result = draw(jax.random.key(1), jnp.float32(rate))
        seen.append(result)
        np.testing.assert_allclose(result.loss[:2], result.norms**2, rtol=1e-4)
        assert result.loss[2] == pytest.approx(result.loss[0], rel=1e-4)
        assert result.flips[1] == pytest.approx(result.flips[0], rel=0.15)
    # At rate 1 every weight of an outlier column flips, and nothing else does.
    assert seen[1].flips[0] == mask.sum() * kernel.shape[2]
    expected = 4 * jnp.sum(jnp.where(mask[:, :, None], kernel, 0.0) ** 2)
    assert seen[1].loss[0] == pytest.approx(float(expected), rel=1e-4)


def test_single_column_flips_flip_one_column(subject):
    path = "layers.mlp.gate_proj.kernel"
    kernel = subject.loaded.params[path]

    def loss(params):
        return jnp.sum((params[path] - kernel) ** 2)

    rises = column_flips.single_column_flips({path: kernel}, path, 1, np.array([0, 5]), loss)
    expected = [4 * float(jnp.sum(kernel[1, c] ** 2)) for c in (0, 5)]
    np.testing.assert_allclose(rises, expected, rtol=1e-4)


def test_linear_response_threshold():
    rates = np.array([0.1, 0.2, 0.4, 0.8])
    assert column_flips.linear_response_threshold(rates, np.array([1.0, 2.1, 3.7, 5.0])) == 0.4
    assert column_flips.linear_response_threshold(rates, rates) == 0.8


def test_loss_is_the_models(subject):
    logits = np.asarray(subject.loaded.model("bf16")(jnp.asarray(TOKENS)), np.float64)[:, :-1]
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, TOKENS[:, 1:, None].astype(np.int64), axis=-1).mean()
    assert subject.loss(subject.loaded.params) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", real_tables.REAL_EXPERIMENTS, ids=lambda e: e.__name__)
def test_tables_are_whole(subject, experiment, tmp_path):
    grids = experiment(subject, SETTINGS)
    drawn = {path.stem for path in figures.draw(grids, tmp_path)}
    assert drawn == {grid.name for grid in grids} & set(real_figures.FIGURES)
    if experiment is real_tables.bridge_table:
        assert [grid.name for grid in grids] == [f"bridge-{what}-{reading}" for what, reading in real_tables._BRIDGES]
    for grid in grids:
        assert grid.rows and all(len(cells) == len(grid.columns) for _, cells in grid.rows)
        assert grid.title in render(grid)
        numbers = [getattr(c, "value", c) for _, cells in grid.rows for c in cells if c is not None]
        assert np.all(np.isfinite(numbers))


def test_column_energies_rank_like_alpha2(subject):
    """Experiment F keeps a slope for each activation, in the JSON too, and its points are the table's own."""
    (grid,) = real_tables.energy_table(subject, SETTINGS)
    first = grid.as_json()["rows"][0]
    alpha2, energy = grid.points["layer 0, ReLU"]
    assert (first["Spearman, ReLU"], first["slope, ReLU"]) == real_tables._correlation(alpha2, energy)
    assert first["slope, ReLU"] != first["slope, SiLU"]


def test_columns_of_a_grid_have_names_of_their_own():
    with pytest.raises(ValueError, match="table x has two columns of one name: a, a"):
        Grid("x", "title", ("a", "a"), [("row", [1.0, 2.0])])


def test_readings_of_a_known_error():
    y, moved = np.array([3.0, 0.0]), np.array([4.0, 3.0])  # an angle of acos .8
    d = moved - y
    sums = np.array([[y @ y], [y @ d], [d @ d]])
    read = {name: reader(sums) for name, (_, reader) in real_tables._READINGS.items()}
    assert read == pytest.approx({"radial": 0.1, "size": 10 / 9, "after": 2 * (1 - 0.8)})
    none = np.array([[1.0], [0.0], [0.0]])
    assert real_tables._READINGS["radial"][1](none) is None


def test_leverage_over_nothing_is_left_out():
    rises = np.array([0.1, 0.2])
    assert real_tables._leverage(rises, np.zeros(2)) is None
    assert real_tables._leverage(rises, rises / 4).value == pytest.approx(4.0)


def test_mixture_of_experts_is_refused():
    config = Qwen3MoEConfig(**SIZES, num_experts=4, num_experts_per_token=2)
    with pytest.raises(
        ValueError, match="moe is a mixture of experts; these experiments are of dense layers with self"
    ):
        real_tables.Subject.of("moe", LoadedModel(config, {}, load_tokenizer("embedded")), TOKENS)


def test_empty_text():
    with pytest.raises(ValueError, match="rows of at least 2 tokens, got 0 of 24"):
        real_tables.Subject.of("tiny", loaded(), TOKENS[:0])


def test_linear_response_starts_where_the_rise_is_resolved():
    noise, clear = Estimate(0.1, 0.2, 3), Estimate(1.0, 0.1, 3)
    sentence = real_tables._linear_response((0.01, 0.1, 0.2, 1.0), [noise, clear, Estimate(2.1, 0.1, 3), clear])
    assert "from 0.1 on" in sentence and "up to 0.2" in sentence
    assert "do not resolve" in real_tables._linear_response((0.01,), [noise])
    assert real_tables._linear_response((0.01, 0.1), [noise, clear]).startswith("Only at 0.1 ")
