"""Qwen3 against the `transformers` implementation (committed fixtures) and against its own definition."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import models
from fp4jax.models.qwen3 import LINEARS, Qwen3, Qwen3Config
from fp4jax.policy import Policy, policy
from tests import contract

pytestmark = pytest.mark.standard_promotion

FIXTURES = sorted((pathlib.Path(__file__).parent / "fixtures").glob("qwen3_*.npz"))
TINY = Qwen3Config(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    dtype="float32", init_std=0.1,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(3), (2, 32), 0, TINY.vocab_size)
KEY = jax.random.key(7)


def build(config=TINY, recipe="averis_centered", rules=None):
    chosen = Policy.of(*rules) if rules else policy("all_linear", recipe, config.linear_paths)
    return Qwen3(config, policy=chosen, rngs=nnx.Rngs(0))


def logits_of(model, tokens=TOKENS, **arguments):
    """What the model gives, in one program."""
    graphdef, state = nnx.split(model)
    run = contract.jit(lambda state, tokens, arguments: nnx.merge(graphdef, state)(tokens, **arguments))
    return run(state, jnp.asarray(tokens), arguments)


def model_of_fixture(path):
    data = np.load(path)
    hf = json.loads(str(data["config"]))
    config = Qwen3Config(
        vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"], num_kv_heads=hf["num_key_value_heads"], head_dim=hf["head_dim"],
        intermediate_size=hf["intermediate_size"], rope_theta=hf["rope_theta"], rms_norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"], dtype="float32",
    )  # fmt: skip
    model = build(config, "bf16")
    weight = {name.removeprefix("weight:"): data[name] for name in data if name.startswith("weight:")}

    def stacked(name):
        return jnp.stack([weight[f"model.layers.{layer}.{name}.weight"] for layer in range(config.num_layers)])

    model.embedding[...] = jnp.asarray(weight["model.embed_tokens.weight"])
    model.norm.weight[...] = jnp.asarray(weight["model.norm.weight"])
    if not config.tie_embeddings:
        model.lm_head[...] = jnp.asarray(weight["lm_head.weight"])
    block = model.layers
    for linear in LINEARS:
        group, name = linear.split(".")
        getattr(getattr(block, group), name).kernel[...] = stacked(linear).swapaxes(1, 2)
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        name = "input_layernorm" if norm is block.input_layernorm else "post_attention_layernorm"
        norm.weight[...] = stacked(name)
    block.self_attn.q_norm.weight[...] = stacked("self_attn.q_norm")
    block.self_attn.k_norm.weight[...] = stacked("self_attn.k_norm")
    return model, data


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_logits_equal_those_of_transformers(path):
    model, data = model_of_fixture(path)
    logits = logits_of(model, data["tokens"])
    np.testing.assert_allclose(logits, data["logits"], atol=1e-4, rtol=1e-4)


def test_there_are_fixtures():
    assert len(FIXTURES) == 3


def test_documents_in_one_row_do_not_see_each_other():
    """In high precision, where the other documents' tokens change no scale."""
    starts, lengths = (0, 5, 21), (5, 16, 11)
    packed = np.asarray(TOKENS[:1])
    alone = np.concatenate([np.roll(packed, -start, axis=1) for start in starts])
    # Row 0 holds three documents; rows 1 to 3 begin with one of them; row 4 takes row 0 for one document.
    tokens = np.concatenate([packed, alone, packed])
    segments, positions = np.zeros((5, 32), np.int32), np.tile(np.arange(32, dtype=np.int32), (5, 1))
    segments[0] = np.repeat(np.arange(3), lengths)
    positions[0] = np.concatenate([np.arange(length) for length in lengths])
    model = build(dataclasses.replace(TINY, num_layers=2), recipe="bf16")
    logits = logits_of(model, tokens, segment_ids=jnp.asarray(segments), positions=jnp.asarray(positions))
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True), start=1):
        np.testing.assert_allclose(logits[0, start : start + length], logits[row, :length], atol=2e-5)
    assert np.abs(logits[0] - logits[4])[5:].max() > 1e-2


def test_no_logit_depends_on_a_later_token():
    """Causality by gradients, in high precision: a shared mean lets tokens see one another's statistics."""
    model = build(recipe="bf16")
    graphdef, state = nnx.split(model)
    embedded = state["embedding"][...][TOKENS[:1]]

    def logits_at(position, x):
        m = nnx.merge(graphdef, state)
        rope = models.qwen3.rotary_angles(jnp.arange(x.shape[1]), TINY.head_dim, TINY.rope_theta)
        for segment in m.segments:
            x = m._scan(x, rope, segment, None, None, None)
        return m.norm(x)[0, position].sum()

    gradient = jax.grad(logits_at, argnums=1)(10, embedded)
    assert jnp.all(gradient[0, 11:] == 0)
    assert jnp.all(jnp.any(gradient[0, :11] != 0, axis=-1))


# Two linear layers that share their input and the last one: what the quick tests quantize. Compiling takes as long as
# there are quantized operands.
SOME = "q_proj|k_proj|down_proj"


@functools.cache
def gradients(recipe, remat="none", prepared=False, quantized="."):
    rules = [(quantized, recipe), (".", "bf16")] if quantized != "." else None
    graphdef, state = nnx.split(build(dataclasses.replace(TINY, remat=remat), recipe, rules))
    targets = jnp.roll(TOKENS, -1, axis=1)
    batch = dict(tokens=TOKENS, targets=targets, loss_mask=jnp.ones(TOKENS.shape, bool))

    def loss(state):
        m = nnx.merge(graphdef, state)
        weights = m.prepare_weights(KEY) if prepared else None
        total, count = models.loss(m, batch, key=KEY, weights=weights)
        return total / count

    return contract.jit(jax.value_and_grad(loss))(state)


