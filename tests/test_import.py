"""The table of contents in fp4jax/__init__.py is true, and costs nothing to open."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fp4jax

PACKAGE = Path(fp4jax.__file__).parent
OPTIONAL = {"equinox"}  # public modules of which each needs the package of its name


def run_python(code: str) -> str:
    """Output of `code` in a fresh interpreter in the checkout."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=PACKAGE.parent, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_importing_fp4jax_loads_neither_jax_nor_flax():
    code = "import sys, fp4jax; print(*{'jax', 'jaxlib', 'flax', 'numpy'} & set(sys.modules))"
    assert run_python(code).strip() == ""


def test_what_a_model_of_ones_own_uses_loads_no_heavy_package():
    """Neither optax, which flax loads, nor orbax, grain, tensorflow_datasets, matplotlib: nothing but jaxtyping."""
    code = """
import sys, jax, flax.linen, flax.nnx
before = set(sys.modules)
import fp4jax
for name in (*fp4jax._DEFINED_IN, "linen", "nnx"):
    getattr(fp4jax, name)
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    assert set(run_python(code).split()) - {"jax"} == {"fp4jax", "jaxtyping"}


@pytest.mark.parametrize("name", fp4jax.__all__)
def test_public_name_resolves(name):
    if name in OPTIONAL:
        pytest.importorskip(name)
    value = getattr(fp4jax, name)
    if name in fp4jax._MODULES:
        assert value is importlib.import_module(f"fp4jax.{name}")


@pytest.mark.parametrize("name", fp4jax._DEFINED_IN)
def test_no_module_hides_a_public_name(name):
    # Importing fp4jax/quantize.py would put that module where users expect the function `fp4jax.quantize`.
    assert not (PACKAGE / f"{name}.py").exists()
    assert not (PACKAGE / name).exists()


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        fp4jax.no_such_name


def test_dir_lists_the_public_names():
    assert set(fp4jax.__all__) == set(dir(fp4jax))


@pytest.mark.parametrize("module", ["fp4jax.numerics", "fp4jax.config", "fp4jax.data"])
def test_module_loads_by_itself(module):
    """Each ground-level package imports alone, in a fresh interpreter: no circle through the table of contents."""
    run_python(f"import {module}")
