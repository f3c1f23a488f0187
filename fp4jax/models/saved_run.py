"""The newest checkpoint of a run as a pretrained model's parts."""

import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from jaxtyping import Array, Float32

from fp4jax.checkpoint import Checkpointer, CheckpointError, saved_config
from fp4jax.config import config_from
from fp4jax.data.pipeline import TOKENIZER_KEY
from fp4jax.data.tokenizers import Tokenizer, load_tokenizer
from fp4jax.models.qwen3 import Qwen3Config
from fp4jax.models.registry import MODELS


def is_run(path: str | os.PathLike) -> bool:
    """Whether a folder is the workdir of a run."""
    return (pathlib.Path(path).expanduser() / "checkpoints").is_dir()


def read_saved(workdir: str | os.PathLike) -> tuple[int, ml_collections.ConfigDict]:
    """(steps done, configuration) of the newest checkpoint.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
    """
    path = pathlib.Path(workdir).expanduser().absolute()
    found = saved_config(path)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; train with this --workdir first")
    return found[0], config_from(found[1])


def run_tokenizer(workdir: str | os.PathLike, step: int, spec: str) -> Tokenizer:
    """The tokenizer that a run names, if it is the one whose ids the checkpoint of `step` steps was trained on.

    Another one's ids would be read as that one's, and nothing else would notice.

    Raises:
      CheckpointError: it is another one: the file that the run names was replaced.
      DataError: there is none.
    """
    folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints" / str(step)
    position = ocp.JsonCheckpointHandler().restore(folder / "data", args=ocp.args.JsonRestore())
    tokenizer = load_tokenizer(spec)
    # A position that was saved before positions named it is taken as it is.
    if position.get(TOKENIZER_KEY, tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(
            f"data.tokenizer={spec!r} is not the tokenizer that {folder} was trained with: its content has changed; "
            "put the former one back"
        )
    return tokenizer


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
