"""Qwen3-MoE against the `transformers` implementation (committed fixtures) and against its own definition."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax.dot import dot_general, prepare
from fp4jax.models import qwen3_moe, routing
from fp4jax.models.hugging_face import ARCHITECTURES, is_kernel, stored_tensors
from fp4jax.models.qwen3_moe import EXPERTS, Qwen3MoE, Qwen3MoEConfig
from fp4jax.policy import Policy, policy
from fp4jax.recipes import recipe
from fp4jax.statistics import FORWARD_STATISTICS, Monitor, forward_statistics
from tests import contract

pytestmark = pytest.mark.standard_promotion

FIXTURES = sorted((pathlib.Path(__file__).parent / "fixtures").glob("qwen3moe_*.npz"))
TINY = Qwen3MoEConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
    num_experts=4, num_experts_per_token=2, dtype="float32", init_std=0.3,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(3), (2, 32), 0, TINY.vocab_size)
KEY = jax.random.key(7)
CROWDED = dict(capacity="1.0", num_layers=1)  # some slots are empty, some tokens dropped


def build(config=TINY, recipe="averis_centered", rules=None):
    chosen = Policy.of(*rules) if rules else policy("all_linear", recipe, config.linear_paths)
    return Qwen3MoE(config, policy=chosen, rngs=nnx.Rngs(0))


def called(model, tokens):
    """(logits, routing sums)."""
    graphdef, state = nnx.split(model)

    def run(state, tokens):
        monitor = Monitor({})
        return nnx.merge(graphdef, state)(tokens, monitor=monitor), monitor.routing

    return contract.jit(run)(state, tokens)


def model_of_fixture(path):
    """Built by the table of names alone: what it forgets stays NaN."""
    data = np.load(path)
    hf = json.loads(str(data["config"]))
    config, problems = ARCHITECTURES["qwen3_moe"].read(hf | {"router_aux_loss_coef": 0.001}, "float32")
    assert problems == []
    graphdef, state = nnx.split(build(config, "bf16"))
    values, read = {}, set()
    for path, variable in nnx.to_flat_state(state):
        parameter = ".".join(map(str, path))
        values[parameter] = np.full(variable.shape, np.nan, np.float32)
        for index, name, shape in stored_tensors(parameter, variable.shape):
            array = data[f"weight:{name}"]
            assert array.shape == shape
            values[parameter][index] = array.T if is_kernel(parameter) else array
            read.add(f"weight:{name}")
    assert read == {name for name in data if name.startswith("weight:")}
    assert all(np.isfinite(value).all() for value in values.values())
    filled = [(name, variable.replace(jnp.asarray(values[".".join(map(str, name))])))
              for name, variable in nnx.to_flat_state(state)]  # fmt: skip
    return nnx.merge(graphdef, nnx.from_flat_state(filled)), data


@pytest.mark.parametrize(
    "path", [FIXTURES[0], pytest.param(FIXTURES[1], marks=pytest.mark.slow)], ids=lambda path: path.stem
)
def test_logits_and_balance_equal_those_of_transformers(path):
    model, data = model_of_fixture(path)
    logits, found = called(model, jnp.asarray(data["tokens"]))
    np.testing.assert_allclose(logits, data["logits"], atol=2e-5, rtol=2e-5)
    chosen, sums = model.config.num_experts_per_token, (found["choices"], found["probability"])
    np.testing.assert_allclose(routing.load_balancing_loss(*sums, chosen), data["aux_loss"][1:], rtol=1e-5)
    pooled = [values.sum(0) for values in sums]
    np.testing.assert_allclose(routing.load_balancing_loss(*pooled, chosen), data["aux_loss"][0], rtol=1e-5)
    np.testing.assert_allclose(model.load_balancing_loss(found), data["aux_loss"][1:].mean(), rtol=1e-5)
    assert found["dropped"].tolist() == [0] * model.config.num_layers


@functools.cache
def gradients(recipe, prepared=False, **changes):
    model = build(dataclasses.replace(TINY, **changes), recipe)
    graphdef, state = nnx.split(model)

    def loss(state):
        model, monitor = nnx.merge(graphdef, state), Monitor({})
        weights = model.prepare_weights(KEY) if prepared else None
        logits = model(TOKENS, key=KEY, weights=weights, monitor=monitor)
        return jnp.mean(jnp.square(logits)) + model.load_balancing_loss(monitor.routing)

    return contract.jit(jax.value_and_grad(loss))(state)


def every_expert_for_every_token(model, x_BxTxD):
    """The definition, in dense products: all experts see all tokens, and most weights are zero."""
    c, mlp = model.config, model.mlp
    x_SxD = x_BxTxD.reshape(-1, c.hidden_size)
    probabilities = jax.nn.softmax(jnp.dot(x_SxD, mlp.router.kernel[...], precision="highest"))
    ranks = jnp.argsort(jnp.argsort(-probabilities, axis=-1, stable=True), axis=-1)
    weights = jnp.where(ranks < c.num_experts_per_token, probabilities, 0.0)
    weights = weights / weights.sum(-1, keepdims=True)
    gate, up, down = (getattr(mlp.experts, name).kernel[...] for name in ("gate_proj", "up_proj", "down_proj"))
    hidden = jax.nn.silu(jnp.einsum("sd,edf->sef", x_SxD, gate)) * jnp.einsum("sd,edf->sef", x_SxD, up)
    out = jnp.einsum("sef,efd,se->sd", hidden, down, weights)
    taken = (weights > 0).astype(jnp.float32)
    return out.reshape(x_BxTxD.shape), {"choices": taken.sum(0), "probability": probabilities.sum(0)}


@pytest.mark.slow
def test_gradients_equal_those_of_the_dense_definition(monkeypatch):
    loss, found = gradients("bf16")

    def dense(self, x_BxTxD, linears, monitor):
        out, monitor.routing = every_expert_for_every_token(self, x_BxTxD)
        return out

    monkeypatch.setattr(qwen3_moe.MoEBlock, "_feed_forward", dense)
    expected_loss, expected = gradients.__wrapped__("bf16")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (name, one), (_, other) in zip(nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True):
        np.testing.assert_allclose(one[...], other[...], rtol=2e-3, atol=2e-6, err_msg=str(name))
        assert jnp.any(other[...] != 0), name


# Rows on a grid, so that sums over them do not depend on the order of addition.
def expert_rows(seed, shape):
    random = np.random.default_rng(seed)
    return jnp.asarray((random.integers(-64, 64, shape) + random.integers(-64, 64, shape[-1])) / 64, jnp.float32)


@functools.partial(contract.jit, static_argnums=0)
def products(recipe, rows, kernel, cotangent, row_mask=None):
    """(prepared rows, output, gradients of both) of one or several matrices."""
    batch = tuple(range(kernel.ndim - 2))
    numbers = (((rows.ndim - 1,), (len(batch),)), (batch, batch))
    xq = prepare(rows, recipe, row_mask=row_mask, batch_dims=len(batch))
    y, pull = jax.vjp(lambda x, w: dot_general(x, w, numbers, recipe=recipe, lhs_q=xq, row_mask=row_mask), rows, kernel)
    return xq, y, *pull(cotangent)


@pytest.mark.parametrize("recipe", ["averis+nearest", pytest.param("averis_centered+nearest", marks=pytest.mark.slow)])
def test_an_expert_multiplies_its_own_rows_and_no_others(recipe):
    """Codes, means and products of every expert are those of its rows alone, whatever its slots hold besides."""
    counts, capacity = (0, 17), 32
    mask = jnp.arange(capacity) < jnp.array(counts)[:, None]
    rows, kernel = expert_rows(0, (2, capacity, 32)), expert_rows(1, (2, 32, 48))
    cotangent = expert_rows(2, (2, capacity, 48))
    poisoned = [jnp.where(mask[..., None], array, jnp.nan) for array in (rows, cotangent)]
    together = products(recipe, poisoned[0], kernel, poisoned[1], mask)
    for expert, count in enumerate(counts):
        own = jax.tree.map(lambda leaf, expert=expert: leaf[expert], together)
        if not count:
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(own[1:]))
            continue
        alone = products(recipe, rows[expert, :count], kernel[expert], cotangent[expert, :count])
        codes = 0
        for one, other in zip(jax.tree.leaves(own[0]), jax.tree.leaves(alone[0]), strict=True):
            one = one[tuple(map(slice, other.shape))]
            if other.dtype == jnp.uint8:  # codes and block scales
                np.testing.assert_array_equal(one, other)
                codes += 1
            else:  # maxima, and the residuals' column sums, which the order of additions touches
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert codes == 8
        for one, other in zip(own[1:], alone[1:], strict=True):
            np.testing.assert_allclose(one[tuple(map(slice, other.shape))], other, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_draw_belongs_to_expert_row_and_column():
    """Neither more slots nor the rows of other experts change an expert's codes."""
    value = recipe("averis+sr_all")
    rows = expert_rows(3, (2, 48, 32))

    def codes(rows, counts=(48, 20)):
        mask = jnp.arange(rows.shape[1]) < jnp.array(counts)[:, None]
        found = contract.jit(lambda rows: prepare(rows, value, key=KEY, row_mask=mask, batch_dims=1))(rows)
        return [leaf for leaf in jax.tree.leaves(found) if leaf.dtype == jnp.uint8]

    first, roomier = codes(rows), codes(jnp.pad(rows, ((0, 0), (0, 16), (0, 0)), constant_values=9))
    others = codes(rows.at[0].multiply(3))
    for one, other, alone in zip(first, roomier, others, strict=True):
        np.testing.assert_array_equal(one, other[tuple(map(slice, one.shape))])
        np.testing.assert_array_equal(one[1], alone[1])
    same_rows, *_ = codes(jnp.stack([rows[1], rows[1]]), (20, 20))
    assert (same_rows[0, :20] != same_rows[1, :20]).any()


