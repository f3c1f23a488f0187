"""Validation of a saved run: its newest checkpoint's parameters, under the recipe it was trained with or any other."""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_collections
from jax.sharding import Mesh

from fp4jax import distributed, models
from fp4jax.checkpoint import Checkpointer, CheckpointError, StorageError, saved_config
from fp4jax.config import config_from, mesh_of
from fp4jax.config_checks import validate
from fp4jax.evaluation import EvaluationResult, evaluate
from fp4jax.models.saved_run import run_tokenizer
from fp4jax.training.compilation import enable_compilation_cache
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.schedule import recipe_at, settle
from fp4jax.training.shares import open_share
from fp4jax.training.state import ModelTemplate, Parameters, model_template, sharded_abstract_params
from fp4jax.training.step import make_loss_step


@dataclass(frozen=True)
class WorkdirEvaluation:
    """What was evaluated, and the result; `trained_with` is the recipe of the checkpoint's last step."""

    step: int
    trained_with: str
    recipe: str
    result: EvaluationResult

    def to_json(self) -> dict:
        """Returns the numbers under plain names; loss in nats per token."""
        return {
            "step": self.step,
            "recipe": self.recipe,
            "trained_with": self.trained_with,
            "validation_loss": self.result.loss,
            "validation_perplexity": self.result.perplexity,
            "tokens": self.result.tokens,
            "batches": self.result.batches,
        }

    def __str__(self) -> str:
        return (
            f"step {self.step:,}, recipe {self.recipe} (trained with {self.trained_with}): validation loss "
            f"{self.result.loss:.4f}, perplexity {self.result.perplexity:.2f}, {self.result.tokens:,} tokens"
        )


@dataclass(frozen=True)
class RestoredRun:
    """A run's newest checkpoint, its parameters on the devices of `mesh`.

    Attributes:
      trained_with: the recipe of the checkpoint's last step.
      config: the trained configuration with the evaluation's own choices.
    """

    step: int
    trained_with: str
    config: ml_collections.ConfigDict
    mesh: Mesh
    template: ModelTemplate
    params: Parameters


def restore_run(
    workdir: str | Path,
    recipe_name: str | None = None,
    *,
    policy: str | None = None,
    batch_size: int | None = None,
    batches: int | None = None,
) -> RestoredRun:
    """Reads the newest checkpoint of a run, for an evaluation on as many of this machine's devices as fit.

    Args:
      workdir: of a run of `train`.
      recipe_name: matrix multiplies to evaluate with; None for those of its last step.
      policy: as `config.policy`; None for the run's own.
      batch_size: sequences in a batch; None for one microbatch of the run, which fits in memory.
      batches: of validation data, 0 for the whole split; None for `config.evaluation.batches`.

    Raises:
      CheckpointError: no checkpoint, or one that cannot be read.
      ValueError: an unknown recipe or policy, or a policy that does not follow the recipe asked for.
    """
    workdir = Path(workdir).expanduser().absolute()
    found = saved_config(workdir)
    if found is None:
        raise CheckpointError(f"{workdir} holds no checkpoint; train with this --workdir first")
    step, saved = found
    trained_with = recipe_at(saved, step)
    changes = {"recipe": trained_with if recipe_name is None else recipe_name}
    changes |= {} if policy is None else {"policy": policy}
    config = _evaluation_config(saved, changes, batch_size, batches)
    if recipe_name is not None and policy is None:
        _check_policy_follows(config)
    enable_compilation_cache()
    mesh = make_mesh(config.mesh)
    template = model_template(config)
    target = sharded_abstract_params(template, mesh)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    with Checkpointer(workdir, largest_array=largest, read_only=True) as checkpointer:
        params = checkpointer.restore_params(target)
    return RestoredRun(step, trained_with, config, mesh, template, params)


def evaluate_workdir(
    workdir: str | Path, recipe_name: str | None = None, batches: int | None = None
) -> WorkdirEvaluation:
    """Evaluates the newest checkpoint on its run's validation split; writes `evaluation-<recipe>.json` in the workdir.

    Args:
      workdir, recipe_name, batches: as in `restore_run`.

    Raises:
      CheckpointError: no checkpoint, or one that cannot be read.
      ValueError: an unknown recipe, or data that cannot be read.
    """
    run = restore_run(workdir, recipe_name, batches=batches)
    config, mesh = run.config, run.mesh
    run_tokenizer(workdir, run.step, config.data.tokenizer)
    dataset = open_share(config, "validation", mesh)
    with contextlib.closing(dataset.batches()) as iterator:
        on_devices = (put_batch(batch, mesh) for batch in iterator)
        loss_step = make_loss_step(config, run.template, mesh)
        result = evaluate(loss_step, run.params, on_devices, config.evaluation.batches)
    evaluation = WorkdirEvaluation(run.step, run.trained_with, config.recipe, result)
    if distributed.is_first():
        _write(Path(workdir).expanduser() / f"evaluation-{config.recipe}.json", evaluation)
    return evaluation


def _evaluation_config(
    saved: dict, changes: dict[str, str], batch_size: int | None, batches: int | None
) -> ml_collections.ConfigDict:
    """The trained configuration with `changes`, without its schedule, on as many of this machine's devices as fit."""
    config = config_from(saved)
    config.update(changes)
    config.schedule = ""
    config = settle(config)
    if batches is not None:
        config.evaluation.batches = batches
    # The mesh that the run was trained on may not be here.
    config.batch_size = config.batch_size // config.microbatches if batch_size is None else batch_size
    config.microbatches = 1
    groups = math.gcd(config.model.moe.groups, config.batch_size)
    whole_groups = config.batch_size if groups == 1 else groups
    config.mesh = mesh_of(data=math.gcd(whole_groups, jax.device_count()))
    config.model.moe.groups = groups
    validate(config, jax.device_count())
    return config


def _check_policy_follows(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if the policy gives layers a recipe of its own, whatever the one asked for."""
    others = {recipe.name for recipe in models.linear_recipes(config).values()} - {config.recipe, "bf16"}
    if others:
        raise ValueError(
            f"the run's policy gives layers {', '.join(sorted(others))} whatever --recipe says: evaluate without it"
        )


def _write(path: Path, evaluation: WorkdirEvaluation) -> None:
    try:
        path.write_text(json.dumps(evaluation.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{evaluation}, but {path} cannot be written: {error.strerror}") from error
