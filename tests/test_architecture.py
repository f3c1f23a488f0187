"""The rules of docs/architecture.md, read from the sources with `ast`.

Each rule is a function from a checkout's root to a list of violations, and is shown below to find what it forbids.
A new room is a new row of LEVELS.
"""

import ast
import functools
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fp4jax import recipes

# Rooms, from the ground up. A module belongs to the longest prefix; an import may point to its own level or below.
LEAF = -1
LEVELS = {
    "fp4jax.data": LEAF,
    "fp4jax.data.prepare": LEAF,
    "fp4jax.data.tokenizer": LEAF,
    "fp4jax.cli": LEAF,
    "fp4jax.locking": LEAF,
    "fp4jax.hardware": LEAF,
    "fp4jax.axes": LEAF,
    "fp4jax.config": LEAF,
    "fp4jax.config_checks": LEAF,
    "fp4jax.layout": LEAF,
    "fp4jax.provenance": LEAF,
    "configs": LEAF,
    "fp4jax.numerics": 0,
    "fp4jax.recipe_types": 1,
    "fp4jax.recipes": 1,
    "fp4jax.shards": 1,
    "pallas_kernels": 1,
    "fp4jax.dot": 2,
    "fp4jax.canonical": 2,
    "fp4jax.dot_checks": 2,
    "fp4jax.column_sums": 2,
    "fp4jax.operands": 2,
    "fp4jax.quantizers": 2,
    "fp4jax.explicit": 2,
    "fp4jax.gemm": 2,
    "fp4jax.native": 2,
    "fp4jax.fused": 2,
    "fp4jax.scopes": 2,
    "fp4jax.batching": 2,
    "fp4jax.statistics": 2,
    "fp4jax.equation": 3,
    "fp4jax.ragged": 3,
    "fp4jax.intercept": 3,
    "fp4jax.origins": 3,
    "fp4jax.equinox": 3,
    "fp4jax.linen": 3,
    "fp4jax.nnx": 3,
    "fp4jax.nnx_call": 3,
    "fp4jax.policy": 3,
    "fp4jax.reporting": 3,
    "fp4jax.checkpoint": 4,
    "fp4jax.checksums": 4,
    "fp4jax.retention": 4,
    "fp4jax.distributed": LEAF,
    "fp4jax.models": 4,
    "fp4jax.models.convert": 6,
    "fp4jax.generation": 4,
    "fp4jax.training": 5,
    "fp4jax.evaluation": 5,
    "fp4jax.analysis": 5,
    "fp4jax.comparison": 5,
    "fp4jax.compare": 6,
    "fp4jax.analyze": 6,
    "fp4jax.plan": 6,
    "fp4jax.sample": 6,
    "fp4jax.testing": 6,
    "benchmarks": 7,
    "train": 7,
    "eval": 7,
}
# Rooms that may import only these of ours, whatever the levels say.
ONLY_IMPORTS = {
    "fp4jax.data": {"fp4jax.data"},
    "fp4jax.data.prepare": {"fp4jax.data", "fp4jax.data.prepare", "fp4jax.config", "fp4jax.cli", "fp4jax.locking"},
    "fp4jax.data.tokenizer": {"fp4jax.data", "fp4jax.config", "fp4jax.cli"},
    "fp4jax.cli": set(),
    "fp4jax.locking": set(),
    "fp4jax.distributed": set(),
    "fp4jax.provenance": set(),
    "fp4jax.config": {"fp4jax.axes", "fp4jax.config"},
    "fp4jax.config_checks": {"fp4jax.axes", "fp4jax.config", "fp4jax.config_checks"},
    "fp4jax.layout": {"fp4jax.axes", "fp4jax.layout"},
    "configs": {"configs", "fp4jax.config"},
    "pallas_kernels": {"pallas_kernels", "fp4jax.numerics"},
}
CONFIG_LIBRARIES = {"ml_collections"}
KERNEL_IMPORTERS = {"fp4jax.quantizers", "fp4jax.fused", "fp4jax.native", "benchmarks"}
SCRIPTS = ("train", "eval")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_FUNCTION_LINES = 120  # pallas_kernels/*/kernel.py
MAX_SCRIPT_LINES = 60


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str | None:
        return room_of(self.name)

    def imports(self) -> Iterator[tuple[str, int]]:
        """(imported name, line) of every import, inside functions too; `from a import b` gives a.b."""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parents, *([base] if base else [])])
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
            elif isinstance(node, ast.Call) and _called_name(node) in {"import_module", "__import__"}:
                yield from ((argument.value, node.lineno) for argument in node.args[:1] if _is_string(argument))


