"""Generated tokens are those of the full forward; sampling is what it says; shapes are compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax.config import mesh_of
from fp4jax.evaluation.likelihood import Scorer
from fp4jax.generation import CHUNK, GREEDY, Generator, Sampling, bucket, next_token
from fp4jax.models.frozen import FrozenModel
from fp4jax.models.qwen3 import Qwen3, Qwen3Config
from fp4jax.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from fp4jax.policy import policy
from fp4jax.training.mesh import make_mesh

pytestmark = pytest.mark.standard_promotion

CONFIG = Qwen3Config(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    rope_theta=100.0, dtype="float32", init_std=0.3,
)  # fmt: skip
PROMPTS = [[5, 9, 3, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
COUNT = CHUNK + 5
NO_END = 1000  # no token has this id


@functools.cache
def frozen(recipe="bf16"):
    chosen = policy("all_linear", recipe, CONFIG.linear_paths)
    return FrozenModel(Qwen3(CONFIG, policy=chosen, rngs=nnx.Rngs(0)))


@functools.cache
def expected():
    """Greedy continuations, every token from the full forward of all before it."""
    model, _ = frozen().bind(frozen().arrays)
    logits = jax.jit(lambda tokens: model(tokens))
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(COUNT):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(logits(jnp.asarray(padded))[0, len(tokens) - 1])))
        found.append(tokens[len(prompt) :])
    return found


def test_greedy_tokens_are_those_of_the_full_forward_and_shapes_are_compiled_once():
    generate = Generator(frozen(), NO_END, batch_size=4)
    assert generate(PROMPTS, COUNT) == expected()
    assert generate(PROMPTS[::-1][:2], COUNT) == expected()[::-1][:2]  # two empty rows
    assert generate._prefill._cache_size() == generate._decode._cache_size() == 1
    assert len({tuple(tokens) for tokens in expected()}) == 3 and len(set(expected()[0])) > 2
    # What the host may stop is stopped, and nothing else.
    stopped = generate(PROMPTS, COUNT, lambda row, tokens: row == 1)
    assert stopped == [expected()[0], expected()[1][:1], expected()[2]]


@pytest.mark.slow
def test_experts_take_no_padding():
    """A model with experts scores and continues sequences of different lengths as one by one."""
    dense = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    config = Qwen3MoEConfig(**dense | {"num_layers": 1}, num_experts=4, num_experts_per_token=2)
    chosen = policy("all_linear", "bf16", config.linear_paths)
    frozen = FrozenModel(Qwen3MoE(config, policy=chosen, rngs=nnx.Rngs(0)))
    generate = Generator(frozen, NO_END, batch_size=4)
    together = generate(PROMPTS, COUNT)
    assert together == [generate([prompt], COUNT)[0] for prompt in PROMPTS]
    assert len(set(map(tuple, together))) == 3
    mesh = make_mesh(mesh_of(), jax.devices()[:1])
    found = Scorer(frozen, mesh, batch_size=4, max_length=64)(list(zip(PROMPTS, together, strict=True)))
    assert all(greedy and total < 0 for total, greedy in found)


@pytest.mark.slow
def test_a_sequence_ends_at_its_end_of_text_and_the_others_go_on():
    first = expected()[0]
    end = first[3]
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected()]
    assert len({len(tokens) for tokens in cut}) > 1
    assert Generator(frozen(), end)(PROMPTS, COUNT) == cut


@pytest.mark.slow
def test_a_batch_may_be_split_over_devices():
    mesh = make_mesh(mesh_of(data=4))
    generate = Generator(frozen(), NO_END, mesh=mesh, batch_size=4)
    assert generate(PROMPTS, COUNT) == expected()
    cache = generate.prefill(PROMPTS, COUNT).cache
    assert len({shard.device for shard in cache.keys.addressable_shards}) == 4


@pytest.mark.slow
def test_draws_repeat_themselves_with_their_seed():
    first, second = (Generator(frozen(), NO_END, Sampling(1.0), seed) for seed in (0, 1))
    one, again, other = (generate(PROMPTS, 8) for generate in (first, first, second))
    assert one == again != other


@pytest.mark.slow
def test_a_recipe_that_draws_in_the_forward_has_its_key():
    (tokens,) = Generator(frozen("nvfp4+sr_all"), NO_END)(PROMPTS[:1], 4)
    assert len(tokens) == 4


def test_sampling():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))[None].repeat(4000, 0)

    def shares(**options):
        tokens = next_token(logits, Sampling(**options), jax.random.key(0))
        return np.bincount(np.asarray(tokens), minlength=4) / 4000

    np.testing.assert_array_equal(shares(temperature=0.0), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.03)
    np.testing.assert_array_equal(shares(temperature=1.0, top_p=0.5), [1, 0, 0, 0])
    hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(shares(temperature=2.0), hot / hot.sum(), atol=0.03)


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 129, 1000)] == [
        32, 32, 48, 48, 64, 64, 96, 128, 192, 1024,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(temperature=-1.0), "temperature=-1.0"), (dict(top_k=-1), "top_k=-1"), (dict(top_p=0.0), "top_p=0.0")],
)
def test_sampling_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(("prompts", "count"), [([], 4), ([[1], []], 4), ([[1]], 0), ([[1]] * 5, 4)])
def test_what_cannot_be_continued_is_refused(prompts, count):
    with pytest.raises(ValueError, match="1 to [45] prompts of at least one token|1 to 1 prompts"):
        Generator(frozen(), NO_END, GREEDY, batch_size=4)(prompts, count)
