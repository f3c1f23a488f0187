"""What is evaluated: a checkpoint of ours or a pretrained model, under a recipe, with its tokenizer."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from fp4jax import models
from fp4jax import policy as policies
from fp4jax.config import mesh_of
from fp4jax.data.tokenizers import Tokenizer
from fp4jax.models.frozen import FrozenModel
from fp4jax.models.saved_run import run_tokenizer
from fp4jax.recipes import Recipe
from fp4jax.recipes import recipe as find_recipe
from fp4jax.training.compilation import enable_compilation_cache
from fp4jax.training.mesh import make_mesh, replicated
from fp4jax.training.validation import restore_run

DEFAULT_BATCH_SIZE = 8
PRETRAINED_MAX_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model ready to be evaluated.

    Attributes:
      max_length: tokens that it takes at once.
      about: what it is, as JSON: source, recipe with the rounding of its forward product, policy, dtype, seed.
    """

    frozen: FrozenModel
    tokenizer: Tokenizer
    mesh: Mesh
    batch_size: int
    max_length: int
    about: dict


def open_subject(
    *,
    workdir: str | Path | None = None,
    model: str | None = None,
    recipe: str | None = None,
    policy: str | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_length: int | None = None,
    seed: int = 0,
) -> Subject:
    """Opens the newest checkpoint of a run, or a pretrained model, with its kernels quantized.

    Args:
      workdir: of a run of `train`.
      model: what `fp4jax.models.load` takes; exactly one of the two.
      recipe: by default that of the run's last step, "bf16" for a pretrained model.
      policy: which layers get it; by default the run's, "all_linear" for a pretrained model.
      batch_size: sequences in a batch, which is split over as many devices as divide it.
      max_length: by default the run's `seq_len`; of a pretrained model its own, PRETRAINED_MAX_LENGTH at most.
      seed: of what the recipe draws in the forward; most draw nothing there.

    Raises:
      ValueError: none or both of `workdir` and `model`, and what reading them raises.
    """
    if (workdir is None) == (model is None):
        raise ValueError("give one of --workdir (a run of train.py) and --model (smollm2-135m, or a model's file)")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if workdir is not None:
        return _of_run(workdir, recipe, policy, batch_size, max_length, seed)
    return _pretrained(model, recipe or "bf16", policy or "all_linear", batch_size, max_length, seed)


def _of_run(workdir, recipe, policy, batch_size: int, max_length: int | None, seed: int) -> Subject:
    run = restore_run(workdir, recipe, policy=policy, batch_size=batch_size)
    config = run.config
    about = {"workdir": Path(workdir).name, "step": run.step, "trained_with": run.trained_with}
    about |= _about(config.recipe, models.linear_recipes(config), config.model.dtype)
    frozen = FrozenModel(run.template.merge(run.params), seed)
    tokenizer = run_tokenizer(workdir, run.step, config.data.tokenizer)
    return _subject(frozen, tokenizer, run.mesh, batch_size, max_length or config.seq_len, about, seed)


def _pretrained(name: str, recipe: str, policy: str, batch_size: int, max_length: int | None, seed: int) -> Subject:
    enable_compilation_cache()
    loaded = models.load_parameters(name)
    paths = loaded.config.linear_paths
    chosen = policies.policy(policy, recipe, paths)
    about = {"model": name} | _about(recipe, chosen.assign(paths), loaded.config.dtype)
    mesh = make_mesh(mesh_of(data=math.gcd(batch_size, jax.device_count())))
    graphdef, state = nnx.split(loaded.model(policy=chosen))
    frozen = FrozenModel(nnx.merge(graphdef, jax.device_put(state, replicated(mesh))), seed)
    own = loaded.origin.config_json.get("max_position_embeddings", PRETRAINED_MAX_LENGTH)
    length = max_length or min(own, PRETRAINED_MAX_LENGTH)
    return _subject(frozen, loaded.tokenizer, mesh, batch_size, length, about, seed)


def _about(recipe: str, assigned: Mapping[str, Recipe], dtype: str) -> dict:
    forward = find_recipe(recipe).fprop
    return {
        "recipe": recipe,
        "forward": {"activations": str(forward.lhs), "weights": str(forward.rhs)},
        "layers": policies.describe(assigned),
        "high_precision_dtype": dtype,
    }


def _subject(frozen, tokenizer: Tokenizer, mesh: Mesh, batch_size: int, max_length: int, about: dict, seed: int):
    if tokenizer.vocab_size > frozen.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries and the model {frozen.config.vocab_size}: "
            "they do not belong together"
        )
    about = about | {"batch_size": batch_size, "max_length": max_length, "seed": seed}
    return Subject(frozen, tokenizer, mesh, batch_size, max_length, about)
