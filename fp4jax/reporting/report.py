"""`fp4jax.report`: is FP4 really on? Every matrix product of a function, in which precision it runs, and why."""

import dataclasses
import json
from collections.abc import Sequence

from jax.extend.core import Jaxpr

from fp4jax.reporting.compiled import CompiledCheck, check
from fp4jax.reporting.rows import CORRECTION, Precision, Row, rows_of, share
from fp4jax.reporting.table import layer_table, plural
from fp4jax.reporting.trace import trace
from fp4jax.reporting.walk import find_products


@dataclasses.dataclass(frozen=True)
class Report:
    """What runs in FP4; `print` shows it.

    Attributes:
      function: its name.
      rows: the products of linear layers and those of activations.
      apart: products that are none of the three GEMMs of a layer: corrections of splits, preparation of operands,
        statistics. They cost little and count nowhere.
      opaque: primitives that may hold products and cannot be looked into.
      compiled: what the compiler made of it; None if it was not compiled.
    """

    function: str
    rows: tuple[Row, ...]
    apart: tuple[Row, ...]
    opaque: tuple[str, ...]
    compiled: CompiledCheck | None

    @property
    def products(self) -> int:
        """Executions of all rows."""
        return _count(self.rows)

    @property
    def flops(self) -> int:
        """Multiply-adds x 2 of all rows."""
        return sum(row.flops for row in self.rows)

    @property
    def fp4(self) -> tuple[Row, ...]:
        """The rows in FP4."""
        return tuple(row for row in self.rows if row.precision is Precision.FP4)

    @property
    def fp4_percent(self) -> float:
        """Of the matrix FLOPs, what runs in FP4."""
        return share(self.fp4, self.flops)

    def summary(self) -> str:
        """One line."""
        total, parts = self.products, []
        for precision in Precision:
            rows = [row for row in self.rows if row.precision is precision]
            if precision is Precision.FP4:
                percent = f"{self.fp4_percent:.1f} % of matrix FLOPs"
                parts.append(f"{_count(rows):,} of {total:,} products, {percent}, in FP4")
            elif rows:
                why = ", ".join(f"{reason} ({_count(of):,})" for reason, of in _by_reason(rows).items())
                where = "with one operand quantized" if precision is Precision.HALF else f"in {precision.value}"
                parts.append(f"{_count(rows):,} {where}: {why}")
        return "; ".join(parts)

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.summary()}", "", *layer_table(self.rows, self.flops)]
        if self.apart:
            listed = ", ".join(
                f"{plural(_count(rows), reason)} ({share(rows, self.flops):.2g} % as many FLOPs)"
                for reason, rows in _by_reason(self.apart).items()
            )
            lines += ["", f"not counted: {listed}"]
        if self.opaque:
            lines += ["", f"not looked into: {', '.join(self.opaque)}"]
        if self.compiled is not None:
            lines += ["", str(self.compiled)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, rows not summed up over layers."""
        content = {
            "function": self.function, "summary": self.summary(), "products": self.products, "flops": self.flops,
            "fp4_products": _count(self.fp4), "fp4_percent": self.fp4_percent,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "apart": [dataclasses.asdict(row) for row in self.apart], "opaque": self.opaque,
        }  # fmt: skip
        if self.compiled is not None:
            compiled = {field.name: getattr(self.compiled, field.name) for field in dataclasses.fields(self.compiled)}
            for kind in ("execution", "corrections"):  # JSON's keys are no tuples
                compiled[kind] = [[*what, ways] for what, ways in compiled[kind].items()]
            content["compiled"] = compiled
        return json.dumps(content, indent=1)


def report(function, *args, compile_program: bool = True, **kwargs) -> Report:
    """Says which matrix products of `function(*args, **kwargs)` run in FP4, and why the others do not.

    The function is traced and compiled, never run. To see the backward pass too, give it a function that takes the
    gradient: `jax.grad(loss)` or a training step.

    >>> import jax.numpy as jnp
    >>> found = report(lambda x, w: x @ w, jnp.ones((4, 32)), jnp.ones((32, 8)), compile_program=False)
    >>> print(found.summary())
    0 of 1 products, 0.0 % of matrix FLOPs, in FP4; 1 in high precision: not given to fp4jax (1)

    Args:
      function: plain, jitted or `nnx.jit`-ted.
      args, kwargs: its arguments; instead of an array a `jax.ShapeDtypeStruct` will do, instead of a module one from
        `nnx.eval_shape`. What is no array (a recipe's name, a flag) is static, as in a plain call.
      compile_program: also look at the compiled program: has the compiler kept the quantization, and are products
        native, fused or emulated? That takes as long as compiling takes.

    Returns:
      A `Report`; `print` it. A layer is named by the argument that holds its weights where that can be told.

    Raises:
      ValueError: `function` is not callable. What the function itself raises while it is traced.
    """
    traced = trace(function, args, kwargs)
    if not compile_program:
        return of_program(traced.name, traced.jaxpr, traced.arguments)
    executable = traced.lower().compile()
    platform = executable.runtime_executable().local_devices()[0].platform
    return of_program(traced.name, traced.jaxpr, traced.arguments, executable.as_text(), platform)


def of_program(
    name: str, jaxpr: Jaxpr, arguments: Sequence[str], optimized: str | None = None, platform: str = ""
) -> Report:
    """The report of a function that was traced, and compiled or not, elsewhere.

    Args:
      name: of the function; arguments: a name for each of its arrays.
      optimized: the compiled program as text, and platform: what it is for; None: it was not compiled.
    """
    products, opaque = find_products(jaxpr, arguments)
    rows, apart = rows_of(products)
    compiled = None
    if optimized is not None:
        compiled = check(optimized, platform)
        rows, apart = (tuple(_as_compiled(row, compiled) for row in part) for part in (rows, apart))
    return Report(name, rows, apart, tuple(opaque), compiled)


def _as_compiled(row: Row, compiled: CompiledCheck) -> Row:
    ways = compiled.execution.get((row.recipe, row.gemm, row.operands)) if row.execution else None
    if row.execution and row.reason == CORRECTION:
        ways = compiled.corrections.get((row.recipe, row.operands))
    return dataclasses.replace(row, execution=", ".join(ways)) if ways else row


def _by_reason(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.reason, []).append(row)
    return found


def _count(rows: Sequence[Row]) -> int:
    return sum(row.count for row in rows)
