"""Rewrites the tables of RESULTS.md and docs/ that are made from committed JSON; --check only says whether they are so.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.

    python -m scripts.results_tables [--check]
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence

from fp4jax.analysis.ptq.measure import Measurement, Sample
from fp4jax.comparison.report import read_numbers
from fp4jax.comparison.tables import gap_table, pair_table
from scripts import cluster_tables, speed_tables
from scripts.markdown import ROOT, read, table

PAGES = (
    "RESULTS.md",
    "docs/clusters.md",
    "docs/evaluation.md",
    "docs/recipes.md",
    "docs/faults.md",
    "docs/benchmarks.md",
    "docs/mean_bias.md",
    "docs/plan.md",
    "docs/profile.md",
)
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def ptq() -> str:
    """Every recipe on a pretrained model, the smallest loss gap first; activations alone beside it."""
    found = _measurements("results/ptq/ptq.json")
    order = sorted((name for name in found if not name.endswith("+w_bf16")), key=lambda name: found[name].loss_gap)
    half = ("loss gap, %", "gradient error", "cosine")
    rows = [(f"`{name}`", *_ptq_cells(found[name]), *_ptq_cells(found.get(f"{name}+w_bf16"))) for name in order]
    return table(("recipe", *half, *(f"activations alone: {half[0]}", *half[1:])), rows)


def search() -> str:
    """Operands for X alone, in the order in which they were tried."""
    found = read("results/ptq/search.json")
    measurements = [Measurement(name, tuple(Sample(**s) for s in samples)) for name, samples in found.items()]
    rows = [(m.recipe, f"{100 * m.loss_gap:.2f}", f"{m.mean('divergence'):.3f}".lstrip("0")) for m in measurements]
    return table(("X", "loss gap, %", "divergence"), rows)


def fuzzing() -> str:
    """How many damaged inputs every reader was given, and what came out."""
    readers = read("results/faults/fuzz.json")["readers"]
    header = ("reader", "inputs", "read", "refused", "anything else")
    rows = [
        (name, *(f"{found.get(key, 0):,}" for key in ("examples", "read", "refused", "uncaught")))
        for name, found in readers.items()
    ]
    return table(header, rows)


def downstream() -> str:
    """Accuracies of SmolLM2-135M on whole sets of documents, by recipe."""
    paths = (ROOT / f"results/evaluation/smollm2-135m-{recipe}.json" for recipe in DOWNSTREAM)
    records = {path.stem.removeprefix("smollm2-135m-"): read(path) for path in paths if path.exists()}
    tasks = sorted({task for record in records.values() for task in record["tasks"]})
    cells = [(record, metric) for record in records.values() for metric in ("acc", "acc_norm")]
    header = [f"`{recipe}` {metric}" for recipe in records for metric in ("acc", "acc_norm")]
    rows = [(task, *(_accuracy(record["tasks"].get(task), metric) for record, metric in cells)) for task in tasks]
    return table(("task", *header), rows)


DOWNSTREAM = ("bf16", "nvfp4", "averis_centered")


def _accuracy(task: dict | None, metric: str) -> str:
    """In percent ± standard error; nothing for a task that was not run, or that has no such metric."""
    if task is None or metric not in task["metrics"]:
        return ""
    found = task["metrics"][metric]
    return f"{100 * found['value']:.1f} ± {100 * found['stderr']:.1f}"


TIMES = {"wall": "wall", "cpu": "processor"}


def overheads() -> str:
    """What saves and reading data cost, and whether memory grows."""
    memory = read("results/faults/memory.json")
    in_use, own = memory["in_use"], memory["own"]["held_mb"]
    steps = f"{memory['steps']:,} steps with a save and a validation every {memory['saves_and_validations_every']}"
    rows = [
        (
            f"memory in use, {steps}: last {memory['window_steps']} steps over the first after the warm-up",
            f"{100 * in_use['last_over_first']:+.2f} % of {in_use['held_mb'][0]:.1f} MB, a window at most "
            f"{100 * in_use['largest_distance_from_first']:+.2f} % from the first",
            f"{memory['commit']}, {memory['machine']}",
        ),
        (
            "the process's anonymous pages in the same windows, which the allocator and the system decide about too",
            f"{own[0]:.0f} MB, then {min(own[1:]):.0f} to {max(own[1:]):.0f} MB",
            f"{memory['commit']}, {memory['machine']}",
        ),
    ]
    time = read("results/faults/overheads.json")
    where = f"{time['commit']}, {time['machine']}"
    saving = f"saving asynchronously every {time['every']} steps, `configs/averis_tiny.py`, {time['pairs']} pairs"
    rows += [(f"{saving}: {what} time", _cost_of_saving(time[kind]), where) for kind, what in TIMES.items()]
    rows.append(("waiting for data, same run: share of the time", f"{100 * time['data_wait']['share']:.2f} %", where))
    return table(("what", "measured", "commit and machine"), rows)


def gaps(name: str) -> str:
    """Loss gaps alone of the comparison in results/NAME."""
    numbers, records = read_numbers(ROOT / "results" / name)
    found = gap_table(records, numbers["declaration"]["baseline"])
    return table(found.header, found.rows)


def comparison(name: str) -> str:
    """Loss gaps, and their differences paired over seeds, of the comparison in results/NAME."""
    numbers, records = read_numbers(ROOT / "results" / name)
    declared = numbers["declaration"]
    primary = declared["primary"] and tuple(declared["primary"])
    tables = gap_table(records, declared["baseline"]), pair_table(records, declared["baseline"], primary)
    return "\n\n".join(table(each.header, each.rows) for each in tables)


def _cost_of_saving(times: dict) -> str:
    total, median, pairs = (times[f"cost_of_{what}"] for what in ("saving_total", "saving_median", "each_pair"))
    low, high = min(pairs), max(pairs)
    return f"{100 * total:+.1f} % in all, median {100 * median:+.1f} %, pairs {100 * low:+.1f} to {100 * high:+.1f} %"


STEPS_SHOWN = (25, 50, 100, 150, 200)
MEASURES = {
    "mean's share of the energy": lambda site: site["energy"]["mean"],
    "mean's share of the top 0.1 %": lambda site: site["top"]["mean"],
}


def mean_over_training() -> str:
    """What the mean of a small model's last block holds, by step of its training."""
    rows = []
    for recipe in ("bf16", "averis"):
        found = read(f"results/mean_bias/tiny_{recipe}/figures.json")["results"]
        for site in ("attention input", "MLP input"):
            last = [found[f"{recipe} step {step}"]["sites"][site][-1] for step in STEPS_SHOWN]
            for name, measure in MEASURES.items():
                rows.append((f"`{recipe}`", site, name, *(f"{measure(layer):.3f}".lstrip("0") for layer in last)))
    return table(("recipe", "last block's", "measure", *(f"step {step}" for step in STEPS_SHOWN)), rows)


