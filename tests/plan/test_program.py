"""Counting in optimized programs: loops multiplied, bytes as an array on one device has them."""

import jax
import jax.numpy as jnp
import pytest

from fp4jax.plan.program import Executions, size_in_bytes
from fp4jax.plan.step import weight_gathers
from fp4jax.reporting.optimized_hlo import Program


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        ("f32[2,3]{1,0}", 24), ("bf16[]", 2), ("pred[7]{0}", 7), ("f4e2m1fn[3,5]{1,0:E(4)}", 8), ("s4[4]{0}", 2),
        ("f8e4m3fn[16]", 16), ("(f32[2]{0}, u8[3]{0})", 11), ("c64[2]", 16), ("token[]", 0), ("f32[0,8]", 0),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096),
    ],
)  # fmt: skip
def test_sizes(type, expected):
    assert size_in_bytes(type) == expected


KNOWN = ', backend_config={"known_trip_count":{"n":"4"}}'
# A step of four iterations on several devices, as XLA prints one; written by hand.
SHARDED = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p0: f32[4,256], p1: s32[]) -> f32[256] {
  %p0 = f32[4,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%slice)
}

%updated (p0.1: f32[4,256], p1.1: f32[256], p2.1: s32[]) -> f32[4,256] {
  %p0.1 = f32[4,256]{1,0} parameter(0)
  %p1.1 = f32[256]{0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %row = f32[1,256]{1,0} bitcast(%p1.1)
  %zero.1 = s32[] constant(0)
  ROOT %new = f32[4,256]{1,0} dynamic-update-slice(%p0.1, %row, %p2.1, %zero.1)
}

%body (arg: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {
  %arg = (s32[], f32[4,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %stack = f32[4,256]{1,0} get-tuple-element(%arg), index=1
  %one = f32[256]{0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %gather = (f32[256]{0}, f32[1024]{0}) all-gather-start(%one), replica_groups={{0,1,2,3}}, dimensions={0}
  %gathered = f32[1024]{0} all-gather-done(%gather)
  %scattered = f32[256]{0} reduce-scatter(%gathered), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %step = s32[] constant(1)
  %later = s32[] add(%i, %step)
  %next = f32[4,256]{1,0} fusion(%stack, %scattered, %i), kind=kLoop, calls=%updated
  ROOT %out = (s32[], f32[4,256]{1,0}) tuple(%later, %next)
}

%condition (arg.1: (s32[], f32[4,256])) -> pred[] {
  %arg.1 = (s32[], f32[4,256]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i.1, %four), direction=LT
}

ENTRY %main (x: f32[4,256]) -> f32[4,256] {
  %x = f32[4,256]{1,0} parameter(0)
  %start = s32[] constant(0)
  %copied = s32[] copy(%start)
  %init = (s32[], f32[4,256]{1,0}) tuple(%copied, %x)
  %loop = (s32[], f32[4,256]{1,0}) while(%init), condition=%condition, body=%body<<KNOWN>>
  %result = f32[4,256]{1,0} get-tuple-element(%loop), index=1
  %reduced = f32[4,256]{1,0} all-reduce-start(%result), replica_groups={}, to_apply=%add
  ROOT %done = f32[4,256]{1,0} all-reduce-done(%reduced)
}
""".replace("<<KNOWN>>", KNOWN)


def test_what_leaves_a_machine():
    """A loop's gather and scatter and the sum behind it, among four devices on two machines, or on one."""
    executions = Executions(Program(SHARDED))
    assert executions.between_machines(devices=4, on_a_machine=2) == {
        "all-gather": 4 * 4096, "reduce-scatter": 4 * 4096, "all-reduce": 4096,
    }  # fmt: skip
    assert executions.between_machines(devices=4, on_a_machine=4) == {}


def test_gathers_are_told_apart_by_what_they_make():
    assert Executions(Program(SHARDED)).gathers() == {"f32[1024]": {"count": 4, "bytes": 4 * 4096}}
    two = SHARDED.replace("%gather = (f32[256]{0}, f32[1024]{0}) all-gather-start(%one)",
        "%gather = ((f32[256]{0}, u8[64,2]{1,0}), (f32[1024]{0}, u8[256,2]{1,0})) all-gather-start(%one, %codes)"
    ).replace("%one = f32", "%codes = u8[64,2]{1,0} constant({...})\n  %one = f32")  # fmt: skip
    assert Executions(Program(two)).gathers() == {
        "f32[1024]": {"count": 4, "bytes": 4 * 4096}, "u8[256,2]": {"count": 4, "bytes": 4 * 512},
    }  # fmt: skip


def test_gathered_weights_are_told_by_their_shapes():
    """Whole or split along `tensor`, precise or in codes and scales; activations are none."""
    kernels = {(128, 256)}
    gathers = {
        "bf16[128,256]": 1, "u8[64,256]": 2, "u8[8,256]": 4, "u8[128,16]": 8, "f32[1,128,128]": 16, "bf16[256,128]": 32,
        "bf16[16,512,128]": 64, "f32[128]": 128, "u8[4,64,256]": 256,
    }  # fmt: skip
    found = {array: {"count": 1, "bytes": size} for array, size in gathers.items()}
    assert weight_gathers(found, kernels, tensor=1) == 1 + 2 + 4 + 8 + 32 + 256
    assert weight_gathers(found, kernels, tensor=2) == 1 + 2 + 4 + 8 + 16 + 32 + 256


def test_collectives_are_multiplied_by_the_loops_around_them():
    assert Executions(Program(SHARDED)).collectives() == {
        "all-gather": {"count": 4, "bytes": 4 * 4096},
        "all-reduce": {"count": 1, "bytes": 4096},
        "reduce-scatter": {"count": 4, "bytes": 4 * 4096},
    }


@pytest.mark.parametrize(
    ("change", "times"),
    [
        (None, 4),
        (("%four = s32[] constant(4)", "%four = s32[] constant(9)"), 9),
        (("direction=LT", "direction=GT"), None),
        (("%start = s32[] constant(0)", "%start = s32[] constant(1)"), None),
        (("%step = s32[] constant(1)", "%step = s32[] constant(2)"), None),
        (("add(%i, %step)", "subtract(%i, %step)"), None),
    ],
)
def test_a_loop_is_counted_where_nothing_is_noted_of_it(change, times):
    """From 0 up to a constant; any other counts once, and is told."""
    executions = Executions(Program(SHARDED.replace(KNOWN, "").replace(*change or ("", ""))))
    assert executions.unknown_loops == (times is None)
    assert executions.collectives()["all-gather"]["count"] == (times or 1)
    assert Executions(Program(SHARDED)).unknown_loops == 0


def test_of_what_is_sliced_or_updated_in_place_the_slice_counts():
    row, gathered = 256 * 4, 1024 * 4
    sliced = row + 4 + row  # the slice, its position, the result
    updated = row + 4 + row
    collectives = (row + row + gathered) + (gathered + row)
    reduced = 2 * 4 * row
    counters = 4 * (4 + 4 + 4) + 2 * 4  # an addition each time, and a copy
    assert Executions(Program(SHARDED)).bytes_accessed() == 4 * (sliced + updated + collectives) + reduced + counters


def test_a_fusion_that_runs_beside_others_moves_what_it_would_alone():
    """Not its operands and its result whole, which its type is a tuple of."""
    beside = SHARDED.replace("%one = f32[256]{0} fusion(%stack, %i)",
        "%begun = ((f32[4,256]{1,0}, s32[]), f32[256]{0}, u32[]) fusion-start(%stack, %i)"
    ).replace("  %gather = ", "  %one = f32[256]{0} fusion-done(%begun)\n  %gather = ")  # fmt: skip
    assert "fusion-start" in beside and "fusion-done" in beside
    assert Executions(Program(beside)).bytes_accessed() == Executions(Program(SHARDED)).bytes_accessed()


# A loop's kernels as XLA for GPUs has them: one alone, one in a fusion that cuts out its operand and writes the result
# into a stack, one in a fusion of that fusion; written by hand.
IN_FUSIONS = SHARDED.replace("%body (", """%cut (c0: f32[4,256], c1: s32[], c2: u8[4,128]) -> u8[4,128] {
  %c0 = f32[4,256]{1,0} parameter(0)
  %c1 = s32[] parameter(1)
  %c2 = u8[4,128]{1,0} parameter(2)
  %none = s32[] constant(0)
  %row.1 = f32[1,256]{1,0} dynamic-slice(%c0, %c1, %none), dynamic_slice_sizes={1,256}
  %codes = u8[1,128]{1,0} custom-call(%row.1), custom_call_target="mosaic_gpu_v2"
  ROOT %written = u8[4,128]{1,0} dynamic-update-slice(%c2, %codes, %c1, %none)
}

%outer (o0: f32[256]) -> u8[128] {
  %o0 = f32[256]{0} parameter(0)
  ROOT %inside = u8[128]{0} fusion(%o0), kind=kCustom, calls=%inner
}

%inner (i0: f32[256]) -> u8[128] {
  %i0 = f32[256]{0} parameter(0)
  ROOT %kernel = u8[128]{0} custom-call(%i0), custom_call_target="other"
}

%body (""").replace("  %gather = ", """  %given = u8[4,128]{1,0} constant({...})
  %fused = u8[4,128]{1,0} fusion(%stack, %i, %given), kind=kCustom, calls=%cut
  %nested = u8[128]{0} fusion(%one), kind=kCustom, calls=%outer
  %alone = u8[128]{0} custom-call(%one), custom_call_target="mosaic_gpu_v2"
  %gather = """)  # fmt: skip


def test_kernels_in_fusions_are_counted_with_the_fusions():
    executions, plain = Executions(Program(IN_FUSIONS)), Executions(Program(SHARDED))
    assert executions.custom_calls() == {"mosaic_gpu_v2": 2 * 4, "other": 4}
    # A slice in and a slice out, with its position; a row in and its codes out, twice.
    moved = (1024 + 4 + 128) + 2 * (1024 + 128)
    assert executions.bytes_accessed() == plain.bytes_accessed() + 4 * moved
    assert executions.collectives() == plain.collectives()


@pytest.mark.parametrize("length", [3, 5])
def test_a_compiled_loop(length):
    """XLA's own text: what grows with a loop's length is what is in it."""

    def run(x):
        return jax.lax.scan(lambda carry, _: (jnp.sin(carry) @ carry, None), x, None, length=length)[0]

    text = jax.jit(run).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
    executions = Executions(Program(text))
    assert length in executions.times.values() and executions.unknown_loops == 0
    assert executions.bytes_accessed() >= length * 3 * 64 * 64 * 4
