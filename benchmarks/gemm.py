"""A layer's matrix products: bfloat16 operands, and packed NVFP4 ones that are dequantized and multiplied.

The latter by XLA (emulated: what `fp4jax.dot` does) and, on GPUs that it serves, by the kernel that decodes them as it
multiplies (fused: `pallas_kernels.dequant_matmul`, chosen by nothing until it is faster here).

    python -m benchmarks.gemm [--tokens=16384] [--out=FOLDER]

Operands of the emulated products are quantized beforehand, so that the time is what the backward pays for what was
saved, and what FP4 tensor cores would take over. Every product is compared with the one of its dequantized operands
before it is timed.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from benchmarks import ratios, records, timing
from fp4jax import gemm, hardware
from fp4jax.cli import Parser, output_folder, positive, run
from fp4jax.numerics import NVFP4, QTensor, quantize_blocks
from fp4jax.operands import Part
from fp4jax.recipes import as_recipe
from pallas_kernels.dequant_matmul import dequant_matmul, unsupported_reason

COMMAND = "benchmarks.gemm"
# Linear layers of Qwen3-0.6B: inputs, outputs.
LAYERS = {
    "q": (1024, 2048),
    "k, v": (1024, 1024),
    "o": (2048, 1024),
    "gate, up": (1024, 3072),
    "down": (3072, 1024),
}
# Contracted axes of [tokens, features] and the other operand.
CONTRACTED = {"fprop": ((1,), (0,)), "dgrad": ((1,), (1,)), "wgrad": ((0,), (0,))}
_TOLERANCE = 2e-2  # of the largest magnitude: both round their result to bfloat16


def main(arguments: Sequence[str]) -> None:
    """Measures and writes FOLDER/gemm.json.

    Raises:
      ValueError: flags that do not fit, or a product that is wrong.
    """
    flags = _parse(arguments)
    path = output_folder(flags.out or records.default_folder()) / "gemm.json"
    dtype = hardware.emulation_dtype()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, emulated in {dtype}")
    if reason := unsupported_reason():
        print(f"fused is not measured: {reason}")
    print(
        f"{'layer':10} {'GEMM':6} {'inputs':>6} {'outputs':>7} {'bf16 TFLOP/s':>12} {'emulated/bf16':>14} "
        f"{'fused/emulated':>14}"
    )
    rows = []
    for layer, (inputs, outputs) in LAYERS.items():
        for kind in CONTRACTED:
            row = {"layer": layer, "gemm": kind, "tokens": flags.tokens, "inputs": inputs, "outputs": outputs}
            row |= measure(kind, flags.tokens, inputs, outputs, flags.repeats)
            rows.append(row)
            by_kernel = f"{row['fused_over_emulated']['ratio']:.2f}" if "fused_us" in row else "-"
            print(
                f"{layer:10} {kind:6} {inputs:6} {outputs:7} {row['bf16_tflop_s']:12.1f} "
                f"{row['emulated_over_bf16']['ratio']:14.2f} {by_kernel:>14}",
                flush=True,
            )
            records.write(path, COMMAND, rows, emulated_in=str(dtype))


def measure(kind: str, tokens: int, inputs: int, outputs: int, repeats: int) -> dict:
    """Times one product both ways."""
    left = (tokens, outputs) if kind == "dgrad" else (tokens, inputs)
    right = (tokens, outputs) if kind == "wgrad" else (inputs, outputs)
    count = timing.input_count(2 * (left[0] * left[1] + right[0] * right[1]))
    keys = jax.random.split(jax.random.key(0), count)
    pairs = [operands(key, left, right) for key in keys]
    packed = [quantized(kind, *pair) for pair in pairs]
    from_codes = {"emulated": emulated} | ({} if unsupported_reason() else {"fused": fused})
    programs: dict[str, tuple[Callable, list]] = {"bf16": (plain(kind), pairs)}
    for name, program in from_codes.items():
        check(kind, packed[0], name, program(kind))
        programs[name] = program(kind), packed
    runs = {}
    for name, (program, given) in programs.items():
        jitted = timing.over_all(program, passes=1)
        runs[name] = lambda jitted=jitted, given=given: jitted(given)
    times = {name: [t / count for t in turns] for name, turns in timing.in_turns(runs, repeats, launches=3).items()}
    seconds = timing.medians(times)
    row: dict = {f"{name}_us": seconds[name] * 1e6 for name in programs}
    row["bf16_tflop_s"] = 2 * tokens * inputs * outputs / seconds["bf16"] / 1e12
    row["emulated_over_bf16"] = ratios.paired_ratio(times["emulated"], times["bf16"])
    if "fused" in times:
        row["fused_over_emulated"] = ratios.paired_ratio(times["fused"], times["emulated"])
    return row


def operands(key: Array, left: tuple[int, int], right: tuple[int, int]) -> tuple[Array, Array]:
    """Random bfloat16 matrices."""
    keys = jax.random.split(key)
    return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, (left, right), strict=True))


def quantized(kind: str, left: Array, right: Array) -> tuple[QTensor, QTensor]:
    """Blocks along the contracted axis of each operand."""
    axes = (axis[0] - 2 for axis in CONTRACTED[kind])
    quantize = jax.jit(lambda x, axis: quantize_blocks(x, NVFP4, axes=(axis,), pack_axis=axis), static_argnums=1)
    return tuple(quantize(x, axis) for x, axis in zip((left, right), axes, strict=True))


def plain(kind: str) -> Callable[[Array, Array], Array]:
    """The product of bfloat16 operands."""
    return lambda left, right: lax.dot_general(left, right, (CONTRACTED[kind], ((), ())))


def emulated(kind: str) -> Callable[[QTensor, QTensor], Array]:
    """The product of `fp4jax.dot` on prepared operands, its result in bfloat16."""
    execution = gemm.Execution(hardware.emulation_dtype())

    def product(left: QTensor, right: QTensor) -> Array:
        if kind == "wgrad":
            parts = Part(left), Part(right)
            result = gemm.contract_tokens(*parts, as_recipe("nvfp4"), left.shape, 0, execution, None, None)
        else:
            axis = CONTRACTED[kind][1][0] - 2
            result = gemm.contract_features(
                Part(left), Part(right), axis, 0, execution, None, None, jnp.dtype(jnp.bfloat16)
            )
        return result.astype(jnp.bfloat16)

    return product


def fused(kind: str) -> Callable[[QTensor, QTensor], Array]:
    """The product by the kernel that decodes its operands, its result in bfloat16."""
    contracted = tuple((axis[0] - 2,) for axis in CONTRACTED[kind])
    return lambda left, right: dequant_matmul(left, right, contracted).astype(jnp.bfloat16)


def check(kind: str, packed: tuple[QTensor, QTensor], name: str, program: Callable) -> None:
    """Raises ValueError where what a program computes is not the product of the dequantized operands."""
    got = jax.jit(program)(*packed).astype(jnp.float32)

    def exact(left: QTensor, right: QTensor) -> Array:
        both = left.dequantize(), right.dequantize()
        return lax.dot_general(*both, (CONTRACTED[kind], ((), ())), precision=lax.Precision.HIGHEST)

    want = jax.jit(exact)(*packed)
    error = float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))
    if not error <= _TOLERANCE:
        raise ValueError(f"{kind}: the {name} product is off by {error:.3g} of the largest: no time is reported")


def _parse(arguments: Sequence[str]):
    parser = Parser(COMMAND, (__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=positive, default=16384)
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--out", type=Path, help="folder for gemm.json; by default benchmarks/results/<device>")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
