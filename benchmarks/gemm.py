"""A layer's matrix products: bfloat16 operands, and packed NVFP4 ones, by every way that `fp4jax.gemm` has here.

Emulated: dequantized by XLA and multiplied. Fused: by the kernel that decodes them as it multiplies, on Hopper GPUs
(`gemm="fused"`, chosen by nothing until it is faster here). Native: on FP4 tensor cores, from Blackwell on.

    python -m benchmarks.gemm [--tokens=16384] [--models=0p6b] [--weights=1024x3072,64x2048x1024] [--out=FOLDER]

Operands of the quantized products are prepared beforehand, so that the time is what the backward pays for what was
saved, and what FP4 tensor cores would take over. Every product is compared with the one of its dequantized operands
before it is timed. A way that fails is recorded with its error and the others are measured; fused and native come
after all emulated products, since a fault would break the device for what follows.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from benchmarks import compiling, ratios, records, timing
from benchmarks.flags import choose
from fp4jax import fused, gemm, hardware, native
from fp4jax.cli import Parser, output_folder, positive, run
from fp4jax.cli import describe as describe_error
from fp4jax.numerics import NVFP4, QTensor, quantize_blocks
from fp4jax.operands import Part
from fp4jax.recipes import as_recipe
from pallas_kernels.quantize.shapes import MODELS, WEIGHT_SHAPES, Shape, slots

COMMAND = "benchmarks.gemm"
# Contracted axes of [tokens, features] and the other operand.
CONTRACTED = {"fprop": (-1, -2), "dgrad": (-1, -1), "wgrad": (-2, -2)}
KNOWN = ("bf16", "emulated")
_TOLERANCE = 2e-2  # of the largest magnitude: both round their result to bfloat16


@dataclasses.dataclass(frozen=True)
class Product:
    """One of CONTRACTED of a layer, for `tokens` tokens in all."""

    kind: str
    weight: Shape
    tokens: int

    @property
    def rows(self) -> int:
        """Of X and D: tokens, or slots of each expert."""
        return self.tokens if self.weight.batch == 1 else slots(self.tokens)

    @property
    def operands(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the left one and the right one."""
        batch, inputs, outputs = self.weight.array[:-2], self.weight.tokens, self.weight.features
        left = self.rows, outputs if self.kind == "dgrad" else inputs
        right = (self.rows, outputs) if self.kind == "wgrad" else (inputs, outputs)
        return (*batch, *left), (*batch, *right)

    @property
    def batch_dims(self) -> int:
        return len(self.weight.array) - 2

    @property
    def numbers(self) -> tuple:
        """Dimension numbers of the plain product."""
        batch = tuple(range(self.batch_dims))
        return tuple((axis % len(self.weight.array),) for axis in CONTRACTED[self.kind]), (batch, batch)

    @property
    def operations(self) -> int:
        return 2 * self.weight.batch * self.rows * self.weight.tokens * self.weight.features

    @property
    def count(self) -> int:
        """Pairs of operands that exceed the cache."""
        return timing.input_count(2 * sum(_size(shape) for shape in self.operands))


def _size(shape: Sequence[int]) -> int:
    return functools.reduce(int.__mul__, shape)


def ways() -> dict[str, gemm.Execution | None]:
    """Name → execution, of those that this device has; None multiplies in bfloat16. The last are not measured yet."""
    found: dict[str, gemm.Execution | None] = {"bf16": None, "emulated": gemm.emulated()}
    if fused.unsupported_reason() is None:
        found["fused"] = gemm.fused_or_error()
    if native.unsupported_reason() is None:
        found["native"] = gemm.native_or_error()
    return found


