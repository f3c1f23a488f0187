"""What the compiler made of the quantized products: do their operands still come from few bits, and who multiplies?"""

import collections
import dataclasses
import re
from collections.abc import Mapping

from fp4jax import scopes
from fp4jax.reporting.optimized_hlo import Instruction, Program
from fp4jax.statistics import SCOPE as STATISTICS

_NATIVE = re.compile(r'custom_call_target="(__cudnn\$blockScaledDot|__cublas\$lt\$matmul\$mx)"')

Kind = tuple[str, str, tuple[str, str]]
"""(recipe, GEMM, formats of the operands)."""


@dataclasses.dataclass(frozen=True)
class CompiledCheck:
    """Attributes:
    platform: compiled for.
    products: instructions of the optimized program that are products of quantized operands.
    operands: of theirs, those that the recipes quantize; coded: those of them that still come from few bits.
    folded: one line for each of the others, whose quantization the compiler has removed.
    execution: how products run, by (recipe, GEMM, formats).
    corrections: how those with what a split took off run, by (recipe, formats); without those that the compiler has
      made into sums of multiples, which are no product any more.
    """

    platform: str
    products: int
    operands: int
    coded: int
    folded: tuple[str, ...]
    execution: Mapping[Kind, tuple[str, ...]]
    corrections: Mapping[tuple[str, tuple[str, str]], tuple[str, ...]]

    def __str__(self) -> str:
        if not self.products:
            return f"compiled for {self.platform}: no product has quantized operands"
        kept = f"{self.coded} of {self.operands} quantized operands of {self.products} products still come from codes"
        ways = ", ".join(sorted({way for found in self.execution.values() for way in found}))
        return "\n  ".join([f"compiled for {self.platform}: {kept}; {ways}", *self.folded])


def check(text: str, platform: str) -> CompiledCheck:
    """Reads an optimized program (`jax.stages.Compiled.as_text()`)."""
    program = Program(text)
    operands, coded, products, folded = 0, 0, 0, []
    execution, corrections = collections.defaultdict(set), collections.defaultdict(set)
    for product in program.products():
        scope = scopes.read(product.scope)
        if not scope.quantized or scope.recipe is None or STATISTICS in product.scope:
            continue
        sources = [program.precise_source(operand) for operand in program.multiplied(product)]
        kept = min(sum(source is None for source in sources), scope.quantized)
        products, operands, coded = products + 1, operands + scope.quantized, coded + kept
        if kept < scope.quantized:
            reached = next(source for source in sources if source is not None)
            folded.append(f"NOT QUANTIZED: {product.scope}: an operand is {reached.type[:60]} %{reached.name}")
        if scope.operands and scope.is_correction:
            corrections[scope.recipe, scope.operands].add(_execution(program, product))
        elif scope.operands and scope.gemm:
            execution[scope.recipe, scope.gemm, scope.operands].add(_execution(program, product))
    return CompiledCheck(platform, products, operands, coded, tuple(folded), _sorted(execution), _sorted(corrections))


def _sorted(ways: Mapping) -> dict:
    return {kind: tuple(sorted(found)) for kind, found in ways.items()}


def _execution(program: Program, product: Instruction) -> str:
    if product.is_fused:
        return "fused"
    native = _NATIVE.search(product.rest)
    if native:
        return f"native ({native[1]})"
    dtype = re.match(r"\(?(\w+)\[", program.operands(product)[0].type)
    return f"emulated in {_DTYPES.get(dtype[1], dtype[1])}"


_DTYPES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
