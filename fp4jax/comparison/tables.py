"""What the report says: its sentences and tables from the records."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from fp4jax.comparison.pages import Table
from fp4jax.comparison.published import PUBLISHED
from fp4jax.comparison.records import Record
from fp4jax.comparison.statistics import Estimate, Pair, gaps, gaps_by_seed, pairs
from fp4jax.recipes import recipe

GAP_MEANS = (
    "Loss gap: how much higher the validation loss is than the baseline's, in per cent of it, at equal tokens and with "
    "the same seed (the same data from the same initial weights); mean over seeds. Interval: 95 %, Student's t. "
    "p: paired t test against no difference, not corrected; one seed gives neither."
)
CURVES_MEAN = (
    "Lines are means over seeds, bands reach from the lowest to the highest seed. The training loss is an exponential "
    "moving average over logged steps."
)
COST_MEANS = (
    "Step time is the mean of a run's last process, compilation, validation and saving apart; the median over seeds. "
    "On a machine that does other work, or several of these runs at a time (`--jobs`), ratios of times carry that. "
    "Products that are emulated cost more than the hardware's own would. Memory: the peak of the device, or of the "
    "process where a device keeps no count."
)
HEALTH_MEANS = "At the last measurement of each run, over all parameters, mean over seeds."
HEALTH_MISSING = "Not measured; `--config.health.every=N` measures the noise of every operand every N steps."
RECIPES_MEAN = "What happens to each operand of the three products."
PUBLISHED_MEANS = (
    "These numbers are other people's: their models, data, hardware and code. They are no measurement of this one."
)


def headline(records: Sequence[Record], baseline: str, primary: tuple[str, str] | None) -> Iterator[str]:
    """The result in a few sentences."""
    found = gaps(records, baseline)
    known = {name: gap for name, gap in found.items() if name != baseline and gap is not None}
    if known:
        best = min(known, key=lambda name: known[name].mean)
        listed = ", ".join(f"`{name}` {_gap(gap)} %" for name, gap in sorted(known.items(), key=lambda i: i[1].mean))
        yield f"**Smallest loss gap to `{baseline}`: `{best}`, {_gap(known[best])} %.** In order: {listed}."
        if known[best].n == 1:
            yield "One seed: there is no interval, and another seed may order the recipes otherwise."
    diverged = [f"`{record.recipe}` (seed {record.seed})" for record in records if record.diverged]
    if diverged:
        yield f"Diverged: {', '.join(diverged)}."
    for pair in pairs(records, baseline, primary):
        if pair.primary:
            yield f"Declared before the runs: {_verdict(pair)}"


def _verdict(pair: Pair) -> str:
    difference, p = pair.difference, pair.difference.p
    words = "smaller" if difference.mean < 0 else "larger"
    sure = "one seed: no test" if p is None else f"p = {_p(p)}, {difference.n} paired seeds"
    judged = "" if p is None or p < 0.05 else "; at this number of seeds that is no evidence of a difference"
    return (
        f"the gap of `{pair.first}` is {abs(difference.mean):.3f} percentage points {words} than that of "
        f"`{pair.second}` ({sure}){judged}."
    )


def gap_table(records: Sequence[Record], baseline: str) -> Table:
    """One row a recipe."""
    found, by_seed = gaps(records, baseline), gaps_by_seed(records, baseline)
    rows = []
    for name, gap in found.items():
        losses = [record.validation_loss for record in records if record.recipe == name and not record.diverged]
        diverged = sum(record.recipe == name and record.diverged is not None for record in records)
        seeds = ", ".join(f"{value:+.2f}" for value in by_seed[name].values())
        reference = name == baseline
        rows.append(
            (
                f"`{name}`",
                f"{np.mean(losses):.4f}" if losses else "",
                "baseline" if reference else _gap(gap),
                "" if reference else _p(gap.p if gap else None),
                "" if reference else seeds,
                f"{len(losses)}" + (f" ({diverged} diverged)" if diverged else ""),
            )
        )
    return Table(("recipe", "validation loss, nats", "loss gap, %", "p", "by seed, %", "seeds"), rows)


def pairs_note(primary: Sequence[str] | None) -> str:
    """How the table of pairs is to be read."""
    declared = f"`{primary[0]}` against `{primary[1]}`" if primary else "none"
    return (
        f"Paired over seeds: the first's loss gap minus the second's, in percentage points. Declared before the runs: "
        f"{declared}; every other comparison is secondary, its p corrected for their number by Holm's method."
    )


def pair_table(records: Sequence[Record], baseline: str, primary: tuple[str, str] | None) -> Table:
    """One row a pair of recipes."""
    rows = [
        (
            f"`{pair.first}` - `{pair.second}`" + (" (declared)" if pair.primary else ""),
            _gap(pair.difference),
            _p(pair.difference.p),
            "" if pair.primary else _p(pair.p_adjusted),
        )
        for pair in pairs(records, baseline, primary)
    ]
    return Table(("pair", "difference, points", "p", "p, corrected"), rows)


def cost_table(records: Sequence[Record], baseline: str) -> Table:
    """Time and memory, one row a recipe."""
    seconds = {name: _median(records, name, "seconds_per_step") for name in _names(records)}
    rows = []
    for name, value in seconds.items():
        of_recipe = [record for record in records if record.recipe == name]
        reference = seconds.get(baseline)
        memory = max(record.peak_memory_bytes for record in of_recipe) / 1e9
        rows.append(
            (
                f"`{name}`",
                "" if value is None else f"{1000 * value:,.0f}",
                "" if value is None or reference is None else f"{value / reference:.2f}",
                "" if value is None else f"{of_recipe[0].tokens_per_step / value:,.0f}",
                f"{memory:.2f} ({of_recipe[0].peak_memory_of})",
            )
        )
    return Table(("recipe", "ms a step", f"x {baseline}", "tokens/s", "peak memory, GB"), rows)


def health_tables(records: Sequence[Record]) -> list[Table]:
    """One table, or none if no run measured its health."""
    measured = [record for record in records if record.health]
    names = list(dict.fromkeys(key for record in measured for key in record.health))
    if not measured:
        return []
    rows = []
    for name in _names(measured):
        values = [[r.health.get(key) for r in measured if r.recipe == name] for key in names]
        known = [[value for value in column if value is not None] for column in values]
        rows.append((f"`{name}`", *(f"{np.mean(column):.4g}" if column else "" for column in known)))
    return [Table(("recipe", *(key.replace("_", " ") for key in names)), rows)]


def recipe_table(names: Sequence[str]) -> Table:
    """Six operands a recipe."""
    return Table(
        ("recipe", "forward: X, W", "input gradient: D, W", "weight gradient: X, D"),
        [
            (f"`{name}`", *(f"{gemm.lhs}; {gemm.rhs}" for gemm in (value.fprop, value.dgrad, value.wgrad)))
            for name in names
            for value in [recipe(name)]
        ],
        numbers=False,
    )


def published_table() -> Table:
    """`PUBLISHED`."""
    return Table(("recipe", "model", "loss gap, %", "source"), [(f"`{p.recipe}`", *p[1:]) for p in PUBLISHED], False)


def made_by(records: Sequence[Record], declaration: dict, command: str) -> list[str]:
    """Command, configuration, devices, versions."""
    devices = ", ".join(sorted({record.device for record in records}))
    versions = ", ".join(sorted({f"JAX {record.jax}" for record in records}))
    seeds = ", ".join(map(str, sorted({record.seed for record in records})))
    config = json.dumps(declaration["config"])
    return [f"`{command}`", f"Seeds {seeds}. {devices}. {versions}.", f"Configuration of every run: `{config}`"]


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.recipe for record in records))


def _median(records: Sequence[Record], name: str, field: str) -> float | None:
    values = [getattr(record, field) for record in records if record.recipe == name]
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _gap(gap: Estimate | None) -> str:
    if gap is None:
        return "diverged"
    return f"{gap.mean:+.2f}" + ("" if gap.half_width is None else f" ± {gap.half_width:.2f}")


def _p(p: float | None) -> str:
    return "" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")
