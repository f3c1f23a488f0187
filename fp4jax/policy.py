r"""Policies: which layer gets which recipe, as ordered rules; shipped ones, rules in a file, rules written out.

A policy file is JSON that a tool or a person writes:

    {"fp4jax_policy": 1,
     "provenance": {"command": "...", "loss_gap": 0.031},
     "rules": [["^layers\\.3\\.mlp\\.down_proj$", "bf16"], [".", "run"]]}

`"run"` stands for the recipe of the run (of the current phase, where there is a schedule), so one file serves many.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fp4jax.data.json_files import parse_json
from fp4jax.recipes import Recipe, as_recipe, recipe

RUN_RECIPE = "run"
"""In a policy file and in a schedule: the recipe of the run."""

FILE_SUFFIX = ".json"
FILE_VERSION = 1

_HIGH_PRECISION = "bf16"
_VERSION_KEY = "fp4jax_policy"
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Ordered rules from layer path to recipe: the first that matches wins, a layer without a match is not quantized.

    >>> policy = Policy.of(("lm_head", "bf16"), (".", "averis"))
    >>> {path: recipe.name for path, recipe in policy.assign(["layers.0.mlp.up_proj", "lm_head"]).items()}
    {'layers.0.mlp.up_proj': 'averis', 'lm_head': 'bf16'}

    Attributes:
      rules: (regular expression, recipe) pairs; the expression is searched for in paths such as
        `"layers.3.mlp.down_proj"`.
    """

    rules: tuple[tuple[str, str | Recipe], ...]

    def __post_init__(self):
        rules = tuple((pattern, as_recipe(value)) for pattern, value in self.rules)
        object.__setattr__(self, "rules", rules)
        for pattern, _ in rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"policy rule {pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def of(cls, *rules: tuple[str, str | Recipe]) -> "Policy":
        """A policy from (regular expression, recipe or its name) pairs."""
        return cls(rules)

    def recipe_for(self, path: str) -> Recipe:
        """The recipe of the layer at `path`."""
        return next((found for pattern, found in self.rules if re.search(pattern, path)), recipe(_HIGH_PRECISION))

    def assign(self, paths: Iterable[str]) -> dict[str, Recipe]:
        """The recipe of every layer.

        Raises:
          ValueError: a rule whose expression no path matches; it is most likely misspelt.
        """
        paths = list(paths)
        for pattern, _ in self.rules:
            if not any(re.search(pattern, path) for path in paths):
                example = f", for example {paths[0]!r}" if paths else ""
                raise ValueError(f"policy rule {pattern!r} matches none of the {len(paths)} linear layers{example}")
        return {path: self.recipe_for(path) for path in paths}


