"""Codes, scales and amax equal the NVFP4 reference of NVIDIA's Transformer Engine bit for bit.

The reference is the wheel's own file, run unchanged under PyTorch in a process of its own (.venv-peer, `make
test-peer`). Every mode runs on every data set; the counts are printed.
"""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import numerics
from fp4jax.numerics.hadamard import hadamard
from tests import oracle
from tests.numerics.near_ties import near_ties
from tests.oracle_candidates import four_over_six

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv-peer" / "bin" / "python"
PROCESS = Path(__file__).with_name("transformer_engine_process.py")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-peer: `make test-peer` installs it"),
]

ROW, SQUARE = {"quant_tile_shape": (1, 16)}, {"quant_tile_shape": (16, 16)}
SIX_OR_FOUR = {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256, "nvfp4_4over6_err_mode": "MSE"}
# mode → (shape of x, its dtype, axis, the reference's options). At least 30,000 blocks each.
MODES = {
    "1x16": ((512, 960), "float32", -1, ROW),
    "1x16, bfloat16": ((512, 960), "bfloat16", -1, ROW),
    "1x16, columns": ((960, 512), "float32", -2, ROW),
    "16x16": ((2048, 3840), "float32", -1, SQUARE),
    "Hadamard, columns": ((960, 512), "bfloat16", -2, ROW | {"with_rht": True}),
    "four over six": ((512, 960), "float32", -1, ROW | SIX_OR_FOUR),
    "four over six, 16x16": ((2048, 3840), "float32", -1, SQUARE | SIX_OR_FOUR),
}
MIN_BLOCKS = 30_000


def _half_integers(rng, shape):
    return (rng.integers(-12, 13, shape) / 2).astype(np.float32)


def _zero_blocks(rng, shape):
    x = rng.standard_normal(shape) * (rng.random((shape[0], shape[1] // 16)) < 0.5).repeat(16, axis=1)
    return x + 0.0  # no negative zeros: the reference drops their sign, which no value depends on


DATA = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "log-normal": lambda rng, shape: rng.lognormal(0, 3, shape) * rng.choice([-1, 1], shape),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-6,
    "half-integer": _half_integers,
    "zero": lambda rng, shape: np.zeros(shape),
    "zero blocks": _zero_blocks,
    "near ties": near_ties,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(data, mode) → (x, codes, scales, amax) of the reference; one process for all."""
    folder = tmp_path_factory.mktemp("transformer_engine")
    jobs = []
    for seed, (data, make) in enumerate(DATA.items()):
        for shape in {mode[0] for mode in MODES.values()}:
            np.save(folder / f"{data} {shape}.npy", make(np.random.default_rng(seed), shape).astype(np.float32))
        for name, (shape, dtype, axis, options) in MODES.items():
            job = {"name": f"{name} on {data}", "data": f"{data} {shape}", "dtype": dtype, "axis": axis}
            jobs.append(job | {"options": options})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([PYTHON, PROCESS, folder / "jobs.json", folder], check=True)

    def result(data, mode):
        shape, dtype, _, _ = MODES[mode]
        x = np.load(folder / f"{data} {shape}.npy")
        with np.load(folder / f"{mode} on {data}.npz") as arrays:
            return jnp.asarray(x).astype(dtype), arrays["codes"], arrays["scales"], arrays["amax"]

    return result


def count(mode, data, names, ours, theirs):
    """Prints and returns the numbers of mismatches."""
    wrong = {}
    for name, a, b in zip(names, ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        wrong[name] = int(np.sum(a != b))
    blocks = theirs[0].size * 2 // 16
    print(f"\n{mode:22} {data:13} {blocks:7,} rows of 16: mismatching {wrong}", end="")
    return wrong


def ours(mode, x):
    """(codes, scale bytes, amax) laid out as the reference's: blocks along the last axis, a scale for every row."""
    _, _, axis, options = MODES[mode]
    block = (16, 16) if options["quant_tile_shape"] == (16, 16) else None
    arguments = {"axis": axis, "block": block}
    if options.get("with_rht"):
        x = hadamard(x, axis)
    if options.get("nvfp4_use_4over6"):
        arguments |= {"format": numerics.NVFP4_256, "candidates": (6.0, 4.0)}
    q = jax.jit(lambda x: numerics.quantize(x, **arguments))(x)
    codes, scales = np.asarray(q.codes), np.asarray(q.scales)
    if axis == -2:
        codes, scales = codes.T, scales.T
    if block:
        scales = scales.repeat(16, axis=0)
    return codes, scales, np.asarray(q.amax).reshape(1)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_reference(reference, mode, data):
    x, *theirs = reference(data, mode)
    blocks = x.size // np.prod(MODES[mode][3]["quant_tile_shape"])
    assert blocks >= MIN_BLOCKS
    wrong = count(mode, data, ("codes", "scales", "amax"), ours(mode, x), theirs)
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("mode", [mode for mode in MODES if "four over six" in mode])
def test_the_oracle_of_four_over_six_equals_the_reference(reference, mode, data):
    x, *theirs = reference(data, mode)
    q = four_over_six(np.asarray(x), two_d="16x16" in mode)
    mine = oracle.pack(q.codes), q.scale_bytes[:, ::16], q.amax.reshape(1)
    wrong = count(f"oracle, {mode}", data, ("codes", "scales", "amax"), mine, theirs)
    assert not any(wrong.values()), wrong


def test_the_comparison_can_fail(reference):
    x, *theirs = reference("near ties", "1x16")
    wrong = count("times 1 + 2^-22", "near ties", ("codes", "scales", "amax"), ours("1x16", x * (1 + 2.0**-22)), theirs)
    assert all(wrong.values())