@pytest.mark.slow
def test_empty_slots_leak_nothing(monkeypatch):
    """NaN in every empty slot, into the experts and back out of them, changes no bit of loss and gradients."""
    clean = gradients("averis_centered", **CROWDED)
    take, poisons = routing._take, []

    def poison(rows, index, mask):
        poisons.append(mask.shape)
        empty = jnp.nan if mask.shape[0] == TINY.num_experts else 0.0  # slots, not choices
        return jnp.where(mask[..., None], take(rows, index, mask), jnp.asarray(empty, rows.dtype))

    monkeypatch.setattr(routing, "_take", poison)
    poisoned = gradients.__wrapped__("averis_centered", **CROWDED)
    assert (TINY.num_experts, 32) in poisons
    for one, other in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_tokens_beyond_the_capacity_are_dropped_and_counted():
    """Of 64 tokens an expert takes 16; who finds no slot in either keeps what came in."""
    config = dataclasses.replace(TINY, capacity="0.3", num_layers=1)
    assert config.slots(TOKENS.size) == 16
    limited, found = called(build(config, "bf16"), TOKENS)
    unlimited, _ = called(build(dataclasses.replace(config, capacity="full"), "bf16"), TOKENS)
    limited, unlimited = limited.reshape(64, -1), unlimited.reshape(64, -1)
    choices_E = np.asarray(found["choices"][0])
    expected = np.maximum(choices_E - 16, 0).sum()
    assert found["dropped"].tolist() == [expected] and expected > 0
    metrics = qwen3_moe.routing_metrics(found)
    assert metrics["dropped"] == expected and metrics["dropped_share"] == expected / 128
    np.testing.assert_allclose(metrics["largest_load"], choices_E.max() / 32)
    # The first 16 tokens find room everywhere; some later one finds none at all.
    np.testing.assert_allclose(limited[:16], unlimited[:16], rtol=1e-4, atol=1e-4)
    assert not np.allclose(limited[16:], unlimited[16:], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "averis_centered+nearest"])
