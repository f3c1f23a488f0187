import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from fp4jax.config import ConfigError, mesh_of
from fp4jax.training.mesh import make_mesh, put_batch


def test_axes_are_auto():
    mesh = make_mesh(mesh_of(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == mesh_of(data=2, fsdp=jax.device_count() // 4, tensor=2)
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_a_mesh_may_leave_devices_idle_but_not_ask_for_more():
    assert make_mesh(mesh_of()).size == 1
    with pytest.raises(ConfigError, match=r"set mesh.data"):
        make_mesh(mesh_of(data=jax.device_count() + 1))


def test_batches_are_split_along_their_sequences():
    mesh = make_mesh(mesh_of(data=2, fsdp=2, tensor=2))
    rows = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    array = put_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 16)}
