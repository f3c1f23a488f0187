"""`health.jsonl` as arrays, and what is worth saying about its last step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from fp4jax.data.json_files import check_fields
from fp4jax.training.health import OPERAND_RATIOS, OPERANDS, STOP_RATIO, WGRAD, WGRAD_RATIOS
from fp4jax.training.metrics import HEALTH_FILE, read_metrics

_SUMMARY = ("gradient_cosine", "gradient_to_noise", "loss_gap")
RATIOS = OPERAND_RATIOS | WGRAD_RATIOS


@dataclass(frozen=True)
class Health:
    """Measurements at S steps of a model with N linear layers, counted over its depth: linears × layers.

    steps: in ascending order. names: of the rows below, "layers.3.mlp.down_proj", all layers of a linear together.
    ratios: by ratio and operand; NaN where one is not defined. summary: numbers of the whole model.
    """

    steps: Int[np.ndarray, " S"]
    names: tuple[str, ...]
    ratios: dict[str, dict[str, Float[np.ndarray, "N S"]]]
    summary: dict[str, Float[np.ndarray, " S"]]

    @property
    def groups(self) -> dict[str, int]:
        """Linear layer → number of its rows, in their order."""
        linears = [name.split(".", 2)[2] for name in self.names]
        return {linear: linears.count(linear) for linear in dict.fromkeys(linears)}


def load_health(workdir: str | Path) -> Health:
    """Reads the health of a run.

    Raises:
      ValueError: none was measured there, or the file is damaged.
    """
    lines = read_metrics(workdir, HEALTH_FILE)
    if not lines:
        raise ValueError(
            f"{workdir} holds no {HEALTH_FILE}; train with --config.health.every=100 in this --workdir first"
        )
    tables = [{name: values for name, values in line.items() if "/" in name} for line in lines]
    _check(Path(workdir) / HEALTH_FILE, lines, tables)
    linears = {name.rpartition("/")[2]: len(values) for table in tables for name, values in table.items()}
    linears = dict(sorted(linears.items()))
    names = tuple(f"layers.{layer}.{linear}" for linear, layers in linears.items() for layer in range(layers))

    def column(table: dict, ratio: str, operand: str) -> list[float]:
        missing = {linear: [None] * layers for linear, layers in linears.items()}
        rows = [table.get(f"{ratio}/{operand}/{linear}", missing[linear]) for linear in linears]
        return [np.nan if value is None else float(value) for values in rows for value in values]

    ratios = {
        ratio: {operand: np.array([column(table, ratio, operand) for table in tables]).T for operand in operands}
        for ratio, operands in _operands().items()
    }
    summary = {
        name: np.array([np.nan if line.get(name) is None else line[name] for line in lines], np.float64)
        for name in dict.fromkeys(name for line in lines for name in line)
        if name != "step" and "/" not in name
    }
    return Health(np.array([line["step"] for line in lines]), names, ratios, summary)


def _check(path: Path, lines: list[dict], tables: list[dict]) -> None:
    """Raises ValueError for what no measurement wrote: numbers of another type, or of another number of layers."""
    lengths: dict[str, int] = {}
    for line, table in zip(lines, tables, strict=True):
        try:
            check_fields(line, dict.fromkeys([*_SUMMARY, *(name for name in line if name not in table)], float | None))
            check_fields(table, dict.fromkeys(table, list[float | None]))
            for name, values in table.items():
                if lengths.setdefault(name.rpartition("/")[2], len(values)) != len(values):
                    raise ValueError(f"field {name!r} has another number of layers")
        except ValueError as error:
            raise ValueError(f"{path}, step {line['step']} is damaged ({error}); remove that line") from None


def _operands() -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(OPERAND_RATIOS, OPERANDS) | dict.fromkeys(WGRAD_RATIOS, (WGRAD,))


def describe(health: Health) -> Iterator[str]:
    """Lines about the last measurement: the whole model, the stop rule, and every ratio's median and extreme."""
    last = {name: values[-1] for name, values in health.summary.items()}
    yield (
        f"{len(health.steps)} measurements, steps {health.steps[0]:,} to {health.steps[-1]:,}; "
        f"{len(health.names)} linear layers"
    )
    yield (
        f"step {health.steps[-1]:,}, all parameters: cosine to the exact gradient {last['gradient_cosine']:.4f}, "
        f"|gradient| / |noise| {last['gradient_to_noise']:.3g}, loss gap {last['loss_gap']:+.4f} nats"
    )
    of_layers = health.ratios["gradient_to_noise"][WGRAD][:, -1]
    if not np.isnan(last["gradient_to_noise"]):
        below = last["gradient_to_noise"] < STOP_RATIO
        yield (
            f"stop rule, |gradient| < sqrt(3) |noise|: {'met' if below else 'not met'}; "
            f"met by {np.sum(of_layers < STOP_RATIO)} of {len(health.names)} linear layers alone"
        )
    yield f"{'ratio':18}{'operand':9}{'median':>10}{'extreme':>10}  of"
    for ratio, by_operand in health.ratios.items():
        for operand, values in by_operand.items():
            now = values[:, -1]
            if np.all(np.isnan(now)):
                continue
            row = int(np.nanargmin(now) if RATIOS[ratio] else np.nanargmax(now))
            yield f"{ratio:18}{operand:9}{np.nanmedian(now):10.4g}{now[row]:10.4g}  {health.names[row]}"
