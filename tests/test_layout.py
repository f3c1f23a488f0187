"""The table of axes, and what it tells the compiler on 8 devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from fp4jax.axes import MESH_AXES
from fp4jax.layout import LOGICAL_AXES, partition_spec, place

SIZES = (1, 2, 2, 2)


def test_partition_specs():
    assert partition_spec(("layers", "embed", "mlp")) == PartitionSpec(None, ("fsdp", "expert"), "tensor")
    assert partition_spec(("vocab", "embed")) == PartitionSpec("tensor", ("fsdp", "expert"))
    assert partition_spec(("embed", "embed")) == PartitionSpec(("fsdp", "expert"), None)
    assert partition_spec(("layers", "expert", "embed", "mlp")) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert partition_spec(("layers", "expert", "mlp", "embed")) == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert partition_spec((None, None)) == PartitionSpec(None, None)
    assert partition_spec(None) == PartitionSpec()
    with pytest.raises(ValueError, match="unknown axis 'hidden'; accepted: embed"):
        partition_spec(("hidden",))


def test_the_table_names_axes_of_the_mesh():
    assert {axis for axes in LOGICAL_AXES.values() for axis in axes} == set(MESH_AXES)


def placed(shape, names, blocks=None, kind=AxisType.Auto):
    mesh = jax.make_mesh(SIZES, MESH_AXES, axis_types=(kind,) * 4)
    with jax.set_mesh(mesh):
        return jax.jit(lambda: place(jnp.zeros(shape), names, blocks))().sharding.spec


def test_a_block_is_never_cut():
    """Of 8 devices 2 x 2 split 64 slots of each of 4 experts; 48 slots are three blocks of 16, which they cannot."""
    assert placed((4, 64, 8), ("expert", "slots", None), (1, 16, 1)) == PartitionSpec("expert", "fsdp")
    assert placed((4, 48, 8), ("expert", "slots", None), (1, 16, 1)) == PartitionSpec("expert")
    assert placed((4, 48, 8), ("expert", "slots", None)) == PartitionSpec("expert", "fsdp")
    assert placed((3, 64, 8), ("expert", "slots", None)) == PartitionSpec(None, "fsdp")


def test_without_a_mesh_nothing_is_said():
    x = jnp.zeros((8, 8))
    assert place(x, ("batch", None)) is x


def test_explicit_axes_are_not_ours():
    x = jnp.zeros((8, 8))
    with jax.set_mesh(jax.make_mesh(SIZES, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)):
        assert place(x, ("batch", None)) is x
