"""The benchmark never prints a number it did not measure."""

import jax
import pytest

from pallas_kernels.quantize import bench, shapes


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_so_and_prints_no_table(capsys):
    assert bench.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nothing to measure: ")


def test_a_wrong_result_ends_the_run():
    shape = shapes.SHAPES[0]
    twin = lambda x: bench.quantize_blocks(x, bench.NVFP4, axes=(-1,), pack_axis=-1)  # noqa: E731
    q = jax.jit(twin)(jax.numpy.ones((2, 16)))
    bench._compare(q, q, shape)
    wrong = type(q)(q.codes ^ jax.numpy.uint8(1), q.scales, q.amax, q.format, q.axis, q.blocked)
    with pytest.raises(SystemExit, match="16 of 16 codes differ from the XLA path"):
        bench._compare(wrong, q, shape)


@pytest.mark.gpu
def test_it_measures_a_shape():
    row = bench._measure(shapes.Shape(4096, 1024, ""), jax.numpy.dtype("bfloat16"), False)
    assert row["kernel_us"] > 0
    assert 0 < row["share_of_copy_bandwidth"] < 2
