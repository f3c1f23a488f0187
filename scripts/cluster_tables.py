"""Tables of programs compiled for devices that were not there, and of eight devices beside one."""

from collections.abc import Sequence
from pathlib import Path

from fp4jax.plan.table import lines
from scripts.markdown import read, table


def plan() -> str:
    """Temporary memory of one step under two recipes, by what the backward recomputes, and who multiplies."""
    rows = []
    for remat in ("linear_inputs", "none"):
        averis, bf16 = (_plans(f"{recipe}_0p6b_{remat}") for recipe in ("averis", "bf16"))
        for target, found in averis.items():
            ours, theirs = (plan["memory"]["temporaries"] / 2**30 for plan in (found, bf16[target]))
            sizes = f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.3f}"
            rows.append((f"`{target}`", f"`{remat}`", *sizes, _fp4_products(found), _kernels(found["kernels"])))
    return table(("target", "remat", "averis, GiB", "bf16, GiB", "ratio", "FP4 products", "kernels"), rows)


def plan_of(target: str, name: str) -> str:
    """What the command prints of one target of results/plan/NAME.json."""
    return "\n".join(["```text", *lines(_plans(name)[target]), "```"])


def traffic() -> str:
    """Memory traffic and temporaries of one step, before a change and after it, by recipe and backend."""
    rows = []
    for found in read("results/plan/traffic.json")["programs"]:
        before, after = found["before"], found["after"]
        sizes = (f"{plan['bytes_accessed'] / 1e12:.2f}" for plan in (before, after))
        memory = (f"{plan['memory']['temporaries'] / 2**30:.1f}" for plan in (before, after))
        rows.append((f"`{after['recipe']}`", f"`{found['backend']}`", *sizes, *memory))
    header = "recipe", "backend", "traffic before, TB", "after", "temporaries before, GiB", "after"
    return table(header, rows)


def products() -> str:
    """Memory traffic and temporaries of one step, by who multiplies."""
    rows = []
    for found in read("results/plan/products.json")["plans"]:
        sizes = f"{found['bytes_accessed'] / 1e12:.2f}", f"{found['memory']['temporaries'] / 2**30:.1f}"
        of_products = [kernel for kernel in found["kernels"] if kernel["name"].startswith("dequant_matmul")]
        rows.append((f"`{found['recipe']}`", _fp4_products(found), *sizes, _kernels(of_products)))
    return table(("recipe", "FP4 products", "traffic, TB", "temporaries, GiB", "kernels that multiply"), rows)


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
    return table((*header, *travels), rows)


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
    return table(("configuration", "H200", "products, s", "collectives, s", *efficiency), rows)


def _sent(collectives: dict[str, int]) -> float:
    """Bytes that a device sends: in rings, where a sum for all goes round twice."""
    return sum((2 if kind == "all-reduce" else 1) * size for kind, size in collectives.items())


def _cluster_plans() -> list[dict]:
    return read("results/plan/clusters.json")["plans"]


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def collectives() -> str:
    """How often the devices of a small model's step talk to each other, by recipe."""
    rows = [
        (f"`{found['recipe']}`", *(str(found["collectives"].get(kind, {"count": 0})["count"]) for kind in KINDS))
        for found in read("results/plan/statistics_on_eight.json")["plans"]
    ]
    return table(("recipe", *KINDS), rows)


def layouts() -> str:
    """Eight devices against one: the first step, and all steps beside runs that began one ulp apart."""
    results = read("results/layouts/layouts.json")["results"]
    rows = []
    for model, recipes in results.items():
        for recipe, found in recipes.items():
            envelope = f"{found['envelope']:.1e}" if "envelope" in found else ""
            for name, mesh in found["meshes"].items():
                gradients = mesh["first_gradients"]
                numbers = mesh["first_loss"], gradients["together"], gradients["worst"], mesh["distance"]
                rows.append((f"`{model}`", f"`{recipe}`", name, *(f"{x:.1e}" for x in numbers), envelope))
    first = "first step: loss", "gradients", "worst parameter"
    return table(("model", "recipe", "mesh", *first, "20 steps: loss", "five runs one ulp apart"), rows)


def _plans(name: str) -> dict[str, dict]:
    plans = read(f"results/plan/{name}.json")["plans"]
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