TABLES: dict[str, Callable[[], str]] = {
    "ptq": ptq,
    "search": search,
    "fuzzing": fuzzing,
    "overheads": overheads,
    "kernels": speed_tables.kernels,
    "step": speed_tables.step,
    "step_tiny_cpu": speed_tables.step_tiny_cpu,
    "step_0p6b_cpu": speed_tables.step_0p6b_cpu,
    "tokens_of_a_batch": speed_tables.tokens_of_a_batch,
    "profile": speed_tables.profile,
    "peers": functools.partial(speed_tables.peers, "linear_2048x512x1536"),
    "peers_transformer": functools.partial(speed_tables.peers, "transformer"),
    "compare_60m": functools.partial(comparison, "compare_60m"),
    "compare_tiny": functools.partial(comparison, "compare_tiny"),
    "ablations": functools.partial(gaps, "ablations"),
    "continue_smollm2": functools.partial(gaps, "continue_smollm2"),
    "plan": cluster_tables.plan,
    "plan_b200": functools.partial(cluster_tables.plan_of, "b200:1", "averis_0p6b_linear_inputs"),
    "traffic": cluster_tables.traffic,
    "products": cluster_tables.products,
    "clusters": cluster_tables.clusters,
    "scaling": cluster_tables.scaling,
    "layouts": cluster_tables.layouts,
    "collectives": cluster_tables.collectives,
    "downstream": downstream,
    "mean_over_training": mean_over_training,
}


def current(text: str) -> str:
    """`text` with every marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if --check finds a table that is not what its JSON says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(arguments).check
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (made := current(text)) != text:
            stale.append(page)
            if not check:
                path.write_text(made, encoding="utf-8")
    if stale:
        print(f"{'not current' if check else 'rewritten'}: {', '.join(stale)}")
    else:
        print("every table is what its JSON says")
    return int(check and bool(stale))


def _measurements(path: str) -> dict[str, Measurement]:
    found = read(path)["measurements"]
    return {name: Measurement(name, tuple(Sample(**s) for s in value["samples"])) for name, value in found.items()}


def _ptq_cells(measurement: Measurement | None) -> tuple[str, str, str]:
    if measurement is None:
        return ("not run",) * 3
    gap, error = 100 * measurement.loss_gap, 100 * measurement.loss_gap_error
    return f"{gap:.2f} ± {error:.2f}", f"{measurement.mean('gradient_error'):.3f}", f"{measurement.mean('cosine'):.3f}"


if __name__ == "__main__":
    sys.exit(main())
