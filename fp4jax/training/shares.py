"""Which rows of a batch a process reads: those of its own devices."""

import math

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding

from fp4jax.axes import BATCH_AXES
from fp4jax.config import ConfigError
from fp4jax.data.pipeline import Dataset, open_dataset
from fp4jax.layout import BATCH


def open_share(config: ml_collections.ConfigDict, split: str, mesh: Mesh) -> Dataset:
    """Opens a split for this process, which reads its share of every batch; see `open_dataset` for what it raises."""
    index, count = batch_share(mesh)
    return open_dataset(
        config.data,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        split=split,
        process_index=index,
        process_count=count,
    )


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process's devices hold the index-th of `count` equal blocks of a batch's rows.

    Processes that share a `tensor` axis hold the same block.

    Raises:
      ConfigError: a process has no device in the mesh, or rows that are no such block.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    owners = {device.process_index for device in mesh.devices.flat}
    if len(owners) < jax.process_count():
        raise ConfigError(
            f"the mesh has {mesh.size} of {jax.device_count()} devices, and {jax.process_count() - len(owners)} of "
            f"{jax.process_count()} processes have none of them; set one axis to -1 (--config.mesh.data=-1), or start "
            "fewer processes"
        )
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((shards,)).values()
    rows = sorted({index for (rows,) in held for index in range(*rows.indices(shards))})
    first, size = rows[0], len(rows)
    if rows != list(range(first, first + size)) or first % size or shards % size:
        raise ConfigError(
            f"process {jax.process_index()} has parts {', '.join(map(str, rows))} of the {shards} of a batch, and it "
            "reads one block; let mesh.tensor divide its devices, or be a multiple of them"
        )
    return first // size, shards // size