@dataclasses.dataclass(frozen=True)
class PolicyFile:
    """Rules that name recipes, and where they come from: what a policy file holds.

    >>> file = PolicyFile((("down_proj", "bf16"), (".", "run")), {"command": "by hand"})
    >>> file.policy("averis").recipe_for("layers.0.self_attn.o_proj").name
    'averis'

    Attributes:
      rules: (regular expression, recipe name or `RUN_RECIPE`) pairs, in order; at least one.
      provenance: anything JSON can hold that says how the rules were found: the command, the checkpoint, scores.

    Raises:
      ValueError: no rules, a bad regular expression, an unknown recipe.
    """

    rules: tuple[tuple[str, str], ...]
    provenance: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.rules:
            raise ValueError("a policy needs at least one rule, for example ['.', 'run']")
        for pattern, name in self.rules:
            if name.startswith(f"{RUN_RECIPE}+"):
                raise ValueError(f"policy rule {pattern!r} has recipe {name!r}; {RUN_RECIPE!r} takes no variants here")
        self.policy(_HIGH_PRECISION)

    def policy(self, recipe: str | Recipe) -> Policy:
        """The rules with the run's recipe put in."""
        return Policy(tuple((pattern, recipe if name == RUN_RECIPE else name) for pattern, name in self.rules))

    @property
    def text(self) -> str:
        """The rules alone as JSON: what `config.policy` may hold instead of a file's name."""
        return json.dumps(self.rules)

    def save(self, path: str | Path) -> None:
        """Writes the file, one rule a line.

        Raises:
          ValueError: a name that does not end in `.json`, by which `config.policy` knows a file, or provenance that
            is not JSON.
        """
        path = Path(path)
        if path.suffix != FILE_SUFFIX:
            raise ValueError(f"policy file {path} must end in {FILE_SUFFIX}")
        try:
            provenance = json.dumps(dict(self.provenance), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance of policy file {path} is not JSON: {error}") from None
        rules = ",\n  ".join(json.dumps(rule) for rule in self.rules)
        path.write_text(
            f'{{"{_VERSION_KEY}": {FILE_VERSION},\n "provenance": {provenance},\n "rules": [\n  {rules}\n ]}}\n',
            encoding="utf-8",
        )

    @classmethod
    def load(cls, path: str | Path) -> "PolicyFile":
        """Reads a file.

        Raises:
          ValueError: a file that cannot be read or is no policy, in one line.
        """
        try:
            content = parse_json(Path(path).expanduser().read_bytes())
        except OSError as error:
            raise ValueError(f"policy file {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"policy file {path} is not JSON: {error}") from None
        keys = (_VERSION_KEY, "provenance", "rules")
        if not isinstance(content, dict) or set(content) != set(keys):
            found = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise ValueError(f"policy file {path} must have exactly the keys {', '.join(keys)}; it has {found}")
        version, provenance, rules = (content[key] for key in keys)
        if version != FILE_VERSION:
            raise ValueError(f"policy file {path} is of version {version!r}; this code reads version {FILE_VERSION}")
        if not isinstance(provenance, dict) or not isinstance(rules, list):
            raise ValueError(f"policy file {path}: provenance must be an object and rules a list")
        try:
            return cls(_rules(rules), provenance)
        except ValueError as error:
            raise ValueError(f"policy file {path}: {error}") from None


def policy(name: str, recipe: str | Recipe, paths: Iterable[str]) -> Policy:
    """The policy that `config.policy` names, with the run's recipe put in.

    Args:
      name: `"all_linear"`: every linear layer (arXiv 2603.10444); `"nvidia"`: the first and last blocks in high
        precision (arXiv 2509.25149); the name of a policy file, which ends in `.json`; or the rules themselves as
        JSON, `'[["mlp", "run"], [".", "bf16"]]'`.
      recipe: the run's.
      paths: of all linear layers of the model; what a policy keeps may depend on the number of blocks.

    Raises:
      ValueError: an unknown name, a bad file or rule, a model that the policy cannot be applied to.
    """
    value = as_recipe(recipe)
    if name in _POLICIES:
        return _POLICIES[name](value, tuple(paths))
    return _written(name).policy(value)


def self_contained(name: str) -> str:
    """`config.policy` without a reference to a file: the rules of a policy file as JSON, anything else as it is.

    A run stores this, so that it resumes and evaluates under the rules it started with, whatever becomes of the file.

    Raises:
      ValueError: an unknown name, a bad file or rule.
    """
    return name if name in _POLICIES else _written(name).text


def as_policy(value: Policy | str | Recipe) -> Policy:
    """A policy as it is; a recipe or its name as the policy that gives it to every linear layer."""
    return value if isinstance(value, Policy) else Policy.of((".", value))


def describe(assigned: Mapping[str, Recipe]) -> str:
    """`"averis in 161 of 196 linear layers, bf16 in 35"`, the most frequent recipe first."""
    counts = Counter(found.name for found in assigned.values()).most_common()
    (first, count), *others = counts
    rest = "".join(f", {name} in {number}" for name, number in others)
    return f"{first} in {count:,} of {len(assigned):,} linear layers{rest}"


def _rules(content: list) -> tuple[tuple[str, str], ...]:
    """Rules as JSON has them."""
    for number, rule in enumerate(content, 1):
        if not (isinstance(rule, list) and len(rule) == 2 and all(isinstance(part, str) for part in rule)):
            raise ValueError(
                f"policy rule {number} is {json.dumps(rule)}; a rule is [regular expression, recipe or {RUN_RECIPE!r}]"
            )
    return tuple((pattern, name) for pattern, name in content)


def _written(name: str) -> PolicyFile:
    """Rules from a file or from JSON text."""
    if name.endswith(FILE_SUFFIX):
        return PolicyFile.load(name)
    if name.startswith("["):
        try:
            rules = parse_json(name)
        except ValueError as error:
            raise ValueError(f"policy={name!r} is not JSON: {error}") from None
        return PolicyFile(_rules(rules))
    raise ValueError(
        f"unknown policy {name!r}; known: {', '.join(_POLICIES)}, a policy file (its name ends in {FILE_SUFFIX}), "
        """or rules such as '[["mlp", "run"]]'"""
    )


def _all_linear(recipe: Recipe, paths: tuple[str, ...]) -> Policy:
    del paths
    return Policy.of((".", recipe))


def _nvidia(recipe: Recipe, paths: tuple[str, ...]) -> Policy:
    """The first 2 and last 8 of 62 blocks in high precision, in proportion to the number of blocks.

    10/62 of the blocks (16 %), rounded, at least one; a fifth of them, rounded down, are the first ones. At 62 blocks
    that is the published choice (arXiv 2509.25149, which finds that the last blocks matter most), of 28 to 34 the first
    and the last 4, of 16 to 21 the last 3.
    """
    blocks = sorted({int(found[1]) for found in map(_BLOCK.search, paths) if found})
    if len(blocks) < 2:
        raise ValueError(
            f"policy 'nvidia' keeps the last blocks in high precision and this model has {len(blocks)}: "
            "nothing would be quantized; use policy='all_linear'"
        )
    kept = max(1, round(len(blocks) * 10 / 62))
    first = kept // 5
    high_precision = blocks[:first] + blocks[len(blocks) - (kept - first) :]
    pattern = rf"(^|\.)layers\.({'|'.join(map(str, high_precision))})\."
    return Policy.of((pattern, _HIGH_PRECISION), (".", recipe))


_POLICIES: dict[str, Callable[[Recipe, tuple[str, ...]], Policy]] = {"all_linear": _all_linear, "nvidia": _nvidia}