@functools.cache
def modules(root: Path) -> dict[str, Module]:
    """Every module of ours under `root` by its dotted name."""
    paths = [
        path
        for top in ("fp4jax", "pallas_kernels", "configs", "benchmarks")
        for path in sorted((root / top).rglob("*.py"))
    ]
    paths += [path for path in (root / f"{script}.py" for script in SCRIPTS) if path.exists()]
    found = {}
    for path in paths:
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(text, str(path)), len(text.splitlines()))
    return found


def room_of(name: str) -> str | None:
    """The row of the table that a module or an imported name belongs to; None for other people's packages."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LEVELS), None)


def module_of(root: Path, imported: str) -> str | None:
    """The module that `imported` is, or is a name in; None if there is no such module under `root`."""
    return next((name for name in (imported, imported.rpartition(".")[0]) if name in modules(root)), None)


def is_ours(name: str) -> bool:
    return name.split(".")[0] in {"fp4jax", "pallas_kernels", "configs", "benchmarks", *SCRIPTS}


def unplaced_modules(root: Path) -> list[str]:
    """A module that stands in no room."""
    placed = (module for module in modules(root).values() if module.name != "fp4jax")
    return [f"{module.name}: in no row of LEVELS" for module in placed if module.room is None]


def upward_imports(root: Path) -> list[str]:
    """An import of a higher level, of a room that this room may not use, or of the table of contents."""
    found = []
    for module in modules(root).values():
        for target, line in module.imports():
            if not is_ours(target) or module.room is None:
                continue
            where, room = f"{module.name}:{line} imports {target}", room_of(target)
            if room is None:
                from_contents = module_of(root, target) in {None, "fp4jax"}
                if from_contents and LEVELS[module.room] < LEVELS["train"]:
                    found.append(f"{where}: inside the packages, import from the module that defines it")
            elif LEVELS[room] > LEVELS[module.room]:
                found.append(f"{where}: that is up, from level {LEVELS[module.room]} to {LEVELS[room]}")
            elif room not in ONLY_IMPORTS.get(module.room, LEVELS):
                found.append(f"{where}: {module.room} may import only {sorted(ONLY_IMPORTS[module.room])} of ours")
    return found


def import_cycles(root: Path) -> list[str]:
    """Modules that import one another in a circle."""
    graph = {}
    for module in modules(root).values():
        targets = {module_of(root, name) for name, _ in module.imports()}
        graph[module.name] = targets - {None, module.name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["import cycle: " + " → ".join(reversed(error.args[1]))]
    return []


def kernel_importers(root: Path) -> list[str]:
    """An importer of pallas_kernels other than what the dot chooses from, and what measures them."""
    return [
        f"{module.name}:{line} imports {target}; only {sorted(KERNEL_IMPORTERS)} may"
        for module in modules(root).values()
        for target, line in module.imports()
        if room_of(target) == "pallas_kernels" and module.room != "pallas_kernels"
        if module.room not in KERNEL_IMPORTERS
    ]


def foreign_imports_of_configs(root: Path) -> list[str]:
    """A config that imports anything but ml_collections, fp4jax.config and other configs."""
    return [
        f"{module.name}:{line} imports {target}; configs hold values"
        for module in modules(root).values()
        for target, line in module.imports()
        if module.room == "configs" and not is_ours(target) and target.split(".")[0] not in CONFIG_LIBRARIES
    ]


def long_files(root: Path) -> list[str]:
    found = []
    for module in modules(root).values():
        limit = MAX_SCRIPT_LINES if module.name in SCRIPTS else MAX_FILE_LINES
        if module.lines > limit:
            found.append(f"{module.name}: {module.lines} lines, at most {limit}")
    return found


def long_functions(root: Path) -> list[str]:
    found = []
    for module in modules(root).values():
        in_kernel = module.room == "pallas_kernels" and module.path.name == "kernel.py"
        limit = MAX_KERNEL_FUNCTION_LINES if in_kernel else MAX_FUNCTION_LINES
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > limit:
                    found.append(f"{module.name}:{node.lineno} {node.name}: {length} lines, at most {limit}")
    return found


def string_logic_in_products(root: Path) -> list[str]:
    """A recipe's name, or a comparison with a string, in the rooms of the quantized products (level 2)."""
    recipe_names = set(recipes.list_recipes())
    found = []
    for module in modules(root).values():
        if LEVELS.get(module.room) != 2:
            continue
        for node in ast.walk(module.tree):
            where = f"{module.name}:{getattr(node, 'lineno', 0)}"
            if _is_string(node) and recipe_names & set(node.value.split("+")):
                found.append(f"{where} names a recipe: {node.value!r}")
            elif any(map(_is_string, _compared(node))):
                found.append(f"{where} compares with a string: {ast.unparse(node)}")
    return found


