"""Tokens routed in groups: a group is what it is alone. On several devices: tests/training/test_moe.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax.dot import dot_general
from fp4jax.models import exchange
from fp4jax.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from fp4jax.policy import policy
from tests import contract
from tests.models.test_qwen3_moe import called

pytestmark = pytest.mark.standard_promotion

MODEL = Qwen3MoEConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48,
    num_experts=4, num_experts_per_token=2, capacity="1.0", dtype="float32", init_std=0.3,
)  # fmt: skip
SEQUENCES, LENGTH = 8, 32
TOKENS = jax.random.randint(jax.random.key(3), (SEQUENCES, LENGTH), 0, MODEL.vocab_size)


def built(recipe="bf16", **changes):
    config = dataclasses.replace(MODEL, **changes)
    return Qwen3MoE(config, policy=policy("all_linear", recipe, config.linear_paths), rngs=nnx.Rngs(0))


def test_a_group_is_routed_as_if_it_were_alone():
    """Its own slots, filled by its own tokens; sums are over all groups."""
    logits, sums = called(built(groups=2), TOKENS)
    alone = [called(built(), half) for half in jnp.split(TOKENS, 2)]
    np.testing.assert_allclose(logits, jnp.concatenate([half for half, _ in alone]), rtol=1e-5, atol=1e-5)
    for name, value in sums.items():
        np.testing.assert_allclose(value, alone[0][1][name] + alone[1][1][name], rtol=1e-6, err_msg=name)
    together = called(built(), TOKENS)[1]
    assert sums["dropped"] > together["dropped"] > 0  # less room to make up for one another


def test_groups_change_nothing_where_every_token_finds_a_slot():
    (one, sums), (eight, sums_of_eight) = (called(built(capacity="full", groups=n), TOKENS) for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    assert sums["dropped"] == sums_of_eight["dropped"] == 0
    np.testing.assert_array_equal(sums["choices"], sums_of_eight["choices"])


def test_an_expert_has_one_mean_and_scale_over_the_taken_slots_of_all_groups():
    """With free slots between the groups, whatever they hold, as without them."""
    taken = jnp.arange(48) % 16 < 5
    rows = jnp.asarray(np.random.default_rng(5).integers(-64, 64, (48, 32)) / 64 + 3, jnp.float32)
    kernel = jax.random.normal(jax.random.key(6), (1, 32, 16))
    numbers = (((2,), (1,)), ((0,), (0,)))
    product = contract.jit(lambda x, mask=None: dot_general(x, kernel, numbers, recipe="averis+nearest", row_mask=mask))
    found = product(jnp.where(taken[:, None], rows, jnp.nan)[None], taken[None])[0, taken]
    np.testing.assert_allclose(found, product(rows[taken][None])[0], rtol=1e-5, atol=1e-5)


def test_sequences_that_groups_do_not_divide():
    assert [exchange.groups_of(8, sequences) for sequences in (8, 16, 12, 1, 3)] == [8, 8, 4, 1, 1]


def test_the_way_to_the_experts_and_back():
    rows = jnp.arange(3 * 4 * 16 * 2).reshape(3, 4, 16, 2)
    at_experts = exchange.to_experts(rows)
    assert at_experts.shape == (4, 48, 2)
    np.testing.assert_array_equal(at_experts[2, 16:32], rows[1, 2])
    np.testing.assert_array_equal(exchange.to_groups(at_experts, 3), rows)