def main(arguments: Sequence[str]) -> None:
    """Measures and writes FOLDER/gemm.json.

    Raises:
      ValueError: flags that do not fit; or, at the end, a product that failed or is wrong.
    """
    flags = _parse(arguments)
    path = output_folder(flags.out or records.default_folder()) / "gemm.json"
    dtype, executions = hardware.emulation_dtype(), ways()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, emulated in {dtype}")
    for name, reason in (("fused", fused.unsupported_reason()), ("native", native.unsupported_reason())):
        if reason:
            print(f"{name} is not measured: {reason}")
    products = [Product(kind, weight, flags.tokens) for weight in flags.weights for kind in CONTRACTED]
    programs = compile_all(products, executions)
    rows = {product: heading(product) for product in products}
    for names in (KNOWN, tuple(executions)) if len(executions) > len(KNOWN) else (KNOWN,):
        for product in products:
            rows[product] = merged(rows[product], measure(product, names, programs, flags.repeats))
            print(describe(rows[product]), flush=True)
            done = [row for row in rows.values() if row.keys() != heading(product).keys()]
            records.write(
                path, COMMAND, done, emulated_in=str(dtype), models={name: MODELS[name] for name in flags.models}
            )
    if failed := sorted({key.removesuffix("_error") for row in rows.values() for key in row if key.endswith("_error")}):
        raise ValueError(f"not every product has a time: {', '.join(failed)}; see {path}")


def heading(product: Product) -> dict:
    """What a row is about. tokens: in all; rows: of each matrix."""
    weight = product.weight
    sizes = {"inputs": weight.tokens, "outputs": weight.features, "experts": weight.batch}
    return {"layer": weight.operands, "gemm": product.kind, "tokens": product.tokens, "rows": product.rows} | sizes


def merged(row: dict, found: dict) -> dict:
    """With what was found later: whole, or, where something failed then, what is new in it."""
    if not any(key.endswith("_error") for key in found):
        return row | found
    new = {key: value for key, value in found.items() if key not in row}
    return row | {key: value for key, value in new.items() if f"{key.removesuffix('_error')}_us" not in row}


def compile_all(
    products: Sequence[Product], executions: Mapping[str, gemm.Execution | None]
) -> dict[tuple[Product, str], Future]:
    """Of every product the ways over all pairs of operands, what quantizes one of them, and what checks."""
    programs: dict[tuple[Product, str], tuple] = {}
    for product in products:
        pair = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in product.operands)
        quantize = jax.jit(functools.partial(quantized, product))
        packed, result = jax.eval_shape(quantize, *pair), jax.eval_shape(plain(product), *pair)
        programs[product, "quantize"] = quantize, pair
        programs[product, "check"] = jax.jit(functools.partial(distance, product)), (result, *packed)
        for name, how in executions.items():
            program, given = (plain(product), pair) if how is None else (by_codes(product, how), packed)
            programs[product, name] = timing.over_all(program, passes=1), ([given] * product.count,)
    return compiling.side_by_side(programs)


def measure(
    product: Product, names: Sequence[str], programs: Mapping[tuple[Product, str], Future], repeats: int
) -> dict:
    """Times one product in several ways; "WAY_error" for those that fail or are wrong."""
    row: dict = {}
    runs: dict[str, Callable] = {}
    try:
        pairs = [operands(key, product) for key in jax.random.split(jax.random.key(0), product.count)]
        packed = [programs[product, "quantize"].result()(*pair) for pair in pairs]
        for name in names:
            try:
                run = functools.partial(programs[product, name].result(), pairs if name == "bf16" else packed)
                if name != "bf16":
                    check(product, name, programs[product, "check"].result()(run()[0], *packed[0]))
                runs[name] = run
            except Exception as error:  # such as a kernel that does not compile
                row[f"{name}_error"] = describe_error(error)
        times = timing.in_turns(runs, repeats, launches=3)
    except Exception as error:  # such as memory, or a device that one of them broke
        return {f"{name}_error": describe_error(error) for name in names} | row
    times = {name: [seconds / product.count for seconds in turns] for name, turns in times.items()}
    return row | summary(product, times)


def summary(product: Product, times: Mapping[str, Sequence[float]]) -> dict:
    """Microseconds of every way, and ratios: of the emulation to bfloat16, of the others to both."""
    seconds = timing.medians(times)
    row: dict = {f"{name}_us": median * 1e6 for name, median in seconds.items()}
    if "bf16" in seconds:
        row["bf16_tflop_s"] = product.operations / seconds["bf16"] / 1e12
    for index, reference in enumerate(KNOWN):
        for name in times:
            if reference in times and name not in KNOWN[: index + 1]:
                row[f"{name}_over_{reference}"] = ratios.paired_ratio(times[name], times[reference])
    return row


