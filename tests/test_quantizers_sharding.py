"""`backend="pallas"` on a mesh of 8 devices: the bits of one device in all that is prepared, and nothing gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels.column_stats
import pallas_kernels.column_sums
import pallas_kernels.quantize
from fp4jax import dot_general, hardware, prepare
from tests import contract
from tests.contract import assert_close
from tests.pallas_kernels.sharding import in_xla
from tests.pallas_kernels.sharding.test_sharding import gathered
from tests.test_quantizers import DIMENSIONS, KERNELS

RECIPES = ["nvfp4", "nvfp4+2d", "nvfp4_hadamard", "averis", "averis_centered"]
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
CUTS = {
    "data": ((8, 1, 1), (P("data"), P(), P("data"))),
    "fsdp": ((1, 8, 1), (P("fsdp"), P("fsdp"), P("fsdp"))),
    "column parallel": ((2, 2, 2), (P(BATCH), P("fsdp", "tensor"), P(BATCH, None, "tensor"))),
    "sequence": ((4, 1, 2), (P("data", "tensor"), P(None, "tensor"), P("data", "tensor"))),
}
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def kernels_in_xla(monkeypatch):
    """Plain JAX in the place of the kernels, cut over devices as these are."""
    in_xla.install(monkeypatch)
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(pallas_kernels.quantize, "unsupported_reason", lambda device=None: None)


@functools.cache
def tensors(tokens=64):
    """X with a mean, W and D, on no device: meshes differ."""
    x, w, g = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(jax.random.split(KEY, 3), [(8, tokens, 128), (128, 64), (8, tokens, 64)], strict=True)
    )
    return jax.device_get((x + jnp.arange(128.0, dtype=jnp.bfloat16)[None, None] / 8, w, g))


def both(recipe, backend="pallas"):
    """(what is prepared, output and gradients); a new function, because the trace depends on the mesh."""
    dot = functools.partial(dot_general, dimension_numbers=DIMENSIONS, recipe=recipe, key=KEY, backend=backend)

    def run(x, w, g):
        prepared = prepare(x, recipe, key=KEY, backend=backend), prepare(w, recipe, "rhs", key=KEY, backend=backend)
        y, pull = jax.vjp(dot, x, w)
        return prepared, (y, *pull(g))

    return run


@functools.cache
def on_one_device(recipe, backend="pallas", tokens=64):
    device = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    with jax.set_mesh(device):
        return contract.jit(both(recipe, backend))(*tensors(tokens))


@pytest.mark.parametrize(
    "recipe, cut, kind",
    [
        ("nvfp4+2d", "fsdp", AxisType.Auto),
        ("averis", "data", AxisType.Auto),
        ("averis", "sequence", AxisType.Auto),
        ("nvfp4_hadamard", "column parallel", AxisType.Auto),
        ("averis_centered", "column parallel", AxisType.Explicit),
        *(pytest.param(r, c, AxisType.Auto, marks=pytest.mark.slow) for r in RECIPES for c in CUTS),
        *(pytest.param(r, c, AxisType.Explicit, marks=pytest.mark.slow) for r in RECIPES for c in ("data", "fsdp")),
    ],
    ids=str,
)
def test_equals_one_device(recipe, cut, kind):
    sizes, specs = CUTS[cut]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(kind,) * 3)
    ranks = (3, 2, 3)
    specs = [P(*spec, *[None] * (rank - len(spec))) for spec, rank in zip(specs, ranks, strict=True)]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(t, NamedSharding(mesh, s)) for t, s in zip(tensors(), specs, strict=True)]
        prepared, results = contract.jit(both(recipe))(*placed)
    assert_prepared_and_close((prepared, results), on_one_device(recipe))


def assert_prepared_and_close(got, want):
    for mine, other in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
        if mine.dtype == jnp.uint8:
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
    assert_close(got[1], want[1])


@pytest.mark.parametrize("tokens", [196, pytest.param(197, marks=pytest.mark.slow)])
def test_auto_takes_means_of_ragged_sequences_by_xla(tokens, monkeypatch):
    """The kernel of column statistics would have to cut its stretches of 8 rows between devices."""
    h100 = hardware.Hardware("gpu", "NVIDIA H100 80GB HBM3", "9.0", 8)
    monkeypatch.setattr(hardware, "current", lambda: h100)
    sizes, specs = CUTS["data"]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(t, NamedSharding(mesh, s)) for t, s in zip(tensors(tokens), specs, strict=True)]
        compiled = jax.jit(both("averis", "auto")).lower(*placed).compile()
    assert_prepared_and_close(compiled(*placed), on_one_device("averis", "auto", tokens))
    found = gathered(compiled.as_text())
    assert found and max(found) <= placed[0].size // tokens  # a sum of every sequence


def test_a_cut_batch_is_not_gathered():
    """Sums of stretches of rows are; the codes of W, which every device needs, are not cut here."""
    sizes, specs = CUTS["data"]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(t, NamedSharding(mesh, s)) for t, s in zip(tensors(), specs, strict=True)]
        program = contract.jit(both("averis")).lower(*placed).compile().as_text()
    found = gathered(program)
    assert found and max(found) <= placed[0].size // 64
