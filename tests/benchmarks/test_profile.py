"""The profile of a training step."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(f)/jvp()/while/body/fp4jax:averis/fprop/quantized_product/NVFP4:4*NVFP4:4/dot_general", "products"),
        ("jit(f)/fp4jax:averis/fprop/correction/quantized_product/NVFP4:4*NVFP4:4/dot_general", "corrections"),
        ("jit(f)/transpose(jvp())/fp4jax:averis/wgrad/bitcast_convert_type", "quantization"),
        ("jit(f)/fp4jax:averis/prepare/reduce_max", "quantization"),
        ("jit(f)/transpose(jvp(fp4jax:bf16))/dot_general", "products"),
        ("jit(f)/transpose(jvp(attention))/mul", "attention"),
        ("jit(f)/jvp(cross_entropy)/reduce_sum", "cross_entropy"),
        ("jit(f)/optimizer/add", "optimizer"),
        ("jit(f)/jvp()/mul", "rest"),
        ("", "rest"),
    ],
)  # fmt: skip
def test_parts(path, part):
    assert profile.part_of(path) == part


def test_every_second_is_counted_once():
    names = {"dot.1": "jit(f)/fp4jax:bf16/dot_general", "fusion.2": "jit(f)/optimizer/add"}
    seconds = profile.by_part({"dot.1": 2.0, "fusion.2": 1.0, "copy.3": 0.5}, names)
    assert (seconds["products"], seconds["optimizer"], seconds["rest"]) == (2.0, 1.0, 0.5)
    assert sum(seconds.values()) == 3.5 and tuple(seconds) == profile.PARTS


@pytest.mark.slow
@pytest.mark.standard_promotion  # Optax
def test_a_step_is_profiled(tmp_path, capsys):
    flags = ["--recipes=bf16,averis", "--layers=1", "--sequences=2", "--length=32", "--repeats=1", f"--out={tmp_path}"]
    profile.main(flags)
    found = json.loads((tmp_path / "profile_tiny.json").read_text())
    by_recipe = {row["recipe"]: row["seconds"] for row in found["rows"]}
    assert all(by_recipe["averis"][part] > 0 for part in profile.PARTS)
    assert [part for part in profile.PARTS if by_recipe["bf16"][part] == 0] == ["quantization", "corrections"]
    assert (tmp_path / "profile_tiny.png").stat().st_size > 10_000
    assert "averis" in capsys.readouterr().out


def test_other_devices_are_refused(tmp_path, monkeypatch):
    gpu = type("Gpu", (), {"platform": "gpu", "device_kind": "NVIDIA H200"})()
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    with pytest.raises(NotImplementedError, match="NVIDIA H200: take a trace with jax.profiler.trace"):
        profile.main([f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("bf16,nope", "unknown recipe 'nope'"),
        ("bf16,nope/emulated", "unknown recipe 'nope'"),
        ("bf16,bf16", "--recipes names one twice"),
    ],
)
def test_recipes_are_checked_before_anything_is_written(recipes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        profile.main([f"--recipes={recipes}", f"--out={tmp_path / 'results'}"])
    assert not list(tmp_path.iterdir())


def test_a_trace_names_its_instructions(tmp_path):
    program = jax.jit(lambda x: jnp.sin(x @ x)).lower(jnp.ones((64, 64))).compile()
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(program(jnp.ones((64, 64))))
    found = profile.read_trace(tmp_path)
    assert found and min(found.values()) > 0
    assert set(found) & set(dict(profile._NAMED.findall(program.as_text())))
