"""A model with a cache says what it says without: grouped heads, rotary positions, sequences of different lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax.dot import dot_general
from fp4jax.models.cache import CachedAttention, KVCache
from fp4jax.models.frozen import FrozenModel
from fp4jax.models.llama import Llama, LlamaConfig
from fp4jax.models.qwen3 import Qwen3, Qwen3Config
from fp4jax.policy import Policy, policy

pytestmark = pytest.mark.standard_promotion

SIZES = dict(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    rope_theta=100.0, dtype="float32", init_std=0.2,
)  # fmt: skip
LENGTHS = np.array([5, 9, 3], np.int32)
STEPS = 4
TOKENS = np.asarray(jax.random.randint(jax.random.key(3), (3, 16), 0, 64))


def frozen(recipe="bf16", config=Qwen3Config, rules=None):
    config = config(**SIZES)
    chosen = Policy.of(*rules) if rules else policy("all_linear", recipe, config.linear_paths)
    model = {Qwen3Config: Qwen3, LlamaConfig: Llama}[type(config)](config, policy=chosen, rngs=nnx.Rngs(0))
    return FrozenModel(model)


def full_logits(frozen_model, tokens):
    """Of whole sequences, without a cache."""
    model, weights = frozen_model.bind(frozen_model.arrays)
    return jax.jit(lambda tokens: model(tokens, weights=weights))(jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(frozen_model, arrays, cache, tokens_BxT, starts_B, real_BxT):
    model, weights = frozen_model.bind(arrays)
    cached = CachedAttention(cache, starts_B)
    hidden = model.hidden(tokens_BxT, weights=weights, cached=cached, row_mask=real_BxT)
    return model.logits(hidden), cached.cache


# mxfp4 has no scale and no mean that tokens share, so that it too must give the same with the cache.
@pytest.mark.parametrize(
    "subject",
    [
        functools.partial(frozen),
        pytest.param(functools.partial(frozen, config=LlamaConfig), marks=pytest.mark.slow),
        pytest.param(functools.partial(frozen, rules=[(r"layers\.1\.", "mxfp4")]), marks=pytest.mark.slow),
    ],
    ids=["qwen3", "llama", "mxfp4 in the middle"],
)
def test_logits_with_the_cache_are_those_of_the_full_forward(subject):
    frozen_model = subject()
    expected = full_logits(frozen_model, TOKENS)
    prompts = np.where(np.arange(9) < LENGTHS[:, None], TOKENS[:, :9], 63)
    cache = KVCache.empty(3, 3, 16, 2, 16, "float32")
    real = jnp.asarray(np.arange(9) < LENGTHS[:, None])
    logits, cache = cached_logits(
        frozen_model, frozen_model.arrays, cache, jnp.asarray(prompts), jnp.zeros(3, int), real
    )
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=2e-5)
    for step in range(STEPS):
        at = LENGTHS + step
        fed = jnp.asarray(TOKENS[np.arange(3), at])[:, None]
        logits, cache = cached_logits(frozen_model, frozen_model.arrays, cache, fed, jnp.asarray(at), real[:, :1])
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(3), at], atol=2e-5)


@pytest.mark.slow
def test_padding_counts_in_no_statistic_of_a_recipe():
    frozen_model = frozen("averis")
    model, weights = frozen_model.bind(frozen_model.arrays)
    hidden = jax.jit(lambda tokens, mask: model.hidden(tokens, weights=weights, row_mask=mask))
    short = hidden(jnp.asarray(TOKENS), jnp.ones((3, 16), bool))
    padded = np.concatenate([TOKENS, np.full((3, 16), 7)], axis=1)
    mask = jnp.asarray(np.broadcast_to(np.arange(32) < 16, (3, 32)))
    error = lambda x: jnp.linalg.norm(x[:, :16] - short) / jnp.linalg.norm(short)  # noqa: E731
    # One changed rounding may follow from another order of additions.
    assert error(hidden(jnp.asarray(padded), mask)) < 0.02
    assert error(hidden(jnp.asarray(padded), jnp.ones((3, 32), bool))) > 0.05


@functools.partial(jax.jit, static_argnums=2)
def products(x, w, recipes):
    return [dot_general(x, w, (((2,), (0,)), ((), ())), recipe=recipe) for recipe in recipes]


def random_operands(sequences=1):
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 1.0, (sequences, 1, 64)) * np.arange(1, sequences + 1)[:, None, None]
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)


def test_at_a_single_token_averis_is_nvfp4_and_the_centred_split_is_finer():
    """The mean of one token is that token: the split leaves nothing, or what the mean's quantization has left."""
    recipes = ("bf16", "nvfp4+w_bf16", "averis+w_bf16", "averis_centered+w_bf16")
    exact, plain, split, centred = products(*random_operands(), recipes)
    np.testing.assert_array_equal(split, plain)
    assert jnp.linalg.norm(centred - exact) < 0.2 * jnp.linalg.norm(plain - exact)


@pytest.mark.slow
def test_two_sequences_share_the_mean_of_a_decode_step_unless_it_is_per_sequence():
    plain, split, per_sequence = products(*random_operands(2), ("nvfp4", "averis", "averis+per_sequence"))
    np.testing.assert_array_equal(per_sequence, plain)
    assert jnp.abs(split - plain).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["averis_best", "metis", "tetrajet2"])
def test_other_splits_take_a_single_token_too(recipe):
    exact, result = products(*random_operands(), ("bf16", recipe))
    assert 0 < jnp.linalg.norm(result - exact) / jnp.linalg.norm(exact) < 0.2
