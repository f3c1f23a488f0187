"""Statistics of forward operands, on whole numbers that can be counted; those of gradients are in test_dot.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.dot import prepare
from fp4jax.recipes import recipe
from fp4jax.statistics import FORWARD_STATISTICS, OPERAND_STATISTICS, Monitor, forward_statistics
from tests import contract

F32 = np.float32


def forward(name, x, w):
    """{slot: {statistic: value}} of a linear layer."""

    @contract.jit
    def run(x, w):
        value = recipe(name)
        return forward_statistics(x, prepare(x, value), w, prepare(w, value, "rhs"), value)

    found = dict(zip(FORWARD_STATISTICS, np.asarray(run(x, w)).tolist(), strict=True))
    return {
        slot: {name: found[f"{slot}.{name}"] for name in OPERAND_STATISTICS}
        for slot in ("fprop.x", "fprop.w", "dgrad.w", "wgrad.x")
    }


def counted_operands():
    """X [2, 20, 32] of ones with a 6 in every block of features; W [32, 48] of 2 and 4."""
    x = np.ones((2, 20, 32), F32)
    x[:, :, ::4] = 6
    w = np.full((32, 48), 2, F32)
    w[::2] = 4
    return x, w


def test_counts_of_values_that_can_be_counted():
    """The grid of a block with maximum 6 holds 6 and 1, and takes 0.2 to zero; a block of 1e-5 gets the scale zero."""
    x, w = counted_operands()
    x[0, 0, 1:3] = [0.2, 0.0]
    x[1, 1, :16] = 6 * 2.0**-19
    found = forward("nvfp4", x, w)
    assert found["fprop.x"] == pytest.approx(
        {
            "energy": np.square(x).sum(), "mean_energy": 40 * np.square(x.mean((0, 1))).sum(),
            "residual_energy": np.square(x).sum(), "noise": 0.04 + 16 * (6 * 2.0**-19) ** 2,
            "elements": x.size - 1, "underflows": 1 + 16, "saturated": (x == 6).sum(),
            "blocks": x.size / 16, "zero_scales": 1, "largest_scales": x.size / 16 - 1,
        },
        rel=1e-5,
    )  # fmt: skip
    assert found["fprop.w"]["mean_energy"] == 32 * 48 * 9
    assert found["fprop.w"]["saturated"] == w.size / 2 and found["dgrad.w"]["saturated"] == w.size


def test_split_takes_the_mean_off():
    """X with a large mean: what is left is small, the noise is of the sum, the mean-bias share is that of the mean."""
    x = np.random.default_rng(0).normal(size=(2, 32, 32)).astype(F32) + 8
    w = np.random.default_rng(1).normal(size=(32, 16)).astype(F32)
    plain, split = (forward(name, x, w) for name in ("nvfp4", "averis"))
    mean = x.mean((0, 1), keepdims=True)
    for found in (plain, split):
        for slot in ("fprop.x", "wgrad.x"):
            assert found[slot]["energy"] == pytest.approx(np.square(x).sum(), rel=1e-5)
            assert found[slot]["mean_energy"] == pytest.approx(64 * np.square(mean).sum(), rel=1e-5)
    assert plain["fprop.x"]["residual_energy"] == plain["fprop.x"]["energy"]
    assert split["fprop.x"]["residual_energy"] == pytest.approx(np.square(x - mean).sum(), rel=1e-4)
    # The rounding error of the mean is in it, as often as there are tokens.
    value = recipe("averis")
    prepared = jax.jit(lambda x: prepare(x, value))(x)
    added = np.asarray(prepared.forward.residual.dequantize()) + np.asarray(prepared.forward.mean.dequantize())
    assert split["fprop.x"]["noise"] == pytest.approx(np.square(added - x).sum(), rel=1e-3)
    assert split["fprop.w"] == plain["fprop.w"] and split["dgrad.w"] == plain["dgrad.w"]
    assert plain["fprop.w"]["energy"] == pytest.approx(np.square(w).sum(), rel=1e-5)


def test_hadamard_leaves_energy_and_changes_counts():
    x, w = counted_operands()
    x = np.random.default_rng(0).normal(size=x.shape).astype(F32) * x
    plain, transformed = (forward(name, x, w)["wgrad.x"] for name in ("nvfp4", "nvfp4_hadamard"))
    assert transformed["energy"] == plain["energy"] and transformed["elements"] > plain["elements"]
    # 20 tokens are padded to 32, and the transform fills the padding of every sequence's second block.
    assert transformed["elements"] == pytest.approx(2 * 32 * 32, abs=20)
    assert 0.1 < transformed["noise"] / plain["noise"] < 2


def test_monitor_appends_layers():
    monitor = Monitor({"a": jnp.zeros((3, 4))})
    monitor.append({"a": jnp.ones((1, 2))})
    monitor.append({"a": jnp.zeros((2, 2))})
    np.testing.assert_array_equal(monitor.forward["a"][:, 0], [1, 0, 0])
