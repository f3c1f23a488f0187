"""`python -m pallas_kernels.quantize.bench`: the kernel against the XLA path and against the device's copy bandwidth.

For every shape the kernel's codes and scales are first compared with the twin's on the same device; a difference ends
the run without a time. All three programs are timed alternately, on inputs that together exceed the cache, with the
tensor maximum given: in training it comes from the statistics pass.
"""

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from fp4jax.numerics import NVFP4, key_words, quantize_blocks
from pallas_kernels.quantize.api import quantize_rows, unsupported_reason
from pallas_kernels.quantize.shapes import SHAPES, Shape

_WORKING_SET = 512 * 2**20  # bytes of input for one timing: several times any cache
_MAX_INPUTS = 64
_REPEATS = 10


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.quantize.bench", description=__doc__)
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    flags = parser.parse_args(arguments)
    if reason := unsupported_reason():
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, {flags.dtype}")
    print(f"{'tokens':>7} {'features':>8} {'rounding':>10} {'us':>8} {'GB/s':>7} {'of copy':>8} {'XLA/kernel':>10}")
    rows = []
    for shape in SHAPES:
        for stochastic in (False, True):
            row = _measure(shape, jnp.dtype(flags.dtype), stochastic)
            rows.append(row)
            print(
                f"{row['tokens']:7} {row['features']:8} {row['rounding']:>10} {row['kernel_us']:8.1f} "
                f"{row['kernel_gb_s']:7.0f} {row['share_of_copy_bandwidth']:8.1%} {row['xla_over_kernel']:10.2f}"
            )
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump({"device": device.device_kind, "jax": jax.__version__, "rows": rows}, file, indent=1)
    return 0


def _measure(shape: Shape, dtype, stochastic: bool) -> dict:
    size = shape.tokens * shape.features
    inputs = max(1, min(_MAX_INPUTS, _WORKING_SET // (size * dtype.itemsize)))
    words = key_words(jax.random.key(1)) if stochastic else None
    keys = jax.random.split(jax.random.key(0), inputs)
    xs = [jax.random.normal(key, (shape.tokens, shape.features), dtype) for key in keys]
    amaxes = [jnp.max(jnp.abs(x.astype(jnp.float32)), keepdims=True) for x in xs]

    def kernel(x, amax):
        return quantize_rows(x, amax=amax, words=words)

    def twin(x, amax):
        return quantize_blocks(x, NVFP4, axes=(-1,), pack_axis=-1, words=words, amax=amax)

    _compare(jax.jit(kernel)(xs[0], amaxes[0]), jax.jit(twin)(xs[0], amaxes[0]), shape)
    programs = {"kernel": kernel, "xla": twin, "copy": lambda x, _: -x}
    seconds = _time({name: _over_all(program) for name, program in programs.items()}, xs, amaxes)
    copy_bandwidth = 2 * size * dtype.itemsize / seconds["copy"]
    moved = size * (dtype.itemsize + 0.5 + 1 / NVFP4.block)
    return {
        "tokens": shape.tokens,
        "features": shape.features,
        "dtype": dtype.name,
        "rounding": "stochastic" if stochastic else "nearest",
        "kernel_us": seconds["kernel"] * 1e6,
        "xla_us": seconds["xla"] * 1e6,
        "kernel_gb_s": moved / seconds["kernel"] / 1e9,
        "copy_gb_s": copy_bandwidth / 1e9,
        "share_of_copy_bandwidth": moved / seconds["kernel"] / copy_bandwidth,
        "xla_over_kernel": seconds["xla"] / seconds["kernel"],
    }


def _compare(got, want, shape: Shape) -> None:
    for name in ("codes", "scales"):
        left, right = getattr(got, name), getattr(want, name)
        if different := int(jnp.sum(left != right)):
            sys.exit(f"{different} of {left.size} {name} differ from the XLA path at {shape}: no time is reported")


def _over_all(program):
    """One program for all inputs, so that the launch from Python is not what is timed."""
    return jax.jit(lambda xs, amaxes: [program(x, amax) for x, amax in zip(xs, amaxes, strict=True)])


def _time(programs, xs, amaxes) -> dict[str, float]:
    """Median seconds for one input of each program, the programs taking turns."""
    seconds = {name: [] for name in programs}
    for repeat in range(_REPEATS + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(xs, amaxes))
            if repeat:  # the first turn compiles
                seconds[name].append((time.perf_counter() - start) / len(xs))
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
