"""Which runs a comparison has, and what it declares before the first of them."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from fp4jax.config_checks import config_differences, validate
from fp4jax.data.json_files import check_fields, one_line, parse_json
from fp4jax.recipes import recipe
from fp4jax.training.schedule import settle

DECLARATION = "declaration.json"
DECLARED = {"baseline": str, "primary": list[str] | None, "config": dict[str, Any]}
FREE = ("log", "checkpoint", "watchdog", "health", "data.prefetch")
"""Keys and groups that may differ between a comparison's runs. What a run of its own may change as well, its steps, its
validation, its mesh, would compare one thing with another here."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training; `folder` is its workdir."""

    recipe: str
    seed: int
    folder: Path


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Attributes:
    config: of every run, but for `recipe` and `seed`, which also decides the order of the data and the first weights.
    recipes: in the order of the report, `baseline` among them.
    seeds: of every recipe: runs with the same one see the same data from the same weights.
    primary: the two recipes whose difference was declared to be the question before any run, if there were such.
    workdir: holds `<recipe>/seed<seed>/` and the report.
    """

    config: ml_collections.ConfigDict
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    primary: tuple[str, str] | None
    workdir: Path

    def __post_init__(self):
        if len(self.recipes) < 2:
            raise ValueError(f"a comparison needs two recipes or more, got {', '.join(self.recipes) or 'none'}")
        for what, given in (("recipes", self.recipes), ("seeds", self.seeds)):
            twice = sorted({str(value) for value in given if given.count(value) > 1})
            if twice:
                raise ValueError(f"--{what} names {', '.join(twice)} twice")
        if not self.seeds:
            raise ValueError("a comparison needs a seed, for instance --seeds=0,1,2")
        for name in self.recipes:
            recipe(name)
        if self.baseline not in self.recipes:
            raise ValueError(f"the baseline {self.baseline!r} is not among --recipes={','.join(self.recipes)}: add it")
        if self.primary is not None:
            missing = [name for name in self.primary if name not in self.recipes]
            if missing or len(set(self.primary)) != 2:
                raise ValueError(
                    f"--primary={':'.join(self.primary)} takes two different recipes of {', '.join(self.recipes)}"
                )

    def runs(self) -> Iterator[Run]:
        """Seed by seed, so that an unfinished comparison is one of fewer seeds."""
        for seed in self.seeds:
            for name in self.recipes:
                yield Run(name, seed, self.workdir / name / f"seed{seed}")

    def config_of(self, run: Run) -> ml_collections.ConfigDict:
        """The configuration that `run` trains with.

        Raises:
          ConfigError: it cannot run.
        """
        config = ml_collections.ConfigDict(self.config)
        with config.unlocked():
            config.recipe, config.seed = run.recipe, run.seed
        validate(config)
        return settle(config).lock()

    def declaration(self) -> dict:
        """What is written before the first run and must not change after it."""
        config = self.config.to_dict() | {"recipe": self.baseline, "seed": 0}  # which a run replaces by its own
        return {"baseline": self.baseline, "primary": list(self.primary) if self.primary else None, "config": config}

    def declare(self) -> None:
        """Writes the declaration, or holds this comparison to the one that is there; recipes and seeds may be added.

        Raises:
          ValueError: the folder holds another comparison, and what differs is listed; or something else.
        """
        path = self.workdir / DECLARATION
        declared = self.declaration()
        if not path.exists():
            if self.workdir.is_dir() and any(self.workdir.iterdir()):
                raise ValueError(f"{self.workdir} holds something that is no comparison; choose another --workdir")
            self.workdir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(declared, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            return
        found = read_json(path, DECLARED)
        differing = [
            f"{key} {found[key]} → {declared[key]}" for key in ("baseline", "primary") if found[key] != declared[key]
        ]
        declared["config"]["recipe"] = found["config"].get("recipe")  # said above
        differing += config_differences(found["config"], declared["config"], FREE)
        if differing:
            raise ValueError(
                f"{self.workdir} holds a comparison that differs in: {'; '.join(differing)}; choose another --workdir"
            )


def read_json(path: Path, fields: Mapping[str, Any]) -> dict:
    """An object with fields of these types, in a file that a comparison wrote.

    Raises:
      ValueError: it is not what was written; names the file.
    """
    try:
        return check_fields(parse_json(path.read_bytes()), fields)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); restore it, or choose another --workdir") from None