def _compared(node: ast.AST) -> list[ast.AST]:
    """What a comparison or a case compares, containers opened."""
    if isinstance(node, ast.MatchValue):
        return [node.value]
    if not isinstance(node, ast.Compare):
        return []
    operands = [node.left, *node.comparators]
    return operands + [e for o in operands if isinstance(o, ast.Tuple | ast.List | ast.Set) for e in o.elts]


def _called_name(node: ast.Call) -> str | None:
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


RULES = (
    unplaced_modules,
    upward_imports,
    import_cycles,
    kernel_importers,
    foreign_imports_of_configs,
    long_files,
    long_functions,
    string_logic_in_products,
)


@pytest.mark.parametrize("rule", RULES)
def test_checkout_keeps_the_rule(rule):
    violations = rule(Path(__file__).resolve().parent.parent)
    assert not violations, "\n" + "\n".join(violations)


# A small checkout that keeps every rule, and one violation for every way to break one.
LONG_KERNEL = "def kernel():\n" + "    pass\n" * 119
GOOD = {
    "fp4jax/__init__.py": "",
    "fp4jax/numerics/__init__.py": "from fp4jax.numerics.formats import NVFP4\n",
    "fp4jax/numerics/formats.py": "import jax\nNVFP4 = 4\n",
    "fp4jax/numerics/rounding.py": "from . import formats\nfrom .formats import NVFP4\n",
    "fp4jax/config.py": "import ml_collections\n",
    "fp4jax/recipes.py": "from fp4jax import numerics\n",
    "fp4jax/dot.py": "def f(n, d):\n    return d['gain'] if n > 2 else 0\n",
    "fp4jax/quantizers.py": "def f():\n    import pallas_kernels.quantize.api\n",
    "fp4jax/models/__init__.py": "from fp4jax import dot\n",
    "pallas_kernels/quantize/api.py": "from fp4jax.numerics import NVFP4\n",
    "pallas_kernels/quantize/kernel.py": LONG_KERNEL,
    "configs/tiny.py": "from fp4jax.config import default_config\nfrom configs import base\n",
    "configs/base.py": "import ml_collections\n",
    "train.py": "import fp4jax\nfrom fp4jax import models\n",
}
BAD = {
    "no room": (unplaced_modules, {"fp4jax/utils.py": ""}),
    "up": (upward_imports, {"fp4jax/recipes.py": "import fp4jax.dot\n"}),
    "up, from": (upward_imports, {"fp4jax/numerics/bits.py": "from fp4jax import recipes\n"}),
    "up, relative": (upward_imports, {"fp4jax/numerics/bits.py": "from ..recipes import Recipe\n"}),
    "up, relative in a package": (upward_imports, {"fp4jax/models/__init__.py": "from .. import training\n"}),
    "up, in a function": (upward_imports, {"fp4jax/dot.py": "def f():\n    from fp4jax.models import build\n"}),
    "up, dynamic": (upward_imports, {"fp4jax/dot.py": "import importlib\nimportlib.import_module('fp4jax.nnx')\n"}),
    "up, from a leaf": (upward_imports, {"fp4jax/data/rows.py": "from fp4jax.numerics import bits\n"}),
    "up, to a script": (upward_imports, {"fp4jax/training/loop.py": "import train\n"}),
    "leaf to leaf": (upward_imports, {"fp4jax/config.py": "import fp4jax.data\n"}),
    "kernel to recipes": (upward_imports, {"pallas_kernels/quantize/api.py": "import fp4jax.recipes\n"}),
    "table of contents": (upward_imports, {"fp4jax/models/__init__.py": "from fp4jax import dot_general\n"}),
    "bare package": (upward_imports, {"pallas_kernels/quantize/api.py": "import fp4jax\n"}),
    "cycle": (import_cycles, {"fp4jax/numerics/formats.py": "from fp4jax.numerics import rounding\n"}),
    "cycle through a package": (import_cycles, {"fp4jax/numerics/formats.py": "from fp4jax.numerics import NVFP4\n"}),
    "kernels from models": (kernel_importers, {"fp4jax/models/__init__.py": "import pallas_kernels.quantize\n"}),
    "kernels from a script": (kernel_importers, {"train.py": "from pallas_kernels import quantize\n"}),
    "config imports jax": (foreign_imports_of_configs, {"configs/tiny.py": "import jax\n"}),
    "config imports numerics": (upward_imports, {"configs/tiny.py": "from fp4jax import numerics\n"}),
    "long file": (long_files, {"fp4jax/dot.py": "x = 1\n" * 401}),
    "long kernel file": (long_files, {"pallas_kernels/quantize/kernel.py": "x = 1\n" * 401}),
    "long script": (long_files, {"eval.py": "x = 1\n" * 61}),
    "long function": (long_functions, {"fp4jax/dot.py": "def f():\n" + "    pass\n" * 60}),
    "long method": (long_functions, {"fp4jax/dot.py": "class A:\n  def f():\n" + "    pass\n" * 60}),
    "long function beside a kernel": (long_functions, {"pallas_kernels/quantize/api.py": LONG_KERNEL}),
    "long kernel": (long_functions, {"pallas_kernels/quantize/kernel.py": "def f():\n" + "    pass\n" * 120}),
    "recipe name": (string_logic_in_products, {"fp4jax/dot.py": "special = ['averis+nearest']\n"}),
    "string equality": (string_logic_in_products, {"fp4jax/dot.py": "a = backend == 'xla'\n"}),
    "string membership": (string_logic_in_products, {"fp4jax/gemm.py": "a = backend in ('auto', 'xla')\n"}),
    "string in": (string_logic_in_products, {"fp4jax/gemm.py": "a = 'hadamard' in name\n"}),
    "string case": (string_logic_in_products, {"fp4jax/dot.py": "match a:\n  case 'xla': pass\n"}),
}  # fmt: skip


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES)
def test_rule_accepts_a_good_tree(rule, tmp_path):
    assert rule(write_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "files"), BAD.values(), ids=BAD)
def test_rule_finds_its_violation(rule, files, tmp_path):
    violations = rule(write_tree(tmp_path, GOOD | files))
    assert len(violations) == 1, violations


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, _ in BAD.values()} == set(RULES)
