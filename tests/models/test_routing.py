"""Routing against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.models import routing

F32 = np.float32


def random_choices(tokens, experts, chosen, seed=0):
    """Lopsided: the first experts are wanted most."""
    random = np.random.default_rng(seed)
    score = random.gumbel(size=(tokens, experts)) - 0.5 * np.arange(experts)
    return np.argsort(-score, axis=1)[:, :chosen].astype(np.int32)


def in_turn(experts, num_experts, capacity):
    """{expert: [(token, rank), ...]} of what it takes, token by token; the choices that are dropped."""
    taken, dropped = {expert: [] for expert in range(num_experts)}, []
    for token, row in enumerate(experts):
        for rank, expert in enumerate(row):
            if len(taken[expert]) < capacity:
                taken[expert].append((token, rank))
            else:
                dropped.append((token, rank))
    return taken, dropped


CASES = [(40, 8, 2, 16), (33, 5, 3, 7), (17, 4, 4, 17), (3, 6, 1, 2), (1, 2, 1, 1), (64, 16, 2, 4)]


@pytest.mark.parametrize(("tokens", "experts", "chosen", "capacity"), CASES)
def test_slots_are_taken_in_the_order_of_tokens(tokens, experts, chosen, capacity):
    choices = random_choices(tokens, experts, chosen)
    slots = jax.jit(routing.assign_slots, static_argnums=(1, 2))(choices, experts, capacity)
    taken, dropped = in_turn(choices, experts, capacity)
    for expert, own in taken.items():
        assert slots.row_mask[expert].tolist() == [True] * len(own) + [False] * (capacity - len(own))
        found = np.asarray(slots.choice[expert, : len(own)])
        assert list(zip(*(part.tolist() for part in np.divmod(found, chosen)), strict=True)) == own
        for position, (token, rank) in enumerate(own):
            assert slots.kept[token, rank] and slots.slot[token, rank] == expert * capacity + position
    assert list(zip(*np.nonzero(~np.asarray(slots.kept)), strict=True)) == dropped
    assert slots.choice.min() >= 0 and slots.choice.max() < tokens * chosen
    assert slots.slot.min() >= 0 and slots.slot.max() < experts * capacity


def test_padding_chooses_nothing_and_takes_no_slot():
    """What is found for the real tokens is what they find alone; NaN in padding goes nowhere."""
    random = np.random.default_rng(2)
    logits, real = random.normal(size=(40, 8)).astype(F32), random.random(40) < 0.6
    poisoned, capacity = np.where(real[:, None], logits, np.nan), 4

    @jax.jit
    def routed(logits, real=None):
        choices = routing.choose(logits, 2, True, real)
        slots = routing.assign_slots(choices.experts, 8, capacity)
        return choices, slots, routing.routing_sums(choices, slots)

    @jax.jit
    @jax.value_and_grad
    def balance(logits, real):
        sums = routed(logits, real)[2]
        return routing.load_balancing_loss(sums["choices"], sums["probability"], 2)

    (choices, slots, sums), (alone, own, expected) = routed(poisoned, real), routed(logits[real])
    np.testing.assert_array_equal(choices.experts[real], alone.experts)
    np.testing.assert_allclose(choices.weights[real], alone.weights, rtol=1e-6)
    assert (np.asarray(choices.experts)[~real] == 8).all() and not np.asarray(slots.kept)[~real].any()
    for name in ("slot", "kept"):
        np.testing.assert_array_equal(np.asarray(getattr(slots, name))[real], getattr(own, name))
    np.testing.assert_array_equal(slots.row_mask, own.row_mask)
    assert np.max(slots.slot) < 8 * capacity and np.min(slots.slot) >= 0
    assert expected["dropped"] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)
    gradient = np.asarray(balance(poisoned, real)[1])
    assert (gradient[~real] == 0).all() and np.isfinite(gradient).all() and gradient[real].any()
    assert balance(logits, np.zeros(40, bool))[0] == 0  # nothing is real


def test_there_and_back_with_cotangents():
    """Against the dense 0/1 matrix of tokens, ranks and slots, which the code never makes."""
    tokens, experts, chosen, capacity = 40, 8, 2, 8  # some slots stay empty, some choices are dropped
    choices = random_choices(tokens, experts, chosen)
    slots = routing.assign_slots(jnp.asarray(choices), experts, capacity)
    matrix = np.zeros((tokens, chosen, experts, capacity), F32)
    for expert, own in in_turn(choices, experts, capacity)[0].items():
        for position, (token, rank) in enumerate(own):
            matrix[token, rank, expert, position] = 1
    random = np.random.default_rng(1)
    shapes = (tokens, 3), (experts, capacity, 3), (tokens, chosen)
    x, y, weights = (jnp.asarray(random.normal(size=shape), F32) for shape in shapes)

    rows, pull = jax.vjp(lambda x: routing.dispatch(x, slots), x)
    np.testing.assert_array_equal(rows, np.einsum("sjec,sd->ecd", matrix, x))
    np.testing.assert_allclose(pull(y)[0], np.einsum("sjec,ecd->sd", matrix, y), rtol=1e-6, atol=1e-6)

    out, pull = jax.vjp(lambda y, weights: routing.combine(y, weights, slots), y, weights)
    np.testing.assert_allclose(out, np.einsum("sjec,ecd,sj->sd", matrix, y, weights), rtol=1e-5, atol=1e-6)
    dy, dweights = pull(x)
    np.testing.assert_allclose(dy, np.einsum("sjec,sd,sj->ecd", matrix, x, weights), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dweights, np.einsum("sjec,ecd,sd->sj", matrix, y, x), rtol=1e-5, atol=1e-5)


def test_what_stands_in_empty_slots_goes_nowhere():
    """Neither into a token nor into its gradient: NaN in every empty slot, in values and in cotangents."""
    choices = random_choices(40, 8, 2)
    slots = routing.assign_slots(jnp.asarray(choices), 8, 8)
    empty = ~slots.row_mask[..., None]
    assert empty.any() and not slots.kept.all()
    poisoned = jnp.where(empty, jnp.nan, jnp.ones((8, 8, 3), jnp.float32))
    weights = jnp.ones(choices.shape, jnp.float32)
    out, pull = jax.vjp(lambda y, weights: routing.combine(y, weights, slots), poisoned, weights)
    dy, dweights = pull(jnp.ones_like(out))
    _, pull = jax.vjp(lambda x: routing.dispatch(x, slots), jnp.ones((40, 3), jnp.float32))
    for array in (out, dy, dweights, *pull(poisoned)):
        assert jnp.isfinite(array).all()
    assert (jnp.where(empty, dy, 0.0) == 0).all()


def test_no_array_of_tokens_by_experts_by_slots():
    """What grows with the model is tokens x experts and rows x features, forward and backward."""
    tokens, experts, chosen, capacity, features = 96, 12, 2, 16, 8
    choices = jnp.asarray(random_choices(tokens, experts, chosen))

    def moved(x, weights):
        slots = routing.assign_slots(choices, experts, capacity)
        return routing.combine(routing.dispatch(x, slots), weights, slots).sum()

    arguments = jnp.ones((tokens, features)), jnp.ones((tokens, chosen))
    text = jax.jit(jax.grad(moved, argnums=(0, 1))).lower(*arguments).as_text()
    sizes = [int(np.prod([int(n) for n in found.split("x")[:-1] if n])) for found in _tensor_types(text)]
    assert max(sizes) <= max(experts * capacity * features, tokens * chosen * features)


def _tensor_types(text):
    return [part.partition(">")[0] for part in text.split("tensor<")[1:]]


def test_likeliest_experts_and_their_weights():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], F32))
    plain = routing.choose(jnp.asarray(logits), 2, normalize=False)
    assert plain.experts.tolist() == [[1, 3], [0, 1]]
    np.testing.assert_allclose(plain.weights, [[0.4, 0.3], [0.25, 0.25]], rtol=1e-6)
    normalized = routing.choose(jnp.asarray(logits), 2, normalize=True)
    np.testing.assert_allclose(normalized.weights, [[4 / 7, 3 / 7], [0.5, 0.5]], rtol=1e-6)


def test_sums_count_what_was_chosen_and_what_was_dropped():
    choices = random_choices(40, 8, 2)
    slots = routing.assign_slots(jnp.asarray(choices), 8, 8)
    weights, probabilities = jnp.ones((40, 2)), jnp.asarray(np.random.default_rng(0).random((40, 8)), F32)
    sums = routing.routing_sums(routing.Choices(jnp.asarray(choices), weights, probabilities), slots)
    np.testing.assert_array_equal(sums["choices"], np.bincount(choices.reshape(-1), minlength=8))
    np.testing.assert_allclose(sums["probability"], probabilities.sum(0), rtol=1e-6)
    assert sums["dropped"] == len(in_turn(choices, 8, 8)[1]) > 0


def test_load_balancing_loss_is_least_for_equal_loads():
    even, one = jnp.full((8,), 10, F32), jnp.array([80, 0, 0, 0, 0, 0, 0, 0], F32)
    probability = jnp.full((8,), 5, F32)
    assert routing.load_balancing_loss(even, probability, 2) == pytest.approx(2)
    towards = jnp.array([33, 1, 1, 1, 1, 1, 1, 1], F32)
    assert routing.load_balancing_loss(one, towards, 2) == pytest.approx(8 * 2 * 33 / 40)
    opposite = routing.load_balancing_loss(jnp.stack([one, one[::-1]]), jnp.stack([towards, towards[::-1]]), 2)
    np.testing.assert_allclose(opposite, [8 * 2 * 33 / 40] * 2, rtol=1e-6)  # layers do not make up for one another
    gradient = jax.grad(lambda p: routing.load_balancing_loss(one, p, 2))(towards)
    assert gradient[0] > 0 and (gradient[1:] == 0).all()
