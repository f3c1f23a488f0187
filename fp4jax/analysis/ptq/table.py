"""The table of several recipes' measurements."""

from collections.abc import Sequence

from fp4jax.analysis.ptq.measure import Measurement

_HEADER = ("recipe", "loss", "gap %", "± %", "KL (nats)", "gradient error", "cosine")


def render(title: str, measurements: Sequence[Measurement]) -> str:
    """Aligned text: one row a recipe, in the order given."""
    rows = [_HEADER, *(_row(measurement) for measurement in measurements)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths,
             strict=True))) for row in rows]  # fmt: skip
    return "\n".join([title, *lines])


def _row(measurement: Measurement) -> tuple[str, ...]:
    error, cosine = measurement.mean("gradient_error"), measurement.mean("cosine")
    return (
        measurement.recipe,
        f"{measurement.mean('loss'):.4f}",
        f"{100 * measurement.loss_gap:.2f}",
        f"{100 * measurement.loss_gap_error:.2f}",
        f"{measurement.mean('divergence'):.4f}",
        "" if error is None else f"{error:.4f}",
        "" if cosine is None else f"{cosine:.5f}",
    )
