"""Rewrites the tables of RESULTS.md and docs/ that are made from committed JSON; --check only says whether they are so.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.

    python -m scripts.results_tables [--check]
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fp4jax.analysis.ptq.measure import Measurement, Sample
from fp4jax.comparison.report import read_numbers
from fp4jax.comparison.tables import gap_table, pair_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "RESULTS.md",
    "docs/recipes.md",
    "docs/faults.md",
    "docs/benchmarks.md",
    "docs/mean_bias.md",
    "docs/profile.md",
)
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def ptq() -> str:
    """Every recipe on a pretrained model, the smallest loss gap first; activations alone beside it."""
    found = _measurements("results/ptq/ptq.json")
    order = sorted((name for name in found if not name.endswith("+w_bf16")), key=lambda name: found[name].loss_gap)
    half = ("loss gap, %", "gradient error", "cosine")
    rows = [(f"`{name}`", *_ptq_cells(found[name]), *_ptq_cells(found.get(f"{name}+w_bf16"))) for name in order]
    return _table(("recipe", *half, *(f"activations alone: {half[0]}", *half[1:])), rows)


def search() -> str:
    """Operands for X alone, in the order in which they were tried."""
    found = json.loads((ROOT / "results/ptq/search.json").read_text(encoding="utf-8"))
    measurements = [Measurement(name, tuple(Sample(**s) for s in samples)) for name, samples in found.items()]
    rows = [(m.recipe, f"{100 * m.loss_gap:.2f}", f"{m.mean('divergence'):.3f}".lstrip("0")) for m in measurements]
    return _table(("X", "loss gap, %", "divergence"), rows)


def fuzzing() -> str:
    """How many damaged inputs every reader was given, and what came out."""
    readers = json.loads((ROOT / "results/faults/fuzz.json").read_text(encoding="utf-8"))["readers"]
    header = ("reader", "inputs", "read", "refused", "anything else")
    rows = [
        (name, *(f"{found.get(key, 0):,}" for key in ("examples", "read", "refused", "uncaught")))
        for name, found in readers.items()
    ]
    return _table(header, rows)


TIMES = {"wall": "wall", "cpu": "processor"}


def overheads() -> str:
    """What saves and reading data cost, and whether memory grows."""
    memory = json.loads((ROOT / "results/faults/memory.json").read_text(encoding="utf-8"))
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
    time = json.loads((ROOT / "results/faults/overheads.json").read_text(encoding="utf-8"))
    where = f"{time['commit']}, {time['machine']}"
    saving = f"saving asynchronously every {time['every']} steps, `configs/averis_tiny.py`, {time['pairs']} pairs"
    rows += [(f"{saving}: {what} time", _cost_of_saving(time[kind]), where) for kind, what in TIMES.items()]
    rows.append(("waiting for data, same run: share of the time", f"{100 * time['data_wait']['share']:.2f} %", where))
    return _table(("what", "measured", "commit and machine"), rows)


H200 = ROOT / "benchmarks/results/nvidia_h200"


def kernels() -> str:
    """Every kernel over the shapes that were measured."""
    measured = json.loads((H200 / "kernels.json").read_text(encoding="utf-8"))
    rows = [
        (
            f"`{row['operation']}`",
            f"{row['tokens']} x {row['features']}",
            f"{row['kernel_us']:.0f}",
            f"{row['kernel_gb_s']:,.0f}",
            f"{100 * row['share_of_copy_bandwidth']:.0f} %",
            f"{row['xla_over_kernel']:.1f}",
        )
        for row in sorted(measured["rows"], key=lambda row: (row["operation"], row["tokens"], row["features"]))
    ]
    header = ("kernel, bfloat16", "tokens x features", "us", "GB/s", "of XLA's copy", "XLA's time over the kernel's")
    return _table(header, rows)


def step() -> str:
    """The training step by recipe and backend, relative to the references of the same run."""
    measured = json.loads((H200 / "step.json").read_text(encoding="utf-8"))
    rows = [
        (
            f"`{row['recipe']}`",
            f"{1e3 * row['median_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{(row['held_bytes'] + row['temporary_bytes']) / 2**30:.1f}",
            *(_ratio(row.get(f"over_{reference}")) for reference in ("bf16", "nvfp4")),
        )
        for row in measured["rows"]
    ]
    return _table(("recipe", "ms", "tokens/s", "GiB", "over `bf16`", "over `nvfp4`"), rows)


def gaps(name: str) -> str:
    """Loss gaps alone of the comparison in results/NAME."""
    numbers, records = read_numbers(ROOT / "results" / name)
    table = gap_table(records, numbers["declaration"]["baseline"])
    return _table(table.header, table.rows)


CPU = ROOT / "benchmarks/results/x86_64_cpu"


def step_tiny_cpu() -> str:
    """The tiny configuration's step by recipe, in processor time on one core."""
    measured = json.loads((CPU / "step_tiny.json").read_text("utf-8"))
    rows = [
        (
            f"`{row['recipe']}`",
            f"{1e3 * row['median_seconds']:.0f}",
            f"{row['temporary_bytes'] / 2**20:.0f}",
            *(_ratio(row.get(f"over_{reference}")) for reference in ("bf16", "nvfp4")),
        )
        for row in measured["rows"]
    ]
    return _table(("recipe", "ms", "temporary MiB", "over `bf16`", "over `nvfp4`"), rows)


