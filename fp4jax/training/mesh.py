"""The devices as a grid of three axes, and the one table that says which axis shards what.

`data` replicates the parameters and splits the batch; `fsdp` splits the batch and the parameters (ZeRO-3); `tensor`
splits heads, MLP width and vocabulary. All axes are Auto: the compiler places the activations.
"""

from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fp4jax.config import MESH_AXES, mesh_shape

LOGICAL_AXES = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "layers": None,
    "expert": None,
}
"""Name of a parameter's axis (in its NNX metadata) to the mesh axis that shards it."""

BATCH = PartitionSpec(("data", "fsdp"))
"""Batches are split along their sequences; a sequence stays whole."""


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


def partition_spec(names: Sequence[str | None] | None) -> PartitionSpec:
    """Returns the PartitionSpec of a parameter whose axes are called `names` (None: replicated).

    Raises:
      ValueError: a name that LOGICAL_AXES does not list.
    """
    axes = []
    for name in names or ():
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"unknown parameter axis {name!r}; accepted: {', '.join(LOGICAL_AXES)}")
        axis = None if name is None else LOGICAL_AXES[name]
        # A mesh axis shards one axis of an array: a square (embed, embed) matrix is split along its first.
        axes.append(None if axis in axes else axis)
    return PartitionSpec(*axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process' part of a batch on its devices; the result is the global batch, split along its sequences."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