def assert_close(left, right):
    """Equal up to the order of additions: the programs differ, and one changed bit may change a rounding."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert jnp.linalg.norm(a - b) <= 2e-2 * jnp.linalg.norm(b) + 1e-7


SLOW = [pytest.param(name, ".", marks=pytest.mark.slow) for name in ("nvfp4", "averis_centered", "nvfp4_hadamard")]


@pytest.mark.parametrize(("recipe", "quantized"), [("bf16", "."), ("nvfp4_hadamard", SOME), *SLOW])
def test_preparing_the_weights_once_changes_nothing(recipe, quantized):
    loss, grads = gradients(recipe, quantized=quantized)
    prepared_loss, prepared_grads = gradients(recipe, prepared=True, quantized=quantized)
    np.testing.assert_allclose(loss, prepared_loss, rtol=1e-6)
    assert_close(grads, prepared_grads)


@pytest.mark.parametrize(
    ("remat", "quantized"),
    [("linear_inputs", SOME), *(pytest.param(r, ".", marks=pytest.mark.slow) for r in ("full", "linear_inputs"))],
)
def test_rematerialization_repeats_the_gradients(remat, quantized):
    loss, grads = gradients("averis_centered", quantized=quantized)
    remat_loss, remat_grads = gradients("averis_centered", remat, quantized=quantized)
    np.testing.assert_allclose(loss, remat_loss, rtol=1e-6)
    assert_close(grads, remat_grads)


def test_remat_linear_inputs_saves_packed_inputs_only():
    """What the backward keeps of a layer is its input and uint8 codes with their scales."""
    model = build(dataclasses.replace(TINY, remat="linear_inputs"))
    graphdef, state = nnx.split(model)

    def loss(state):
        return nnx.merge(graphdef, state)(TOKENS, key=KEY).sum()

    saved = jax.tree.leaves(jax.eval_shape(lambda s: jax.vjp(loss, s)[1], state))
    per_token = [x for x in saved if x.ndim == 4 and x.shape[0] == TINY.num_layers and TOKENS.shape[0] == x.shape[1]]
    wide = [x.shape[-1] for x in per_token if x.dtype == jnp.float32]
    assert wide == [TINY.hidden_size], "more than a block's input is saved in high precision"
    # Codes and scales of two copies of each of the four inputs,
    # but for the first copy of the last, whose product nothing recomputes.
    assert sum(x.dtype == jnp.uint8 for x in per_token) == 14


def test_a_policy_gives_single_layers_another_recipe():
    model = build(rules=[(r"layers\.2\.", "bf16"), (r"mlp", "nvfp4+nearest"), (r".", "averis_centered+nearest")])
    assert [list(layers) for layers, _ in model.segments] == [[0, 1], [2]]
    names = [[recipe.name for recipe in products.recipes] for _, products in model.segments]
    assert names[0] == ["averis_centered+nearest"] * 4 + ["nvfp4+nearest"] * 3
    assert names[1] == ["bf16"] * 7
    one = build(recipe="bf16")
    assert not np.array_equal(logits_of(model), logits_of(one))


def test_a_forward_in_high_precision_is_that_of_the_baseline():
    """In the activations' dtype, not in that of the float32 master weights."""
    config = dataclasses.replace(TINY, dtype="bfloat16")
    mixed, baseline = build(config, "averis+nearest+fwd_bf16"), build(config, "bf16")
    expected = logits_of(baseline)
    np.testing.assert_array_equal(logits_of(mixed), expected)
    np.testing.assert_array_equal(logits_of(mixed, weights=mixed.prepare_weights(None)), expected)


def test_segments_change_nothing_by_themselves():
    whole = build(recipe="nvfp4+nearest")
    split = build(rules=[(r"layers\.1\.mlp\.up", "nvfp4+nearest"), (r".", "nvfp4+nearest")])
    np.testing.assert_allclose(logits_of(whole), logits_of(split), rtol=1e-5, atol=1e-5)


def test_stochastic_recipes_evaluate_without_a_key_and_differentiate_only_with_one():
    model = build(recipe="averis")
    assert jnp.all(jnp.isfinite(model(TOKENS)))
    graphdef, state = nnx.split(model)
    with pytest.raises(ValueError, match="key=jax.random.key"):
        jax.grad(lambda s: nnx.merge(graphdef, s)(TOKENS).sum())(state)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        dataclasses.replace(TINY, num_heads=5)
    with pytest.raises(ValueError, match="remat must be"):
        dataclasses.replace(TINY, remat="some")
    with pytest.raises(ValueError, match="matches none of the 21 linear layers"):
        build(rules=[(r"layers\.3\.", "nvfp4")])


@pytest.mark.parametrize("remat", ["linear_inputs", "full"])
def test_layers_that_are_computed_again_stay_apart_from_their_first_time(remat):
    """A scan does that, but for one of a single step: XLA takes it out of its loop, and would compute it once."""
    config = dataclasses.replace(TINY, num_layers=3, remat=remat)
    graphdef, state = nnx.split(build(config, rules=[("layers.2", "nvfp4+nearest"), (".", "averis+nearest")]))

    def loss(state):
        return jnp.sum(nnx.merge(graphdef, state).hidden(TOKENS, key=jax.random.key(0)))

    scans = [eqn for eqn in jax.make_jaxpr(loss)(state).eqns if eqn.primitive.name == "scan"]
    barriers = {
        eqn.params["length"]: inner.params["prevent_cse"]
        for eqn in scans
        for inner in eqn.params["jaxpr"].eqns
        if inner.primitive.name in ("checkpoint", "remat2", "remat")
    }
    assert barriers == {2: False, 1: True}
