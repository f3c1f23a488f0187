"""The newest checkpoint of a run as a pretrained model's parts."""

import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float32

from fp4jax.checkpoint import Checkpointer, CheckpointError, saved_config
from fp4jax.config import default_config
from fp4jax.models.qwen3 import Qwen3Config
from fp4jax.models.registry import MODELS


def is_run(path: str | os.PathLike) -> bool:
    """Whether a folder is the workdir of a run."""
    return (pathlib.Path(path).expanduser() / "checkpoints").is_dir()


def read_run_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """The configuration that the newest checkpoint was trained with; raises as `read_saved`."""
    return read_saved(workdir)[1]


def read_saved(workdir: str | os.PathLike) -> tuple[int, ml_collections.ConfigDict]:
    """(steps done, configuration) of the newest checkpoint.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
    """
    path = pathlib.Path(workdir).expanduser().absolute()
    found = saved_config(path)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; train with this --workdir first")
    config = default_config()
    config.update(found[1])
    return found[0], config


def model_config(config: ml_collections.ConfigDict, dtype: str) -> Qwen3Config:
    """A run's hyperparameters, for activations of `dtype`."""
    model = config.model.copy_and_resolve_references()
    model.dtype = dtype
    return MODELS[model.name][1].from_config(model)


def read_parameters(
    workdir: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Float32[Array, "..."]]:
    """Every parameter by its dotted path, on the first device.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here) for name, shape in shapes.items()}
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in target.values())
    path = pathlib.Path(workdir).expanduser().absolute()
    with Checkpointer(path, largest_array=largest, read_only=True) as checkpointer:
        return checkpointer.restore_params(target)