def tokens_of_a_batch() -> str:
    """Processor time of a token by the tokens in a batch."""
    files = [
        json.loads((CPU / f"step_tiny_{sequences}_sequences.json").read_text("utf-8")) for sequences in (8, 16, 32, 64)
    ]
    tokens = [measured["sequences"] * measured["length"] for measured in files]
    by_recipe: dict[str, list[float]] = {}
    for measured, size in zip(files, tokens, strict=True):
        for row in measured["rows"]:
            by_recipe.setdefault(row["recipe"], []).append(1e6 * row["median_seconds"] / size)
    header = ("recipe", *(f"{size:,} tokens" for size in tokens), "largest over smallest")
    rows = [
        (f"`{recipe}`", *(f"{cost:.0f} us" for cost in costs), f"{max(costs) / min(costs):.2f}")
        for recipe, costs in by_recipe.items()
    ]
    return _table(header, rows)


def step_0p6b_cpu() -> str:
    """The step of Qwen3-0.6B with 512 tokens."""
    measured = json.loads((CPU / "step_0p6b.json").read_text("utf-8"))
    rows = [
        (
            f"`{row['recipe']}`",
            f"{row['median_seconds']:.1f}",
            f"{(row['held_bytes'] + row['temporary_bytes']) / 1e9:.1f}",
            f"{row['compile_seconds']:.0f}",
            _ratio(row.get("over_bf16")),
        )
        for row in measured["rows"]
    ]
    return _table(("recipe", "s", "GB, by the compiler", "trace and compile, s", "over `bf16`"), rows)


def profile() -> str:
    """Milliseconds of a step by part."""
    rows = json.loads((CPU / "profile_tiny.json").read_text("utf-8"))["rows"]
    parts = tuple(rows[0]["seconds"])
    return _table(
        ("recipe", *(part.replace("_", " ") for part in parts), "together"),
        [
            (
                f"`{row['recipe']}`",
                *(f"{1e3 * s:.1f}" for s in (*row["seconds"].values(), sum(row["seconds"].values()))),
            )
            for row in rows
        ],
    )


def peers(what: str) -> str:
    """A linear layer or a transformer under every contender, in processor time on one core."""
    measured = json.loads((CPU / f"peers_{what}.json").read_text("utf-8"))
    kinds = {"y": "error of y", "dx": "of dX", "dw": "of dW", "loss": "error of loss", "gradient": "of the gradient"}
    shown = [name for name in kinds if name in measured["rows"][0]["relative_error"]]
    rows = [
        (
            f"`{row['contender']}`",
            f"{1e3 * row['median_seconds']:.1f}",
            *(_ratio(row.get(f"over_{reference}")) for reference in ("f32", "nvfp4")),
            *(f"{row['relative_error'][name]:.2g}" for name in shown),
            "; ".join(f"{count} {product}" for product, count in sorted(row["products"].items())),
            f"{row['temporary_bytes'] / 2**20:.0f}",
            f"{row['trace_seconds'] + row['compile_seconds']:.1f}",
        )
        for row in measured["rows"]
    ]
    header = ("contender", "ms", "over `f32`", "over `nvfp4`", *(kinds[name] for name in shown))
    return _table((*header, "products", "temporary MiB", "trace and compile, s"), rows)


