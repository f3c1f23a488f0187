"""Tests are stricter than production: shapes and types are checked at run time, JAX promotes neither dtypes nor ranks
by itself, warnings are errors (pyproject.toml). A test of code that calls a library which needs the standard
promotion says so: `@pytest.mark.standard_promotion`.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook below finds it by name

# Every function of fp4jax checks its annotations, shapes included. Installed before fp4jax is first imported.
install_import_hook("fp4jax", "tests.typecheck.check")

# Tracing makes many small objects and few cycles: by its usual thresholds Python would spend a twelfth of the time of
# the tests on looking through all of them.
gc.set_threshold(10_000, 20, 20)

jax.config.update("jax_num_cpu_devices", 8)  # meshes, on any machine
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("standard_promotion") is None:
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _few_maps() -> Iterator[None]:
    """Every program that XLA compiles for the CPU maps memory. At the kernel's limit, by default 65,530 mappings of a
    process, its compiler crashes; a test process that lives through hundreds of modules' programs gets there.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and jax.default_backend() != "gpu":
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU, JAX has {jax.default_backend()}"))
