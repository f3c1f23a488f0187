"""Log-likelihoods: against a plain computation, whatever the batch and the bucket; compiled once for each bucket."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax.config import mesh_of
from fp4jax.evaluation.likelihood import Scorer
from fp4jax.models.frozen import FrozenModel
from fp4jax.models.llama import Llama, LlamaConfig
from fp4jax.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from fp4jax.policy import policy
from fp4jax.training.mesh import make_mesh, replicated

pytestmark = pytest.mark.standard_promotion

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48,
    dtype="float32", init_std=0.3,
)  # fmt: skip


@functools.cache
def frozen(devices=1, recipe="bf16"):
    mesh = make_mesh(mesh_of(data=devices))
    chosen = policy("all_linear", recipe, CONFIG.linear_paths)
    graphdef, state = nnx.split(Llama(CONFIG, policy=chosen, rngs=nnx.Rngs(0)))
    return FrozenModel(nnx.merge(graphdef, jax.device_put(state, replicated(mesh)))), mesh


def pairs():
    """Of 3 to 60 tokens, in three buckets, in no order; the continuations of one end as greedy decoding would."""
    rng = np.random.default_rng(0)
    found = []
    for context, continuation in ((40, 3), (5, 2), (1, 1), (30, 2), (29, 4), (20, 40), (33, 1), (2, 20), (31, 17)):
        found.append(tuple(rng.integers(0, 64, size).tolist() for size in (context, continuation)))
    return found


@functools.cache
def full_logits():
    model, _ = frozen()[0].bind(frozen()[0].arrays)
    return jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))


def plain(context, continuation):
    """(log-likelihood, is greedy) from the logits of the whole sequence."""
    tokens = [*context, *continuation]
    padded = np.zeros((1, 80), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(full_logits()(jnp.asarray(padded)))[0]
    at = np.arange(len(context) - 1, len(tokens) - 1)
    return logits[at, continuation].sum(), bool((logits[at].argmax(-1) == continuation).all())


def greedy_continuation(context):
    padded = np.zeros((1, 80), np.int32)
    padded[0, : len(context)] = context
    return [int(np.asarray(full_logits()(jnp.asarray(padded)))[0, len(context) - 1].argmax())]


BATCH = Scorer._batch


def greedy(*context):
    return greedy_continuation(list(context))[0]


def check(scorer):
    asked = pairs()
    asked.append((asked[0][0], greedy_continuation(asked[0][0])))
    done = []
    for found, pair in zip(scorer(asked, done.append), asked, strict=True):
        expected, greedy = plain(*pair)
        assert abs(found.log_likelihood - expected) < 1e-4 and found.is_greedy == greedy
    assert found.is_greedy and sum(done) == len(asked)


def test_likelihoods_and_one_compilation_for_each_bucket(monkeypatch):
    traces = []
    hidden = Llama.hidden
    monkeypatch.setattr(Llama, "hidden", lambda self, x, **how: traces.append(x.shape) or hidden(self, x, **how))
    subject, mesh = frozen()
    scorer = Scorer(subject, mesh, batch_size=3, max_length=64)
    check(scorer)
    assert sorted(shape for shape in traces if shape[0] == 3) == [(3, 32), (3, 48), (3, 64)]
    # What is too long loses its beginning.
    context, continuation = pairs()[5]
    (found,) = scorer([([9] * 30 + context, continuation)])
    assert abs(found.log_likelihood - plain([9] * 5 + context, continuation)[0]) < 1e-4
    assert sum(shape[0] == 3 for shape in traces) == 3


def answers(context, *sizes):
    rng = np.random.default_rng(len(context))
    return [(context, rng.integers(0, 64, size).tolist()) for size in sizes]


def test_continuations_of_one_context_are_scored_in_one_pass(monkeypatch):
    passed = []
    monkeypatch.setattr(Scorer, "_batch", lambda self, rows: passed.append(rows) or BATCH(self, rows))
    asked = [*answers([7, 8, 9, 10], 1, 1, 20, 3), *answers([3] * 30, 5, 1, 9), ([7, 8, 9, 10], [greedy(7, 8, 9, 10)])]
    found = Scorer(*frozen(), batch_size=2, max_length=64)(asked)
    for likelihood, pair in zip(found, asked, strict=True):
        expected, is_greedy = plain(*pair)
        assert abs(likelihood.log_likelihood - expected) < 1e-4 and likelihood.is_greedy == is_greedy
    assert found[-1].is_greedy
    # 4 + 21 and 30 + 12 inputs, and the fifth continuation of a context of four tokens by itself.
    assert sorted(len(row) for rows in passed for row in rows) == [4, 25, 42]


def test_answers_do_not_take_each_others_slots():
    """Of one row the last would find the fewest: with experts of a fixed capacity each answer has a row of its own."""
    config = Qwen3MoEConfig(**dataclasses.asdict(CONFIG), num_experts=4, num_experts_per_token=2, capacity="1.0")
    for capacity, shares in (("1.0", False), ("full", True)):
        own = dataclasses.replace(config, capacity=capacity)
        model = Qwen3MoE(own, policy=policy("all_linear", "bf16", own.linear_paths), rngs=nnx.Rngs(0))
        assert Scorer(FrozenModel(model), frozen()[1], batch_size=1, max_length=64).shares == shares


@pytest.mark.slow
def test_a_batch_may_be_split_over_devices():
    subject, mesh = frozen(devices=4)
    check(Scorer(subject, mesh, batch_size=8, max_length=64))


@pytest.mark.slow
def test_rows_that_fill_up_a_batch_count_in_no_statistic():
    subject, mesh = frozen(recipe="averis")
    asked = pairs()[:1]
    alone, filled = (Scorer(subject, mesh, batch_size=size, max_length=64)(asked)[0] for size in (1, 4))
    baseline = plain(*asked[0])[0]
    assert abs(alone.log_likelihood - filled.log_likelihood) < 1e-3 < abs(alone.log_likelihood - baseline)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 65)])
def test_what_cannot_be_scored_is_refused(pair):
    subject, mesh = frozen()
    with pytest.raises(ValueError, match="neither may be empty, and the continuation may have 64 tokens"):
        Scorer(subject, mesh, batch_size=1, max_length=64)([pair])


def test_sizes_that_cannot_be_used_are_refused():
    subject, mesh = frozen()
    with pytest.raises(ValueError, match="batch_size=0 must be a multiple of 1"):
        Scorer(subject, mesh, batch_size=0, max_length=64)
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        Scorer(subject, mesh, batch_size=1, max_length=1)
