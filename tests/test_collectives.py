"""What travels between devices for the statistics of quantized operands, counted in compiled programs."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax.axes import MESH_AXES
from fp4jax.config import mesh_of
from fp4jax.dot import dot_general, prepare
from fp4jax.plan.program import Executions
from fp4jax.reporting.optimized_hlo import Program

SEQUENCES, LENGTH, WIDTH = 16, 64, 128
LINEARS = 3  # of one input, as query, key and value
MESHES = {
    "data": (mesh_of(data=8), P("data"), P()),
    "fsdp": (mesh_of(fsdp=8), P("fsdp"), P("fsdp")),
    "data and fsdp": (mesh_of(data=4, fsdp=2), P(("data", "fsdp")), P("fsdp")),
    "fsdp and tensor": (mesh_of(fsdp=4, tensor=2), P("fsdp"), P("fsdp", "tensor")),
}


def linears(recipe, x, kernels, gradients, key):
    """Forward and backward of linear layers of one input."""

    def forward(x, kernels):
        xq = prepare(x, recipe, key=key)
        # As fp4jax.models does it, kernels are gathered when they are quantized.
        wqs = [jax.lax.with_sharding_constraint(prepare(w, recipe, "rhs", key=key), P()) for w in kernels]
        dot = functools.partial(
            dot_general, dimension_numbers=(((2,), (0,)), ((), ())), recipe=recipe, key=key, lhs_q=xq
        )
        return [dot(x, w, rhs_q=wq) for w, wq in zip(kernels, wqs, strict=True)]

    _, pull = jax.vjp(forward, x, kernels)
    return pull(gradients)


@functools.cache
def collectives(recipe, name):
    """[(opcode, its type)] of `linears` on a mesh."""
    sizes, tokens, weights = MESHES[name]
    mesh = jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    tokens, weights = (NamedSharding(mesh, spec) for spec in (tokens, weights))
    x = jax.ShapeDtypeStruct((SEQUENCES, LENGTH, WIDTH), jnp.float32, sharding=tokens)
    kernels = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=weights)] * LINEARS
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(linears, recipe), out_shardings=(tokens, [weights] * LINEARS))
        program = step.lower(x, kernels, [x] * LINEARS, jax.random.key(0)).compile().as_text()
    return [
        (instruction.opcode, instruction.type)
        for instruction, _ in Executions(Program(program))
        if instruction.opcode in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
    ]


def count(recipe, mesh, opcode, dtype=""):
    return sum(found == opcode and dtype in type for found, type in collectives(recipe, mesh))


@pytest.mark.parametrize("mesh", ["data", "fsdp", "fsdp and tensor"])
@pytest.mark.parametrize("recipe", ["averis", pytest.param("averis_hadamard", marks=pytest.mark.slow)])
def test_a_mean_is_one_gather_and_nothing_else(recipe, mesh):
    """Of partial sums, for each array that has a mean. Maxima and column sums join what travels without a split."""
    means = 1 + LINEARS
    assert count(recipe, mesh, "all-gather", "f32") == means
    assert count(recipe, mesh, "all-gather") == count("nvfp4", mesh, "all-gather") + means
    others = "all-to-all", "reduce-scatter", "collective-permute"
    assert not any(count(recipe, mesh, opcode) for opcode in others)
    if "tensor" not in mesh:  # there the compiler chooses another way for dX
        assert count(recipe, mesh, "all-reduce") == count("nvfp4", mesh, "all-reduce")


def test_of_near_devices_far_ones_get_one_row():
    """Partial sums of a mean travel along the innermost axis first: 2 rows, then 4, never those of all 8 devices."""
    mesh = "data and fsdp"
    gathers = [type for opcode, type in collectives("averis", mesh) if opcode == "all-gather" and "f32" in type]
    rows = sorted(int(size) for type in gathers for size in re.findall(rf"f32\[(\d+),{WIDTH}\]", type))
    assert rows == [2] * (1 + LINEARS) + [4] * (1 + LINEARS), gathers


@pytest.mark.parametrize("recipe", ["averis+shards8", "averis+per_sequence"])
def test_means_of_what_a_device_has_alone_do_not_travel(recipe):
    """On a mesh with several axes for the batch, too."""
    for opcode in ("all-gather", "all-to-all", "collective-permute"):
        assert count(recipe, "data and fsdp", opcode) <= count("nvfp4", "data and fsdp", opcode), opcode


def test_shards_have_no_statistics_to_exchange():
    """Of each device's sequences: what is left is the weight gradient, as without quantization."""
    assert {opcode for opcode, _ in collectives("averis+shards8", "data")} == {"all-reduce"}
    (gradients,) = [type for _, type in collectives("averis+shards8", "data")]
    assert gradients.count("f32[") == gradients.count(f"f32[{WIDTH},{WIDTH}]") == LINEARS


def test_maxima_of_kernels_are_still_of_all_of_them():
    """Kernels have no shards: under fsdp, which splits them, their maxima travel, and codes and scales."""
    maxima, gradients = [type for opcode, type in collectives("averis+shards8", "fsdp") if opcode == "all-reduce"]
    assert "f32" not in maxima and maxima.count("s32[]") >= LINEARS
    assert gradients.count("f32[") == gradients.count(f"f32[{WIDTH},{WIDTH}]") == LINEARS
    assert count("averis+shards8", "fsdp", "all-gather") == count("nvfp4", "fsdp", "all-gather")


@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_maxima_that_are_ready_together_travel_together(mesh):
    """Both copies of X and of every D and, where they are split, every W; column sums with the weight gradients."""
    maxima, sums = [type for opcode, type in collectives("averis", mesh) if opcode == "all-reduce"]
    assert maxima.count("s32[]") >= 1 + LINEARS and "f32" not in maxima
    assert sums.count(f"f32[{WIDTH},{WIDTH}]") == LINEARS
