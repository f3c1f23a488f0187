"""A report's rows as text: layers that differ in nothing but their number share a line."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from fp4jax.reporting.rows import Row

_NUMBER = re.compile(r"\d+")
_HEAD = ("layer", "GEMM", "operands' shapes", "recipe", "formats", "runs", "times", "% FLOPs", "why not FP4")
_RIGHT = {"times", "% FLOPs"}


def layer_table(rows: Sequence[Row], total: int) -> list[str]:
    """Lines of a table of `rows`, whose FLOPs are compared with `total`."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        named = row.layer != row.source
        layer = _NUMBER.sub("#", row.layer) if named else row.layer
        same = dataclasses.replace(row, layer=layer, source="", count=0, flops=0)
        groups.setdefault(same, []).append(row)
    cells = [_cells(group, total) for group in groups.values()]
    if not cells:
        return ["no matrix product"]
    shown = [column for column in range(len(_HEAD)) if any(row[column] for row in cells)]
    widths = {column: max(len(row[column]) for row in (_HEAD, *cells)) for column in shown}
    lines = [_line(_HEAD, widths), "-" * (sum(widths.values()) + 2 * (len(widths) - 1))]
    return lines + [_line(row, widths) for row in cells]


def plural(count: int, noun: str) -> str:
    """Says "1 correction of a split" or "3 x correction of a split"."""
    return f"1 {noun}" if count == 1 else f"{count:,} x {noun}"


def _line(cells: Sequence[str], widths: dict[int, int]) -> str:
    padded = (
        cells[column].rjust(width) if _HEAD[column] in _RIGHT else cells[column].ljust(width)
        for column, width in widths.items()
    )  # fmt: skip
    return "  ".join(padded).rstrip()


def _cells(rows: Sequence[Row], total: int) -> tuple[str, ...]:
    first, layers = rows[0], [row.layer for row in rows]
    percent = 100 * sum(row.flops for row in rows) / total if total else 0.0
    return (
        layers[0] if len(set(layers)) == 1 else _joined(layers),
        f"{first.gemm} again" if first.recomputed else first.gemm,
        first.shape,
        first.recipe or "",
        " x ".join(first.operands),
        first.execution,
        f"{sum(row.count for row in rows):,}",
        f"{percent:.2f}",
        ", ".join(filter(None, (first.reason, first.note))),
    )


def _joined(names: Sequence[str]) -> str:
    """Says "layers.0-27.mlp" for names that differ in their numbers alone."""
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    found = iter([_range(sorted({int(number) for number in column})) for column in columns])
    return _NUMBER.sub(lambda _: next(found), names[0])


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    is_run = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]}-{numbers[-1]}" if is_run else "{" + ",".join(map(str, _shortened(numbers))) + "}"


def _shortened(numbers: Sequence[int]) -> Iterable[int | str]:
    return numbers if len(numbers) <= 6 else [*numbers[:3], "...", numbers[-1]]
