"""What a scan measures: a run's newest checkpoint or a pretrained model, and held-out text for it."""

import contextlib
import dataclasses
import itertools
import math
import runpy
from pathlib import Path

import jax
import ml_collections
import numpy as np

from fp4jax.analysis.sensitivity.scan import Batch
from fp4jax.checkpoint import Checkpointer, CheckpointError, saved_config
from fp4jax.config import MOE_MODEL, ConfigError, default_config, flatten, mesh_of
from fp4jax.config_checks import validate
from fp4jax.data.errors import DataError
from fp4jax.data.held_out import held_out_text
from fp4jax.data.pipeline import open_dataset
from fp4jax.models.pretrained import load_parameters
from fp4jax.models.qwen3 import Qwen3
from fp4jax.recipes import Recipe, recipe
from fp4jax.training.mesh import make_mesh
from fp4jax.training.state import model_template, sharded_abstract_params

DTYPE = "float32"
"""Of activations in both precisions, so that a difference is the recipe's and not that of bfloat16."""


_NOT_ARCHITECTURE = {"model.dtype", "model.remat", "model.attention", "model.init_std"}


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much text: `batches` batches of `rows` rows of `seq_len` tokens; None takes what the source has."""

    batches: int = 1
    rows: int | None = None
    seq_len: int | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """Attributes:
    name: of the model, with the steps it was trained.
    model: every linear layer under `recipe`, activations in float32.
    """

    name: str
    model: Qwen3
    recipe: Recipe
    batches: tuple[Batch, ...]


def pretrained(model: str, recipe_name: str | None, amount: Amount) -> Subject:
    """A pretrained model on the embedded corpus's held-out documents: 4 rows of 512 tokens unless `amount` says more.

    Args:
      model: as `fp4jax.models.load_parameters` takes it.
      recipe_name: None for the default configuration's.

    Raises:
      ValueError: a model that cannot be loaded, an unknown recipe or one that quantizes nothing, too little text.
    """
    chosen = quantizing_recipe(recipe_name or default_config().recipe)
    loaded = load_parameters(model, dtype=DTYPE)
    rows, seq_len = amount.rows or 4, amount.seq_len or 512
    text = held_out_text(
        default_config().data, loaded.tokenizer, seq_len=seq_len + 1, rows=rows * amount.batches
    ).tokens  # fmt: skip
    mask = np.ones((rows, seq_len), np.float32)
    batches = tuple(
        {"tokens": part[:, :-1], "targets": part[:, 1:], "loss_mask": mask} for part in np.split(text, amount.batches)
    )
    return Subject(str(model), loaded.model(chosen), chosen, batches)


def trained(
    workdir: Path, config: ml_collections.ConfigDict | None, recipe_name: str | None, amount: Amount
) -> Subject:
    """A run's newest checkpoint on its validation split, by default in batches as in training.

    Args:
      workdir: that `train` wrote.
      config: whose recipe and data are taken; None for the run's own. Its model must be the run's.
      recipe_name: instead of the configuration's.

    Raises:
      CheckpointError: no checkpoint, one that cannot be read, or one of another model than the configuration's.
      ValueError: an unknown recipe or one that quantizes nothing, data that cannot be read, too little of it.
    """
    workdir = workdir.expanduser().absolute()
    found = saved_config(workdir)
    if found is None:
        raise CheckpointError(f"{workdir} holds no checkpoint; train with this --workdir first")
    step, saved = found
    if saved["model"]["name"] == MOE_MODEL:
        raise ValueError(f"{workdir} holds a {MOE_MODEL}; the sensitivity scan measures dense models")
    config = _measured_config(workdir, saved, config)
    chosen = quantizing_recipe(recipe_name or config.recipe)
    config.recipe = chosen.name
    config.seq_len = amount.seq_len or config.seq_len
    config.batch_size = amount.rows or config.batch_size // config.microbatches
    config.microbatches = 1
    validate(config, device_count=1)
    template = model_template(config)
    target = sharded_abstract_params(template, make_mesh(config.mesh, jax.devices()[:1]))
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    with Checkpointer(workdir, largest_array=largest, read_only=True) as checkpointer:
        model = template.merge(checkpointer.restore_params(target))
    return Subject(f"{workdir.name} step {step}", model, chosen, _validation_batches(config, amount.batches))


def config_file(path: Path) -> ml_collections.ConfigDict:
    """The configuration of a file as in `configs/`.

    Raises:
      ConfigError: there is no such file, or no `get_config` in it.
    """
    if not path.is_file():
        raise ConfigError(f"--config={path}: there is no such file")
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ConfigError(f"--config={path}: it has no function get_config")
    return get_config()


def quantizing_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      ValueError: it is unknown, or quantizes nothing.
    """
    found = recipe(name)
    if found.is_high_precision:
        raise ValueError(f"recipe {name!r} quantizes nothing, so no layer is sensitive to it; choose another --recipe")
    return found


def _measured_config(workdir: Path, saved: dict, given: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
    """The run's configuration or the given one, for one device, with every linear layer quantized."""
    config = default_config()
    config.update(saved)
    if given is not None:
        ours, theirs = (flatten({"model": part.model}) for part in (given, config))
        sizes = sorted(ours.keys() - _NOT_ARCHITECTURE)
        other = [f"{key} {theirs[key]!r} and not {ours[key]!r}" for key in sizes if ours[key] != theirs[key]]
        if other:
            raise CheckpointError(
                f"{workdir} holds another model than --config: {'; '.join(other)}; leave --config out"
            )
        config.update(given)
    config.policy, config.schedule = "all_linear", ""
    config.model.dtype = DTYPE
    config.mesh = mesh_of()
    return config


def _validation_batches(config: ml_collections.ConfigDict, count: int) -> tuple[Batch, ...]:
    dataset = open_dataset(
        config.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed, split="validation"
    )
    available = math.ceil(dataset.stats.rows / config.batch_size)
    if available < count:
        raise DataError(
            f"the validation split holds {available:,} batches of {config.batch_size:,} rows of {config.seq_len:,} "
            f"tokens, {count:,} were asked for; ask for fewer or smaller ones"
        )
    with contextlib.closing(dataset.batches()) as iterator:
        return tuple(itertools.islice(iterator, count))