def comparison(name: str) -> str:
    """Loss gaps, and their differences paired over seeds, of the comparison in results/NAME."""
    numbers, records = read_numbers(ROOT / "results" / name)
    declared = numbers["declaration"]
    primary = declared["primary"] and tuple(declared["primary"])
    tables = gap_table(records, declared["baseline"]), pair_table(records, declared["baseline"], primary)
    return "\n\n".join(_table(table.header, table.rows) for table in tables)


def _ratio(found: dict | None) -> str:
    return "" if found is None else f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _cost_of_saving(times: dict) -> str:
    total, median, pairs = (times[f"cost_of_{what}"] for what in ("saving_total", "saving_median", "each_pair"))
    low, high = min(pairs), max(pairs)
    return f"{100 * total:+.1f} % in all, median {100 * median:+.1f} %, pairs {100 * low:+.1f} to {100 * high:+.1f} %"


def plan() -> str:
    """Temporary memory of one step under two recipes, by what the backward recomputes, and who multiplies."""
    rows = []
    for remat in ("linear_inputs", "none"):
        averis, bf16 = (_plans(f"{recipe}_0p6b_{remat}") for recipe in ("averis", "bf16"))
        for target, found in averis.items():
            ours, theirs = (plan["memory"]["temporaries"] / 2**30 for plan in (found, bf16[target]))
            sizes = f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.3f}"
            rows.append((f"`{target}`", f"`{remat}`", *sizes, _fp4_products(found), _kernels(found["kernels"])))
    return _table(("target", "remat", "averis, GiB", "bf16, GiB", "ratio", "FP4 products", "kernels"), rows)


def clusters() -> str:
    """One step of a whole batch on many devices: memory, work and what travels."""
    rows = []
    for found in _cluster_plans():
        mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
        together = sum(of["bytes"] for of in found["collectives"].values())
        between = sum(found["between_machines"].values()) / 1e9
        numbers = (
            f"{found['memory']['peak'] / 2**30:.1f}",
            f"{found['matrix_flops']:.3g}",
            f"{found['bytes_accessed'] / 1e12:.2f}",
            f"{together / 1e9:.1f}",
            f"{between:.1f}" if found["target"][0] != "v" else "one network",
            f"{found['weight_gathers'] / 1e9:.2f}",
        )
        name = Path(found["config"]).stem
        rows.append((f"`{found['target']}`", f"`{name}`", mesh, str(found["microbatches"]), *numbers))
    header = ("target", "configuration", "mesh", "microbatches", "peak, GiB", "matrix FLOPs, all devices")
    travels = ("memory traffic, TB", "collectives, GB", "of these between machines", "gathered kernels, GB")
    return _table((*header, *travels), rows)


H200_FLOPS = 0.4 * 989e12
"""Of a second: its peak in bfloat16, of which four tenths are assumed to be reached."""
ON_MACHINE, BETWEEN_MACHINES = 450e9, 50e9
"""Bytes a second that one GPU sends: NVLink's and a 400 Gb/s adapter's, both as on the label."""


def scaling() -> str:
    """What the model of bandwidths predicts from 8 to more H200: the same batch, faster."""
    rows, first = [], {}
    for found in _cluster_plans():
        if not found["target"].startswith("h200") or "0p6b" not in found["config"]:
            continue
        devices = found["devices"]
        compute = found["matrix_flops"] / devices / H200_FLOPS
        everywhere = _sent({kind: of["bytes"] for kind, of in found["collectives"].items()})
        between = _sent(found["between_machines"])
        travel = (everywhere - between) / ON_MACHINE + between / BETWEEN_MACHINES
        name = Path(found["config"]).stem
        times = compute + travel, max(compute, travel)
        first.setdefault(name, [devices * time for time in times])
        efficiencies = [start / (devices * time) for start, time in zip(first[name], times, strict=True)]
        rows.append((f"`{name}`", str(devices), f"{compute:.3f}", f"{travel:.3f}", *(f"{e:.2f}" for e in efficiencies)))
    efficiency = "efficiency over 8 devices, nothing overlaps", "all of it overlaps"
    return _table(("configuration", "H200", "products, s", "collectives, s", *efficiency), rows)


def _sent(collectives: dict[str, int]) -> float:
    """Bytes that a device sends: in rings, where a sum for all goes round twice."""
    return sum((2 if kind == "all-reduce" else 1) * size for kind, size in collectives.items())


