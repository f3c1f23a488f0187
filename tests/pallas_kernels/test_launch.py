"""Grids of kernels fit CUDA's, whatever the sizes: looked at while they are traced, nothing runs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from fp4jax.numerics import NVFP4, quantize_blocks
from pallas_kernels import compat, launch
from pallas_kernels.column_stats import column_stats
from pallas_kernels.column_sums import column_sums
from pallas_kernels.quantize import quantize_2d, quantize_columns, quantize_copies, quantize_rows

ROWS = 2**24


def summed(x, *, interpret):
    return column_sums(quantize_blocks(x, NVFP4, axes=(-2,), pack_axis=-2), interpret=interpret)


@pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12")
@pytest.mark.parametrize(
    "kernel, shape",
    [
        (quantize_rows, (ROWS, 64)),  # tiles of 16 rows, 8 of them a thread block
        (quantize_columns, (ROWS, 64)),
        (functools.partial(quantize_columns, hadamard=True), (ROWS, 48)),  # its maxima too
        (quantize_2d, (ROWS, 64)),
        (quantize_copies, (ROWS, 64)),
        (summed, (4 * ROWS, 16)),  # 32 blocks of 16 rows a thread block
        (column_stats, (ROWS, 64)),
        (quantize_rows, (16, 2**25)),
    ],
    ids=["rows", "columns", "transformed columns", "2d", "copies", "sums", "stats", "wide rows"],
)
def test_many_rows_fit_a_grid(kernel, shape, monkeypatch):
    grids, check = [], launch.check_grid

    def recorded(grid, name):
        check(grid, name)
        grids.append(grid)

    monkeypatch.setattr(launch, "check_grid", recorded)
    jax.eval_shape(functools.partial(kernel, interpret=True), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    assert grids
    for grid in grids:
        *others, _ = grid.values()
        assert max(others) <= 65535


def test_a_thread_block_takes_more_steps_only_where_a_grid_needs_it():
    assert launch.steps_each(1000, 1000) == 1
    assert launch.steps_each(2**20, 65535 * 8) == launch.MOST_STEPS
    assert launch.steps_each(2**20, 65535 * 8 + 1) == 9
    assert launch.steps_each(2**20, 1, 32) == 32


def test_a_grid_that_cuda_refuses_is_named():
    launch.check_grid({"groups": 65535, "rows": 65535, "columns": 2**31 - 1}, "some_kernel")
    with pytest.raises(
        NotImplementedError, match=r"some_kernel: .* 65535 thread blocks along 'rows' .* needs 65536; leave"
    ):
        launch.check_grid({"groups": 1, "rows": 65536, "columns": 1}, "some_kernel")
    with pytest.raises(NotImplementedError, match=r"2147483647 thread blocks along 'columns'"):
        launch.check_grid({"rows": 1, "columns": 2**31}, "some_kernel")
