"""Tables of times: an H200's, and a CPU's."""

from collections.abc import Callable
from pathlib import Path

from scripts.markdown import ratio, read, table

H200, CPU = (Path("benchmarks/results", device) for device in ("nvidia_h200", "x86_64_cpu"))
OVER_BOTH = (lambda row: ratio(row.get("over_bf16")), lambda row: ratio(row.get("over_nvfp4")))


def kernels() -> str:
    """Every kernel over the shapes that were measured."""
    measured = read(H200 / "kernels.json")
    rows = [
        (
            f"`{row['operation']}`",
            " x ".join(str(row[size]) for size in ("batch", "tokens", "features") if row.get(size, 1) > 1),
            f"{row['kernel_us']:.0f}",
            f"{row['kernel_gb_s']:,.0f}",
            f"{100 * row['share_of_copy_bandwidth']:.0f} %",
            f"{row['xla_over_kernel']:.1f}",
        )
        for row in sorted(measured["rows"], key=lambda row: (row["operation"], row["tokens"], row["features"]))
        if "kernel_us" in row
    ]
    header = ("kernel, bfloat16", "tokens x features", "us", "GB/s", "of XLA's copy", "XLA's time over the kernel's")
    return table(header, rows)


def step() -> str:
    """The training step by recipe and backend, relative to the references of the same run."""
    rows = _by_recipe(
        H200 / "step.json",
        lambda row: f"{1e3 * row['median_seconds']:.1f}",
        lambda row: f"{row['tokens_per_second']:,.0f}",
        lambda row: f"{(row['held_bytes'] + row['temporary_bytes']) / 2**30:.1f}",
        *OVER_BOTH,
    )
    return table(("recipe", "ms", "tokens/s", "GiB", "over `bf16`", "over `nvfp4`"), rows)


def step_tiny_cpu() -> str:
    """The tiny configuration's step by recipe, in processor time on one core."""
    rows = _by_recipe(
        CPU / "step_tiny.json",
        lambda row: f"{1e3 * row['median_seconds']:.0f}",
        lambda row: f"{row['temporary_bytes'] / 2**20:.0f}",
        *OVER_BOTH,
    )
    return table(("recipe", "ms", "temporary MiB", "over `bf16`", "over `nvfp4`"), rows)


def step_0p6b_cpu() -> str:
    """The step of Qwen3-0.6B with 512 tokens."""
    rows = _by_recipe(
        CPU / "step_0p6b.json",
        lambda row: f"{row['median_seconds']:.1f}",
        lambda row: f"{(row['held_bytes'] + row['temporary_bytes']) / 1e9:.1f}",
        lambda row: f"{row['compile_seconds']:.0f}",
        lambda row: ratio(row.get("over_bf16")),
    )
    return table(("recipe", "s", "GB, by the compiler", "trace and compile, s", "over `bf16`"), rows)


def tokens_of_a_batch() -> str:
    """Processor time of a token by the tokens in a batch."""
    files = [read(CPU / f"step_tiny_{sequences}_sequences.json") for sequences in (8, 16, 32, 64)]
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
    return table(header, rows)


def profile() -> str:
    """Milliseconds of a step by part."""
    rows = read(CPU / "profile_tiny.json")["rows"]
    parts = tuple(rows[0]["seconds"])
    return table(
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
    measured = read(CPU / f"peers_{what}.json")
    kinds = {"y": "error of y", "dx": "of dX", "dw": "of dW", "loss": "error of loss", "gradient": "of the gradient"}
    shown = [name for name in kinds if name in measured["rows"][0]["relative_error"]]
    rows = [
        (
            f"`{row['contender']}`",
            f"{1e3 * row['median_seconds']:.1f}",
            *(ratio(row.get(f"over_{reference}")) for reference in ("f32", "nvfp4")),
            *(f"{row['relative_error'][name]:.2g}" for name in shown),
            "; ".join(f"{count} {product}" for product, count in sorted(row["products"].items())),
            f"{row['temporary_bytes'] / 2**20:.0f}",
            f"{row['trace_seconds'] + row['compile_seconds']:.1f}",
        )
        for row in measured["rows"]
    ]
    header = ("contender", "ms", "over `f32`", "over `nvfp4`", *(kinds[name] for name in shown))
    return table((*header, "products", "temporary MiB", "trace and compile, s"), rows)


def _by_recipe(file: Path, *cells: Callable[[dict], str]) -> list[tuple[str, ...]]:
    """A row for each recipe that a file of `benchmarks.step` holds."""
    return [(f"`{row['recipe']}`", *(cell(row) for cell in cells)) for row in read(file)["rows"]]
