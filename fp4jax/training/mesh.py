"""The devices as a grid of the axes of `fp4jax.layout`. All of them are Auto: the compiler places the activations."""

from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fp4jax.axes import MESH_AXES
from fp4jax.config import mesh_shape
from fp4jax.layout import BATCH


def make_mesh(
    sizes: Mapping[str, int] | ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh of `config.mesh`; an axis of -1 takes all remaining devices.

    Raises:
      ConfigError: the mesh does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(mesh_shape(sizes, len(devices)).values())
    used = devices[: int(np.prod(shape))]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=used)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process' part of a batch on its devices; the result is the global batch, split along its sequences."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
