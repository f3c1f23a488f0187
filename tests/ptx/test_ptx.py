"""The emulator itself: instructions by the manual's definitions, and that it refuses what it is there to refuse."""

from fractions import Fraction

import numpy as np
import pytest

from tests.ptx import arithmetic, machine, program
from tests.ptx.memory import Fault
from tests.ptx.program import Launch

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .align 256 kernel_param_0,
	.param .u64 .ptr .align 256 kernel_param_1
)
{
	.reg .b32 	%r<9>;
	ld.param::entry.b64 	%rd1, [kernel_param_0];
	ld.param::entry.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
	mov.b64 	%rd6, __dynamic_shmem__0; cvt.u32.u64 %r2, %rd6;
	shl.b32 	%r3, %r1, 2; add.s32 %r4, %r2, %r3; xor.b32 %r5, %r3, 128; add.s32 %r6, %r2, %r5;
	ld.global.b32 	%r7, [%rd4];
"""
TAIL = "	st.b32 	[%rd5], %r8;\n	ret;\n}\n"
ORDERS = pytest.mark.parametrize("order", machine.ORDERS)


def executed(body, order="forwards", threads=64, shared=256, results=None, contract=False):
    """A kernel of 64 lanes, that have an element of the input in %r7 each and write %r8."""
    given = np.arange(100, 100 + threads, dtype=np.uint32)
    launch = Launch((1, 1, 1), threads, shared, (0, 1))
    results = results or [((threads,), np.dtype(np.uint32))]
    return machine.run(
        program.parse(HEAD + body + TAIL), launch, [given], results, machine.Choices(order, contract=contract)
    )[0]


EXCHANGE = "st.shared.b32 [%r4], %r7; {} ld.shared.b32 %r8, [%r6];"  # with the lane of the other warp


@ORDERS
def test_warps_exchange_by_shared_memory(order):
    got = executed(EXCHANGE.format("bar.sync 0;"), order)
    np.testing.assert_array_equal(got, 100 + (np.arange(64) ^ 32))


@ORDERS
def test_without_a_barrier_it_is_refused(order):
    with pytest.raises(Fault, match="nobody has written|without a barrier"):
        executed(EXCHANGE.format(""), order)


@ORDERS
def test_what_others_may_still_read_is_not_overwritten(order):
    with pytest.raises(Fault, match="not known to be done with|without a barrier"):
        executed(EXCHANGE.format("bar.sync 0;") + "st.shared.b32 [%r4], %r8;", order)


@ORDERS
def test_a_barrier_tells_nothing_of_what_comes_after_it(order):
    """Between two barriers one warp writes and the other one reads."""
    body = """
        st.shared.b32 [%r4], %r7; bar.sync 0; shr.u32 %r8, %r1, 5; setp.eq.b32 %p1, %r8, 0; mov.b32 %r8, 0;
        @%p1 st.shared.b32 [%r4], %r1; @!%p1 ld.shared.b32 %r8, [%r6]; bar.sync 0;
    """
    with pytest.raises(Fault, match="without a barrier|not known to be done"):
        executed(body, order)


def test_statements_behind_a_return_are_not_executed():
    np.testing.assert_array_equal(
        executed("mov.b32 %r8, %r7; st.b32 [%rd5], %r8; ret; st.b32 [%rd4], %r8;"), 100 + np.arange(64)
    )


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.global.b32 %r8, [%rd4+4];", "reads what no input holds"),
        ("ld.global.b32 %r8, [%rd4+2];", "not aligned"),
        ("st.b32 [%rd2], %r7; mov.b32 %r8, %r7;", "at once, and not the same"),
        ("st.b32 [%rd5], %r1; mov.b32 %r8, %r7;", "twice, and not the same"),
        ("st.b32 [%rd4], %r7; mov.b32 %r8, %r7;", "outside of the results"),
        ("st.shared.b32 [%r2], %r7;", "of shared memory at once"),
        ("bar.sync 1, 96;", "all warps wait"),
    ],
)
def test_refused(body, fault):
    with pytest.raises(Fault, match=fault):
        executed(body)


def test_results_are_written_whole():
    with pytest.raises(Fault, match="leaves 4 bytes of a result"):
        executed("mov.b32 %r8, %r7;", results=[((65,), np.dtype(np.uint32))])


def test_unknown_statements_are_errors():
    with pytest.raises(NotImplementedError, match="sin.approx.f32"):
        executed("sin.approx.f32 %r8, %r7;")


def test_sums_of_products_are_contracted_or_not():
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, which rounding the product loses."""
    body = """
        mov.b32 %r7, 0f3F800800; mul.f32 %r8, %r7, %r7; mov.b32 %r9, 0f3F801000; neg.f32 %r9, %r9;
        add.f32 %r8, %r8, %r9;
    """
    for contract, want in ((False, 0.0), (True, 2.0**-24)):
        assert (executed(body, contract=contract).view(np.float32) == want).all()
    named = body.replace("mul.f32", "mul.rn.f32")
    assert (executed(named, contract=True).view(np.float32) == 0).all()


def test_scopes_and_loops():
    """Labels belong to their braces; a loop runs as often as its condition says."""
    once = "{ .reg .pred P; LOOP: add.s32 %r8, %r8, 1; setp.lt.u32 P, %r8, %r7; @P bra LOOP; }"
    with pytest.raises(NotImplementedError, match="lanes of a warp part"):
        executed("mov.b32 %r8, 0;" + once)
    got = executed("mov.b32 %r7, 5; mov.b32 %r8, 0;" + once + "mov.b32 %r7, 9;" + once)
    np.testing.assert_array_equal(got, 9)


def test_permuted_bytes_are_those_of_the_first_source_first():
    a, b = np.array([0x33221100], np.uint32), np.array([0x77665544], np.uint32)
    for selector, want in ((0x3210, 0x33221100), (0x7654, 0x77665544), (0x1404, 0x11440044), (0x000F, 0x00000000)):
        assert arithmetic.permute(a, b, np.array([selector], np.uint32)) == want
    assert arithmetic.permute(np.array([0x80], np.uint32), b, np.array([0x0008], np.uint32)) == 0x808080FF


def test_fields_of_bits():
    for name, width in (("bfe.u32", 32), ("bfe.u64", 64)):
        function, _, _ = arithmetic.TABLE[name]
        value = np.array([0xF234567890ABCDE1 >> 64 - width], arithmetic.integer(width))
        position, length = np.array([4], np.uint32), np.array([14], np.uint32)
        assert function(value, position, length) == int(value[0]) >> 4 & 0x3FFF


def test_multiply_add_is_rounded_once():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 5000)).astype(np.float32)
    c[:2500] = -(a * b)[:2500]  # what is left are the digits that the product was rounded by
    c[2500:] *= np.exp2(rng.integers(-30, 30, 2500)).astype(np.float32)
    got = arithmetic.floats(arithmetic.fma)(*(x.view(np.uint32) for x in (a, b, c))).view(np.float32)
    for x, y, z, result in zip(*(each.tolist() for each in (a, b, c, got)), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        error, below, above = (abs(Fraction(v) - exact) for v in (result, *neighbours(result)))
        assert error <= min(below, above)


def neighbours(x):
    return (float(np.nextafter(np.float32(x), np.float32(to))) for to in (-np.inf, np.inf))


@pytest.mark.parametrize(
    ("a", "b", "smallest", "largest"),
    [(0.0, -0.0, -0.0, 0.0), (-0.0, 0.0, -0.0, 0.0), (1.0, 2.0, 1.0, 2.0), (np.nan, 1.0, np.nan, np.nan)],
)
def test_least_and_largest(a, b, smallest, largest):
    given = [np.array([x], np.float32).view(np.uint32) for x in (a, b)]
    for sign, want in ((1, smallest), (-1, largest)):
        (got,) = arithmetic.least(*given, sign)
        assert got == (arithmetic.NAN if np.isnan(want) else np.float32(want).view(np.uint32))


def test_scales_are_saturated_and_keep_nan():
    upper = np.array([1e9, -500.0, np.nan, 2.0**-10], np.float32).view(np.uint32)
    lower = np.array([1.0, 0.0, 448.0, 1.0625], np.float32).view(np.uint32)
    np.testing.assert_array_equal(arithmetic.e4m3_pair(upper, lower), [0x7E38, 0xFE00, 0x7F7E, 0x0038])
