import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.hardware import Hardware
from fp4jax.models.layers import EVERY_SEGMENT, attention_implementation, causal_attention

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = Hardware("cpu", "cpu", "", 1)
TPU = Hardware("tpu", "TPU v5 lite", "", 4)
VOLTA = Hardware("gpu", "Tesla V100", "7.0", 1)
HOPPER = Hardware("gpu", "NVIDIA H200", "9.0", 8)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "hardware", "expected"),
    [
        (jnp.bfloat16, 128, HOPPER, "cudnn"),
        (jnp.float16, 64, HOPPER, "cudnn"),
        (jnp.float32, 128, HOPPER, "xla"),
        (jnp.bfloat16, 136, HOPPER, "xla"),
        (jnp.bfloat16, 20, HOPPER, "xla"),
        (jnp.bfloat16, 128, VOLTA, "xla"),
        (jnp.bfloat16, 128, CPU, "xla"),
        (jnp.bfloat16, 128, TPU, "xla"),
    ],
)
def test_auto_takes_flash_attention_where_it_is_served(dtype, head_dim, hardware, expected):
    assert attention_implementation("auto", jnp.dtype(dtype), head_dim, hardware) == expected
    assert attention_implementation("xla", jnp.dtype(dtype), head_dim, hardware) == "xla"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "hardware", "message"),
    [
        (jnp.bfloat16, 128, CPU, r"needs an NVIDIA GPU .* and this is cpu \(cpu\); use attention='xla'"),
        (jnp.float32, 128, HOPPER, "takes bfloat16 and float16, not float32; use attention='xla'"),
        (jnp.bfloat16, 136, HOPPER, "heads of up to 128 in multiples of 8, not 136"),
    ],
)
def test_cudnn_where_it_is_not_served_says_what_it_takes(dtype, head_dim, hardware, message):
    with pytest.raises(NotImplementedError, match=message):
        attention_implementation("cudnn", jnp.dtype(dtype), head_dim, hardware)


def test_segments_of_an_odd_length_are_not_cudnns():
    arguments = jnp.dtype(jnp.bfloat16), 128, HOPPER
    assert attention_implementation("auto", *arguments, odd_mask=True) == "xla"
    with pytest.raises(NotImplementedError, match="segments in sequences of an even length; use attention='xla'"):
        attention_implementation("cudnn", *arguments, odd_mask=True)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="attention must be auto, xla or cudnn, got 'flash'"):
        attention_implementation("flash", jnp.dtype(jnp.bfloat16), 128, HOPPER)


def test_on_a_cpu_cudnn_is_refused_before_anything_is_computed():
    q = jnp.zeros((1, 16, 2, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="attention='cudnn' needs an NVIDIA GPU"):
        causal_attention(q, q, q, implementation="cudnn")


def test_segments_are_sequences_of_their_own():
    q, k, v = (jax.random.normal(key, (1, 16, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    segments = jnp.repeat(jnp.array([[0, 1]]), 8, axis=1)
    together = causal_attention(q, k, v, segments)
    halves = [causal_attention(q[:, part], k[:, part], v[:, part]) for part in (slice(0, 8), slice(8, 16))]
    np.testing.assert_allclose(together, jnp.concatenate(halves, axis=1), rtol=1e-5, atol=1e-6)


def test_a_run_refuses_what_its_device_cannot_run_before_the_first_step(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/averis_tiny.py", f"--workdir={tmp_path / 'run'}"]
    run = subprocess.run(
        [*command, "--config.model.attention=cudnn"], cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: attention='cudnn' needs an NVIDIA GPU")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_segment_sees_itself_and_what_every_segment_sees():
    """Two continuations of one context in a row are what each is behind the context alone."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 9, 2, 8)) for i in range(3))
    segments = jnp.array([[EVERY_SEGMENT] * 4 + [0, 0, 0, 1, 1]])
    together = causal_attention(q, k, v, segments)
    for own in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7, 8]):
        own = jnp.array(own)
        alone = causal_attention(q[:, own], k[:, own], v[:, own])
        np.testing.assert_allclose(together[:, own], alone, rtol=1e-5, atol=1e-6)