def test_padding_changes_nothing_for_the_real_tokens(recipe):
    """Whatever it is, and though it stands before the last row and there is no room for all."""
    model = build(dataclasses.replace(TINY, capacity="1.0", num_layers=1), recipe)
    graphdef, state = nnx.split(model)
    real = jnp.arange(32) < jnp.array((4, 32))[:, None]

    @contract.jit
    def run(state, tokens, row_mask):
        monitor = Monitor({})
        hidden = nnx.merge(graphdef, state).hidden(tokens, monitor=monitor, row_mask=row_mask)
        return hidden, monitor.routing

    one, other = (jnp.where(real, TOKENS, filling) for filling in (0, 9))
    (hidden, sums), (again, sums_again) = run(state, one, real), run(state, other, real)
    np.testing.assert_array_equal(hidden[real], again[real])
    assert jnp.isfinite(hidden).all()
    for name, value in sums.items():
        np.testing.assert_array_equal(value, sums_again[name], err_msg=name)
    assert sums["choices"].sum() == 2 * real.sum() and sums["dropped"].sum() == 0
    np.testing.assert_allclose(sums["probability"].sum(), real.sum(), rtol=1e-5)
    assert run(state, one, jnp.ones_like(real))[1]["dropped"].sum() > 0  # as tokens they would take the slots
    if recipe == "bf16":
        roomy = build(dataclasses.replace(model.config, capacity="full"), recipe)
        alone = roomy.hidden(TOKENS[1:])
        np.testing.assert_allclose(hidden[1], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("capacity", "tokens", "slots"),
    [("1", 256, 64), ("1.25", 256, 80), ("1.1", 160, 48), ("0.001", 256, 16), ("full", 250, 250), ("9", 40, 40)],
)
def test_capacity_is_a_multiple_of_16_and_at_most_all_tokens(capacity, tokens, slots):
    config = dataclasses.replace(TINY, num_experts=8, capacity=capacity)
    assert config.slots(tokens) == slots


