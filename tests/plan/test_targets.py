"""Names of machines, and what is said where their compiler is missing."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fp4jax.plan import targets

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "is_gpu", "topology"),
    [
        ("h200:1", True, "1x1x1"), ("b200:8", True, "1x8x1"),
        ("v5e:4x4", False, "v5e:4x4"), ("v4:2x2x1", False, "v4:2x2x1"),
    ],
)  # fmt: skip
def test_names(name, is_gpu, topology):
    target = targets.parse(name)
    assert (target.name, target.is_gpu, target.topology) == (name, is_gpu, topology)
    assert target.kind == name.partition(":")[0]


@pytest.mark.parametrize("name", ["h200", "h200:0", "h200:2x2", "h300:1", "v5e:4", "v5e", "", "tpu:4x4", "v5e:0x4"])
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match=rf"unknown target '{name}'; accepted: .*b200:1, h200:1.*v5e:4x4") as raised:
        targets.parse(name)
    assert "\n" not in str(raised.value)


# The two GPUs differ in all of these, and XLA decides by these: tiles by cores, schedules by memory and bandwidth.
FACTS = {
    "b200": {
        "core_count": 148, "device_memory_size": 191_514_411_008, "l2_cache_size": 132_644_864,
        "memory_bandwidth": 7.67e12, "clock_rate_ghz": 1.965, "major": 10,
    },
    "h200": {
        "core_count": 132, "device_memory_size": 151_397_597_184, "l2_cache_size": 52_428_800,
        "memory_bandwidth": 4.8e12, "clock_rate_ghz": 1.98, "major": 9,
    },
}  # fmt: skip


def test_every_gpu_that_is_described_is_checked():
    assert targets.gpu_names() == sorted(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_every_description_is_of_the_gpu_it_is_named_after(name):
    text = (targets.DESCRIPTIONS / f"{name}.txtpb").read_text(encoding="utf-8")
    names = re.findall(r'(?:device_description_str|\bname): "NVIDIA (\w+)"', text)
    assert [found.lower() for found in names] == [name, name]
    for key, fact in FACTS[name].items():
        (found,) = re.findall(rf"\b{key}: ([\d.]+)", text.split("dnn_version_info")[0])
        assert float(found) == pytest.approx(fact, rel=1e-3 if key == "memory_bandwidth" else 0), key
    major = FACTS[name]["major"]
    # Of the architecture's own instructions ("a"): wgmma, tcgen05. Without a minor version, which is 0.
    assert f"cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}" in text
    assert f'platform_version: "Compute Capability {major}.0a"' in text


def test_a_missing_compiler_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="target b200:1 needs NVIDIA's compiler.*pip install -r requirements-plan"):
        targets.parse("b200:1").devices()
    with pytest.raises(ValueError, match="target v5e:4x4 needs libtpu.*requirements-plan.txt"):
        targets.parse("v5e:4x4").devices()


def test_the_requirements_pin_the_version_of_jax_that_training_has():
    jax_of = {
        name: re.search(r"^jax\S*==(\S+)", (REPOSITORY / name).read_text(encoding="utf-8"), re.MULTILINE)[1]
        for name in ("requirements.txt", targets.REQUIREMENTS)
    }
    assert len(set(jax_of.values())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target=h200:1"], "--config and --target are needed"),
        (["--config=configs/averis_tiny.py"], "--config and --target are needed"),
        (["--config=configs/none.py", "--target=h200:1"], "configs/none.py"),
        (["--config=configs/averis_tiny.py", "--target=h100:1"], "unknown target 'h100:1'; accepted: "),
        (["--config=configs/averis_tiny.py", "--target=h200:1", "--config.modell=1"], "unknown config key 'modell'"),
    ],
)
def test_the_command_refuses_in_one_line(flags, message):
    command = [sys.executable, "-m", "fp4jax.plan", *flags]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: ") and message in run.stderr and run.stderr.count("\n") == 1
