"""Holds other JAX packages' NVFP4 quantizers, and ours, to the laws of `fp4jax.testing.conformance`.

    python -m pip install --no-deps qwix==0.1.8
    python -m examples.conformance_of_peers --out=results/conformance_of_peers.json

On a CPU, about two minutes. It prints one table a quantizer and a summary, and writes both as JSON with the versions.
An adapter is a function from a matrix to dequantized values or to an object like `fp4jax.QTensor`; `ScaledDotGeneral`
shows the second kind.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import qwix

# The two quantizers below have no public name of their own: these are what the public functions call.
from jax._src.cudnn.scaled_matmul_stablehlo import quantize as scaled_dot_general_quantize
from qwix._src.core import qarray
from qwix._src.core.stochastic_rounding import get_noise_fn

import fp4jax
from fp4jax.testing import Table, conformance

NVFP4_RANGE = 2688.0


def fp4jax_stochastic(x, key):
    return fp4jax.quantize(x, rounding="stochastic", key=key)


def qwix_nearest(x):
    """`qwix.quantize(..., "nvfp4")`, its public function."""
    return qwix.dequantize(qwix.quantize(x, "nvfp4", channelwise_axes=(0,), tiled_axes={1: 16}))


def qwix_stochastic(x, key):
    """The quantizer with the noise that `QtRule(bwd_stochastic_rounding="uniform")` gives to gradients."""
    noise = get_noise_fn("uniform", key, channelwise_noise_axes=(0, 1))
    how = qarray.HowToQuantize(qtype="nvfp4", channelwise_axes=(0,), tiled_axes={1: 16}, noise_fn=noise)
    return qwix.dequantize(qarray.quantize(x, how))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledDotGeneral:
    """What `jax.nn.scaled_dot_general` makes of an operand, with the amax from which its global scale was computed."""

    elements: jax.Array
    scales: jax.Array
    global_scale: jax.Array
    amax: jax.Array

    @property
    def codes(self) -> jax.Array:
        nibbles = jax.lax.bitcast_convert_type(self.elements, jnp.uint4).astype(jnp.uint8)
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4

    def dequantize(self) -> jax.Array:
        scales = jnp.repeat(self.scales.astype(jnp.float32), 16, axis=-1)
        return self.elements.astype(jnp.float32) * scales * self.global_scale


def scaled_dot_general_default(x):
    """The configuration as `jax.nn.get_scaled_dot_general_config("nvfp4")` gives it: a global scale of 1."""
    config = jax.nn.get_scaled_dot_general_config("nvfp4")
    elements, scales = scaled_dot_general_quantize(x[None], config)
    amax = jnp.max(jnp.abs(x)).astype(jnp.float32)
    return ScaledDotGeneral(elements[0], scales[0], config.global_scale, amax).dequantize()


def scaled_dot_general_scaled(x):
    """With the global scale amax / 2688 that a caller of it may compute."""
    amax = jnp.max(jnp.abs(x.astype(jnp.float32)))
    global_scale = jnp.where(amax > 0, amax / NVFP4_RANGE, 1.0).reshape(1)
    config = jax.nn.get_scaled_dot_general_config("nvfp4", global_scale)
    elements, scales = scaled_dot_general_quantize(x[None], config)
    return ScaledDotGeneral(elements[0], scales[0], global_scale, amax)


QUANTIZERS: dict[str, tuple[Callable, Callable | None, Callable | None]] = {
    "fp4jax": (fp4jax.quantize, fp4jax_stochastic, lambda x: fp4jax.quantize(x, block=(16, 16))),
    "qwix": (qwix_nearest, qwix_stochastic, None),
    "jax.nn.scaled_dot_general, global_scale=1": (scaled_dot_general_default, None, None),
    "jax.nn.scaled_dot_general, global_scale=amax/2688": (scaled_dot_general_scaled, None, None),
}


def run() -> list[Table]:
    tables = []
    for name, functions in QUANTIZERS.items():
        nearest, stochastic, square = (function and jax.jit(function) for function in functions)
        tables.append(conformance(nearest, stochastic, square_fn=square, name=name))
        print(f"{tables[-1]}\n", flush=True)
    return tables


def as_json(tables: list[Table]) -> dict:
    packages = ("jax", "jaxlib", "qwix", "numpy", "ml_dtypes")
    return {
        "command": "python -m examples.conformance_of_peers --out=results/conformance_of_peers.json",
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"fp4jax": fp4jax.__version__},
        "python": platform.python_version(),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "tables": {table.name: [dataclasses.asdict(row) for row in table.rows] for table in tables},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the tables there as JSON")
    out = parser.parse_args(arguments).out
    jax.config.update("jax_num_cpu_devices", 8)  # for the law about meshes
    tables = run()
    print("\n".join(str(table).splitlines()[0] for table in tables))
    if out:
        out.write_text(json.dumps(as_json(tables), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
