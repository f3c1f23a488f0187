"""Is the wheel what a user needs? `make test-wheel` builds it and tries it in an empty environment.

The wheel and what it asks for are installed, at the versions of requirements.txt, into a new environment in a temporary
folder. There, outside of the checkout:

- every public name of fp4jax resolves (`fp4jax.equinox`, which needs a package of its own, apart), and the data that is
  shipped is read;
- README.md's first example in Python runs as it is printed;
- importing fp4jax costs less than LIMIT seconds beyond JAX and Flax: with all that a model of one's own uses.

The dependencies are really installed and not borrowed from .venv: one that pyproject.toml forgets is found so.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fp4jax", "pallas_kernels")
LIMIT = 0.3  # seconds of one CPU, which other work on the machine hardly changes
TRIES = 3

USED = ("dot_general", "einsum", "ragged_dot", "quantize", "recipe", "Policy", "report", "linen", "nnx")
IMPORTING = f"""
import json, time
import jax, flax.linen, flax.nnx
began = time.perf_counter(), time.process_time()
import fp4jax
alone = time.process_time() - began[1]
for name in {USED}:
    getattr(fp4jax, name)
print(json.dumps([alone, time.process_time() - began[1], time.perf_counter() - began[0]]))
"""

PUBLIC = """
import fp4jax
for name in fp4jax.__all__:
    if name != "equinox":
        getattr(fp4jax, name)
config = fp4jax.config.default_config().data
rows = fp4jax.data.held_out_text(config, fp4jax.data.load_tokenizer(config.tokenizer), seq_len=64, rows=5)
print(f"{fp4jax.__file__}: {len(fp4jax.__all__)} public names, {rows.tokens.size} tokens of the corpus that is shipped")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command.

    Raises:
      SystemExit: it failed; with what it wrote to both streams.
    """
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"check_wheel: {' '.join(map(str, command))[:200]} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel, built from a copy of the sources: setuptools keeps what an earlier build left in the checkout."""
    sources, wheels = folder / "sources", folder / "wheels"
    sources.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, sources / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, sources, cwd=folder)
    (wheel,) = wheels.iterdir()
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment that holds the wheel and what it asks for."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "requirements.txt", wheel, cwd=folder)
    return python


def first_example() -> str:
    """README.md's first block of Python."""
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def main() -> None:
    """Builds, installs, tries and measures; exits with what went wrong."""
    with tempfile.TemporaryDirectory(prefix="fp4jax-wheel-") as name:
        folder = Path(name)
        began = time.perf_counter()
        wheel = build(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, built in {time.perf_counter() - began:.0f} s")
        began = time.perf_counter()
        python = install(wheel, folder)
        print(f"installed with its dependencies in {time.perf_counter() - began:.0f} s")
        print(run(python, "-c", PUBLIC, cwd=folder), end="")
        example = first_example()
        print(f"README.md's example runs:\n{run(python, '-c', example, cwd=folder)}", end="")
        costs = [json.loads(run(python, "-c", IMPORTING, cwd=folder)) for _ in range(TRIES)]
        alone, cpu, wall = min(costs, key=lambda cost: cost[1])
        print(f"import beyond JAX and Flax: {alone:.4f} s; with {', '.join(USED)}: {cpu:.3f} s of CPU, {wall:.3f} s")
        if cpu >= LIMIT:
            raise SystemExit(f"check_wheel: importing fp4jax costs {cpu:.3f} s beyond JAX and Flax, over {LIMIT} s")


if __name__ == "__main__":
    main()