def operands(key: Array, product: Product) -> tuple[Array, Array]:
    """Random bfloat16 matrices."""
    keys = jax.random.split(key)
    return tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, product.operands, strict=True))


def quantized(product: Product, left: Array, right: Array) -> tuple[QTensor, QTensor]:
    """Blocks along the contracted axis of each operand."""
    return tuple(
        quantize_blocks(x, NVFP4, axes=(axis,), pack_axis=axis, batch_dims=product.batch_dims)
        for x, axis in zip((left, right), CONTRACTED[product.kind], strict=True)
    )


def plain(product: Product) -> Callable[[Array, Array], Array]:
    """The product of bfloat16 operands."""
    return lambda left, right: lax.dot_general(left, right, product.numbers)


def by_codes(product: Product, execution: gemm.Execution) -> Callable[[QTensor, QTensor], Array]:
    """The product of `fp4jax.dot` on prepared operands, its result in bfloat16."""
    contracted = tuple((axis,) for axis in CONTRACTED[product.kind])

    def run(left: QTensor, right: QTensor) -> Array:
        reason = native.misfit(left, right, contracted) if execution.native else None
        reason = fused.misfit(left, right, contracted, product.batch_dims) if execution.fused else reason
        if reason:  # it would be emulated
            raise ValueError(reason)
        parts, dims = (Part(left), Part(right)), product.batch_dims
        if product.kind == "wgrad":
            result = gemm.contract_tokens(*parts, as_recipe("nvfp4"), left.shape, dims, execution, None, None)
        else:
            axis = CONTRACTED[product.kind][1]
            dtype = jnp.dtype(jnp.bfloat16)
            result = gemm.contract_features(*parts, axis, dims, execution, None, None, dtype)
        return result.astype(jnp.bfloat16)

    return run


def distance(product: Product, result: Array, left: QTensor, right: QTensor) -> Array:
    """How far a result is from the product of the dequantized operands, as a share of the largest magnitude."""
    both = left.dequantize(), right.dequantize()
    exact = lax.dot_general(*both, product.numbers, precision=lax.Precision.HIGHEST)
    return jnp.max(jnp.abs(result.astype(jnp.float32) - exact)) / jnp.max(jnp.abs(exact))


def check(product: Product, name: str, distance: Array) -> None:
    """Raises ValueError where a result is not the product of its operands."""
    if not float(distance) <= _TOLERANCE:
        raise ValueError(
            f"{product.kind}: the {name} product is off by {float(distance):.3g} of the largest: no time is reported"
        )


def describe(row: dict) -> str:
    """One line: times, ratios and errors."""
    sizes = f"{row['experts']}x" if row["experts"] > 1 else ""
    found = [f"{row['gemm']:6} {sizes}{row['rows']} x {row['inputs']} x {row['outputs']}"]
    if "bf16_tflop_s" in row:
        found.append(f"bf16 {row['bf16_tflop_s']:.1f} TFLOP/s")
    found += [f"{key.replace('_over_', '/')} {value['ratio']:.2f}" for key, value in row.items() if "_over_" in key]
    found += [f"{key.removesuffix('_error')}: {value}" for key, value in row.items() if key.endswith("_error")]
    return "  ".join(found)


def _parse(arguments: Sequence[str]):
    parser = Parser(COMMAND, (__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=positive, default=16384, help="in all; experts have their slots of them")
    parser.add_argument("--models", default=",".join(MODELS), help="whose layers, separated by commas")
    parser.add_argument("--weights", help="those alone, such as 1024x3072; by default all of the models")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--out", type=Path, help="folder for gemm.json; by default benchmarks/results/<device>")
    flags = parser.parse_args(arguments)
    flags.models = list(choose(parser, "model", flags.models, MODELS))
    known = {shape.name: shape for shape in WEIGHT_SHAPES if set(shape.models) & set(flags.models)}
    flags.weights = list(choose(parser, "weight", flags.weights or ",".join(known), known).values())
    return flags


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