def _cluster_plans() -> list[dict]:
    return json.loads((ROOT / "results/plan/clusters.json").read_text(encoding="utf-8"))["plans"]


def layouts() -> str:
    """Eight devices against one: the first step, and all steps beside runs that began one ulp apart."""
    results = json.loads((ROOT / "results/layouts/layouts.json").read_text(encoding="utf-8"))["results"]
    rows = []
    for model, recipes in results.items():
        for recipe, found in recipes.items():
            envelope = f"{found['envelope']:.1e}" if "envelope" in found else ""
            for name, mesh in found["meshes"].items():
                numbers = (f"{mesh[key]:.1e}" for key in ("first_loss", "first_gradients", "distance"))
                rows.append((f"`{model}`", f"`{recipe}`", name, *numbers, envelope))
    first = "first step: loss", "gradients (worst parameter)"
    return _table(("model", "recipe", "mesh", *first, "20 steps: loss", "five runs one ulp apart"), rows)


def _plans(name: str) -> dict[str, dict]:
    plans = json.loads((ROOT / f"results/plan/{name}.json").read_text(encoding="utf-8"))["plans"]
    return {plan["target"]: plan for plan in plans}


def _fp4_products(plan: dict) -> str:
    """Of the linear layers; without those that remat computes again."""
    ways: dict[str, int] = {}
    for gemm in ("fprop", "dgrad", "wgrad"):
        for way, count in plan["gemms"][gemm].items():
            ways[way] = ways.get(way, 0) + count
    return ", ".join(f"{count} {way}" for way, count in ways.items())


def _kernels(kernels: Sequence[dict]) -> str:
    if not kernels:
        return "none"
    registers = max(kernel["registers"] for kernel in kernels)
    return f"{len(kernels)}, {registers} registers at most, {sum(k['spill_bytes'] for k in kernels)} bytes spilled"


STEPS_SHOWN = (25, 50, 100, 150, 200)
MEASURES = {
    "mean's share of the energy": lambda site: site["energy"]["mean"],
    "mean's share of the top 0.1 %": lambda site: site["top"]["mean"],
}


def mean_over_training() -> str:
    """What the mean of a small model's last block holds, by step of its training."""
    rows = []
    for recipe in ("bf16", "averis"):
        path = ROOT / f"results/mean_bias/tiny_{recipe}/figures.json"
        found = json.loads(path.read_text(encoding="utf-8"))["results"]
        for site in ("attention input", "MLP input"):
            last = [found[f"{recipe} step {step}"]["sites"][site][-1] for step in STEPS_SHOWN]
            for name, measure in MEASURES.items():
                rows.append((f"`{recipe}`", site, name, *(f"{measure(layer):.3f}".lstrip("0") for layer in last)))
    return _table(("recipe", "last block's", "measure", *(f"step {step}" for step in STEPS_SHOWN)), rows)


TABLES: dict[str, Callable[[], str]] = {
    "ptq": ptq,
    "search": search,
    "fuzzing": fuzzing,
    "overheads": overheads,
    "kernels": kernels,
    "step": step,
    "step_tiny_cpu": step_tiny_cpu,
    "step_0p6b_cpu": step_0p6b_cpu,
    "tokens_of_a_batch": tokens_of_a_batch,
    "profile": profile,
    "peers": functools.partial(peers, "linear_2048x512x1536"),
    "peers_transformer": functools.partial(peers, "transformer"),
    "compare_60m": functools.partial(comparison, "compare_60m"),
    "compare_tiny": functools.partial(comparison, "compare_tiny"),
    "ablations": functools.partial(gaps, "ablations"),
    "continue_smollm2": functools.partial(gaps, "continue_smollm2"),
    "plan": plan,
    "clusters": clusters,
    "scaling": scaling,
    "layouts": layouts,
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
    found = json.loads((ROOT / path).read_text(encoding="utf-8"))["measurements"]
    return {name: Measurement(name, tuple(Sample(**s) for s in value["samples"])) for name, value in found.items()}


def _ptq_cells(measurement: Measurement | None) -> tuple[str, str, str]:
    if measurement is None:
        return ("not run",) * 3
    gap, error = 100 * measurement.loss_gap, 100 * measurement.loss_gap_error
    return f"{gap:.2f} ± {error:.2f}", f"{measurement.mean('gradient_error'):.3f}", f"{measurement.mean('cosine'):.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


if __name__ == "__main__":
    sys.exit(main())
