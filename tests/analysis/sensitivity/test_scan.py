"""The scan of a model of two blocks: its numbers are those of models built under the same policies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import models
from fp4jax.analysis.sensitivity.ranking import RankBy, layer_scores, rank
from fp4jax.analysis.sensitivity.scan import Choice, Meter, blocks, layers, scan, types
from fp4jax.analysis.sensitivity.switches import switched
from fp4jax.models.qwen3 import LINEARS, Qwen3, Qwen3Config
from fp4jax.policy import Policy

CONFIG = Qwen3Config(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48,
    init_std=0.2, dtype="float32",
)  # fmt: skip
RECIPE = "nvfp4+nearest"
PLANTED = "layers.1.self_attn.v_proj"


def model(*rules):
    """With v_proj of block 1 made fragile: its weights for every 16th feature, which is always zero, are outliers.

    They change no product, but the 15 weights that share a block scale with one of them are rounded to zero.
    """
    built = Qwen3(CONFIG, policy=Policy.of(*rules), rngs=nnx.Rngs(0))
    attention, norm = built.layers.self_attn, built.layers.input_layernorm
    norm.weight[...] = norm.weight[...].at[1, ::16].set(0.0)
    attention.v_proj.kernel[...] = attention.v_proj.kernel[...].at[1, ::16].set(1000.0)
    return built


@pytest.fixture(scope="module")
def batch():
    rows = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 33), dtype=np.int32)
    mask = np.ones((2, 32), np.float32)
    mask[1, 20:] = 0
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": mask}


@pytest.fixture(scope="module")
def meter():
    return Meter(model((".", RECIPE)))


@pytest.fixture(scope="module")
def found(meter, batch):
    return scan(meter, [batch], [*types(2), *blocks(2), *layers(2)])


def effect(found, kind, name):
    return next(e for e in found.effects if (e.choice.kind, e.choice.name) == (kind, name))


def by_hand(built, batch):
    """(mean loss, gradients by path) of a model as it is."""

    @jax.jit
    @jax.value_and_grad
    def loss(state):
        total, tokens = models.loss(nnx.merge(graphdef, state), jax.tree.map(jnp.asarray, batch), key=None)
        return total / tokens

    graphdef, state = nnx.split(built)
    value, gradients = loss(state)
    return float(value), {path: np.asarray(g[...], np.float64) for path, g in nnx.to_flat_state(gradients)}


def test_effects_are_those_of_models_under_the_same_policies(found, batch):
    exact_loss, exact = by_hand(model(), batch)
    loss, gradients = by_hand(model((r"layers\.0\.", RECIPE)), batch)
    assert found.loss == pytest.approx(exact_loss, rel=1e-6)
    block = effect(found, "block", "0")
    assert block.loss == pytest.approx(loss, rel=1e-6)
    assert block.loss_gap == pytest.approx(loss - exact_loss, abs=1e-5)

    def error(paths, rows=slice(None)):
        g, g0 = (np.concatenate([of[path][rows].ravel() for path in paths]) for of in (gradients, exact))
        return np.linalg.norm(g - g0) / np.linalg.norm(g0), g @ g0 / np.linalg.norm(g) / np.linalg.norm(g0)

    relative, cosine = error(list(exact))
    assert relative > 0.05
    assert (block.total.relative, block.total.cosine) == pytest.approx((relative, cosine), rel=1e-3)
    kernels = [path for path in exact if path[-1] == "kernel"]
    assert len(kernels) == len(LINEARS)
    assert (block.own.relative, block.own.cosine) == pytest.approx(error(kernels, slice(0, 1)), rel=1e-3)


def test_planted_layer_is_the_worst(found):
    kinds = {kind: [e for e in found.effects if e.choice.kind == kind] for kind in ("type", "block", "layer")}
    worst = {kind: max(effects, key=RankBy.GRADIENT.score).choice.name for kind, effects in kinds.items()}
    assert worst == {"type": "v_proj", "block": "1", "layer": PLANTED}
    sizes = dict.fromkeys(LINEARS, 1)
    for effects in (found.effects, kinds["type"] + kinds["block"]):  # measured, and estimated
        ranked = rank(layer_scores(effects, RankBy.GRADIENT, 2), sizes, 15.0)
        assert [layer.path for layer in ranked if layer.kept][0] == PLANTED


def test_one_program_measures_every_choice(meter, found):
    assert len(found.effects) == 7 + 2 + 14
    assert meter.programs == 1


def test_nothing_switched_on_changes_nothing(meter, batch):
    (none,) = scan(meter, [batch], [Choice("policy", "none", np.zeros((2, 7), bool))]).effects
    assert none.loss_gap == 0 and none.total.relative == 0
    assert np.isnan(none.own.relative)


def test_batches_and_seeds_are_averaged(meter, batch):
    other = dict(batch, tokens=batch["tokens"][::-1], loss_mask=batch["loss_mask"][::-1])
    one, two = (scan(meter, [b], blocks(2)) for b in (batch, other))
    both = scan(meter, [batch, other], blocks(2), seeds=(0, 1))
    assert both.tokens == one.tokens + two.tokens
    assert both.loss == pytest.approx((one.loss * one.tokens + two.loss * two.tokens) / both.tokens)
    for a, b, mean in zip(one.effects, two.effects, both.effects, strict=True):
        assert mean.loss == pytest.approx((a.loss * one.tokens + b.loss * two.tokens) / both.tokens)
        low, high = sorted((a.total.relative, b.total.relative))
        assert low < mean.total.relative < high


def test_progress_counts_measurements(meter, batch):
    told = []
    scan(meter, [batch], blocks(2), progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(("batches", "seeds"), [(0, (0,)), (1, ())])
def test_nothing_to_measure_is_an_error(meter, batch, batches, seeds):
    with pytest.raises(ValueError, match="at least one batch"):
        scan(meter, [batch] * batches, blocks(2), seeds=seeds)


def test_weights_cannot_be_prepared_for_all_choices(meter, batch):
    built = switched(model((".", RECIPE)))
    with pytest.raises(ValueError, match="pass weights=None"):
        jax.eval_shape(lambda: built(jnp.asarray(batch["tokens"]), weights=built.prepare_weights(None)))