@pytest.mark.slow
def test_weights_prepared_once_and_rematerialization_change_nothing():
    loss, grads = gradients("averis_centered", **CROWDED)
    other_loss, others = gradients("averis_centered", prepared=True, remat="linear_inputs", **CROWDED)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        assert jnp.linalg.norm(one - other) <= 2e-2 * jnp.linalg.norm(one) + 1e-7


def test_policies_name_the_experts_linears():
    assert TINY.linear_paths[4:7] == tuple(f"layers.0.{name}" for name in EXPERTS)
    assert len(TINY.linear_paths) == 14
    model = nnx.eval_shape(
        lambda: build(rules=[(r"layers\.1\.mlp\.experts\.down", "bf16"), (r"experts", "nvfp4+nearest"), (".", "bf16")])
    )
    names = [[recipe.name for recipe in products.recipes] for _, products in model.segments]
    assert names == [["bf16"] * 4 + ["nvfp4+nearest"] * 3, ["bf16"] * 4 + ["nvfp4+nearest"] * 2 + ["bf16"]]
    nvidia = policy("nvidia", "averis", TINY.linear_paths).assign(TINY.linear_paths)
    assert {path[:8] for path, found in nvidia.items() if found.is_high_precision} == {"layers.1"}
    with pytest.raises(ValueError, match="matches none of the 14 linear layers"):
        build(rules=[(r"experts\.3", "nvfp4")])


@pytest.mark.slow
def test_statistics_of_experts_are_the_sums_of_each_ones():
    """Over real rows only: what stands in empty slots is NaN."""

    @contract.jit
    def statistics(rows, kernel, mask):
        value, batch_dims = recipe("averis+nearest"), kernel.ndim - 2
        xq = prepare(rows, value, row_mask=mask, batch_dims=batch_dims)
        wq = prepare(kernel, value, "rhs", batch_dims=batch_dims)
        return forward_statistics(rows, xq, kernel, wq, value, mask)

    mask = jnp.arange(32) < jnp.array((21, 0))[:, None]
    rows, kernel = expert_rows(0, (2, 32, 32)), expert_rows(1, (2, 32, 48))
    found = statistics(jnp.where(mask[..., None], rows, jnp.nan), kernel, mask)
    busy, idle = (statistics(rows[0, :21], kernel[expert], jnp.ones(21, bool)) for expert in range(2))
    of_weights = np.array([".w." in name for name in FORWARD_STATISTICS])
    np.testing.assert_allclose(found, busy + np.where(of_weights, idle, 0), rtol=1e-4, atol=1e-3)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="num_experts_per_token=5 must be from 1 to num_experts=4"):
        dataclasses.replace(TINY, num_experts_per_token=5)
    for capacity in ("all", "0", "-1", "1/0"):
        with pytest.raises(ValueError, match="capacity must be 'full' or a number above 0"):
            dataclasses.replace(TINY, capacity=capacity)
    hf = json.loads(str(np.load(FIXTURES[0])["config"])) | {"router_aux_loss_coef": 0.001}
    without, problems = ARCHITECTURES["qwen3_moe"].read(hf | {"router_aux_loss_coef": 0}, "float32")
    assert problems == [] and without.router_loss_coefficient == 0
    for value in (-0.001, None, False):
        problems = ARCHITECTURES["qwen3_moe"].read(hf | {"router_aux_loss_coef": value}, "float32")[1]
        assert len(problems) == 1 and "router_aux_loss_coef" in problems[0]
    for key, value in (("mlp_only_layers", [1]), ("decoder_sparse_step", 2)):
        config, problems = ARCHITECTURES["qwen3_moe"].read(hf | {key: value}, "float32")
        assert config is None and len(problems) == 1 and problems[0].startswith(f"{key}={value}, supported: ")
