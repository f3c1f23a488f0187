"""The schedule of recipes: a run in phases, each with its own compiled step.

`config.schedule` is a list of phases "RECIPE:END", for example "bf16:1%,run:80%,run+fwd_bf16:100%". END is the
phase's last step, as a share of the run's steps or as a number; "run" stands for `config.recipe`. Which phase a step
belongs to depends on its number and the configuration alone, so a resumed run is where the uninterrupted one was.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import ml_collections

from fp4jax import models
from fp4jax.config import ConfigError, config_from
from fp4jax.policy import RUN_RECIPE, self_contained
from fp4jax.recipes import Recipe, recipe

_PHASE = re.compile(r"([^:]+):(?:(\d+(?:\.\d+)?)%|(\d+))")
_FORM = 'RECIPE:END, END in percent of the steps or a step number, for example "bf16:1%,run:100%"'


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `last`, counted from 1 and both included, under `recipe`; `number` counts phases from 1."""

    number: int
    recipe: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"steps {self.first:,} to {self.last:,}: {self.recipe}"


def phases(config: ml_collections.ConfigDict) -> tuple[Phase, ...]:
    """The phases of a run, in order; together they hold every step once. Without a schedule there is one.

    A share that is no whole number of steps is rounded up, so that a short phase keeps a step in a short run.

    Raises:
      ConfigError: an unknown recipe; a phase of another form, or that holds no step; phases out of order; a schedule
        that ends before or after the run, or that never uses `config.recipe`.
    """
    if not config.schedule:
        _check_recipe(config.recipe, f"recipe={config.recipe!r}")
        return (Phase(1, config.recipe, 1, config.steps),)
    found, uses_run = [], False
    for number, text in enumerate(config.schedule.split(","), 1):
        text = text.strip()
        name, last = _parse(text, config.steps)
        base, plus, variants = name.partition("+")
        uses_run |= base == RUN_RECIPE
        name = config.recipe + plus + variants if base == RUN_RECIPE else name
        _check_recipe(name, f"schedule phase {text!r}")
        first = found[-1].last + 1 if found else 1
        if last < first:
            raise ConfigError(
                f"schedule phase {text!r} ends at step {last:,}, where the phase before it has already ended "
                f"(step {first - 1:,} of {config.steps:,}); give every phase a later end than the one before it"
            )
        found.append(Phase(number, name, first, last))
    if found[-1].last < config.steps:
        raise ConfigError(
            f"schedule={config.schedule!r} ends at step {found[-1].last:,} of {config.steps:,}; "
            "let its last phase end at 100%"
        )
    if not uses_run and config.recipe not in {phase.recipe for phase in found}:
        raise ConfigError(
            f"schedule={config.schedule!r} never uses recipe={config.recipe!r}; "
            f"set recipe to one of the schedule's, or write {RUN_RECIPE!r} in the schedule for it"
        )
    return tuple(found)


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase that optimizer step `step` (from 1) belongs to."""
    return next(phase for phase in phases if phase.first <= step <= phase.last)


def config_of(config: ml_collections.ConfigDict, phase: Phase) -> ml_collections.ConfigDict:
    """The configuration as it is within one phase: its recipe, and no schedule."""
    config = copy.deepcopy(config)
    config.recipe, config.schedule = phase.recipe, ""
    return config


def settle(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy with nothing left to look up: a policy file replaced by its rules. This is what checkpoints store.

    A schedule that ends at the last step's number ends at 100% from here on, so that the run can be made longer.

    Raises:
      ConfigError: a schedule or a recipe that cannot run.
      ValueError: a policy that is unknown, cannot be read or does not fit the model.
    """
    config = copy.deepcopy(config)
    config.policy = self_contained(config.policy)
    for phase in phases(config):
        _check_shards(config, models.linear_recipes(config_of(config, phase)).values())
    if config.schedule:
        *others, last = (text.strip() for text in config.schedule.split(","))
        config.schedule = ",".join([*others, f"{last.partition(':')[0]}:100%"])
    return config


class ByPhase[T]:
    """What is compiled for each phase, made when a step first needs it.

    A run goes through its phases once, so what belongs to a phase that is over is let go before the next is made.
    """

    def __init__(self, config: ml_collections.ConfigDict, make: Callable[[ml_collections.ConfigDict], T]):
        """`make` gets the configuration of one phase."""
        self._phases, self._config, self._make = phases(config), config, make
        self._current: tuple[Phase, T] | None = None

    def at(self, step: int) -> T:
        """What serves optimizer step `step` (from 1)."""
        phase = phase_at(self._phases, step)
        if self._current is None or self._current[0] != phase:
            self._current = None
            self._current = phase, self._make(config_of(self._config, phase))
        return self._current[1]


def _parse(text: str, steps: int) -> tuple[str, int]:
    """(recipe, last step) of one phase."""
    match = _PHASE.fullmatch(text)
    if not match:
        raise ConfigError(f"schedule phase {text!r} is not of the form {_FORM}")
    name, percent, step = match.groups()
    share = Fraction(percent) / 100 if percent else Fraction(int(step), steps)
    if not 0 < share <= 1:
        accepted = "above 0% and at most 100%" if percent else f"from 1 to {steps:,} (steps), or in percent"
        raise ConfigError(f"schedule phase {text!r} must end {accepted}")
    return name, math.ceil(share * steps)


def _check_recipe(name: str, where: str) -> None:
    try:
        recipe(name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_shards(config: ml_collections.ConfigDict, recipes: Iterable[Recipe]) -> None:
    """Whether the sequences that a layer sees at once divide into the shards of its recipe."""
    rows = config.batch_size // config.microbatches
    for found in recipes:
        if found.shards is not None and config.model.sequence_sharding:
            raise ConfigError(
                f"recipe {found.name!r} has statistics of each shard's own, which model.sequence_sharding has not: use "
                "one of the two"
            )
        if found.shards is not None and rows % found.shards:
            raise ConfigError(
                f"recipe {found.name!r} cuts the sequences of a microbatch into {found.shards} shards, and there are "
                f"{rows} (batch_size / microbatches); use batch_size={found.shards * config.microbatches} or a "
                f"multiple, or shards{math.gcd(rows, found.shards)}"
            )


def recipe_at(saved: Mapping | ml_collections.ConfigDict, step: int) -> str:
    """The recipe that optimizer step `step` of a run with this configuration was trained with."""
    return phase_at(phases(config_from(saved)), step).recipe
