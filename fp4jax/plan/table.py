"""A plan as text."""

import re
from collections.abc import Iterable, Mapping

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def size(number: int) -> str:
    """Returns "13.80 GiB" or "512 B"."""
    for unit, name in _UNITS:
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number} B"


def lines(plan: Mapping) -> list[str]:
    """The plan of one target, a line a fact."""
    rows = [*_what(plan), *_memory(plan), *_work(plan), *_products(plan)]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]


def _what(plan: Mapping) -> Iterable[tuple[str, str]]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    idle = f"; {plan['idle_devices']} more idle" if plan["idle_devices"] else ""
    yield "target", f"{plan['target']}: {plan['devices']} x {plan['device']} ({mesh}){idle}"
    parts = f" in {plan['microbatches']} microbatches" if plan["microbatches"] > 1 else ""
    tokens = f"{plan['batch_size']} x {plan['seq_len']} tokens{parts}"
    yield "step", f"recipe {plan['recipe']}, {tokens}, remat {plan['remat']}"
    yield "compiled", f"with JAX {plan['jax']} in {plan['compile_seconds']} s; quantized by {plan['quantizer']}"


def _memory(plan: Mapping) -> Iterable[tuple[str, str]]:
    found = plan["memory"]
    yield "memory a device", f"peak {size(found['peak'])}"
    kept = f"arguments {size(found['arguments'])} (of these {size(found['aliased'])} become results in place)"
    yield "", f"{kept}, temporaries {size(found['temporaries'])}"


def _work(plan: Mapping) -> Iterable[tuple[str, str]]:
    yield "matrix FLOPs", f"{plan['matrix_flops']:.4g} on all devices"
    unknown = plan["unknown_loops"]
    yield (
        "bytes accessed",
        f"{size(plan['bytes_accessed'])} on a device"
        + (f"; {unknown} loops of unknown length counted once" if unknown else ""),
    )
    for kind, of in plan["collectives"].items():
        yield kind, f"{of['count']:,} x, {size(of['bytes'])} on a device"
    if plan["between_machines"]:
        yield "between machines", f"{size(sum(plan['between_machines'].values()))} of these"
    if plan["weight_gathers"]:
        yield "gathered weights", f"{size(plan['weight_gathers'])} on a device, of the linear layers"
    if not plan["collectives"]:
        yield "collectives", "none"


def _products(plan: Mapping) -> Iterable[tuple[str, str]]:
    for gemm, ways in plan["gemms"].items():
        yield f"FP4 {gemm}", _ways(ways)
    if not plan["gemms"]:
        yield "FP4 products", "none"
    if plan["corrections"]:
        yield "with a mean or factor", f"{_ways(plan['corrections'])}, beside these"
    yield "not in FP4", f"{plan['high_precision']:,} products"
    found = plan["quantization"]
    yield "quantization", f"{found['coded']} of {found['operands']} quantized operands still come from codes"
    for line in found["folded"]:
        yield "", line
    for name, programs in _by_name(plan["kernels"]).items():
        registers = sorted(kernel["registers"] for kernel in programs)
        many = f" in {len(programs)} programs" if len(programs) > 1 else ""
        used = f"{registers[0]} to {registers[-1]}" if registers[0] < registers[-1] else f"{registers[0]}"
        spilled = max(kernel["spill_bytes"] for kernel in programs)
        shared = max(kernel["static_shared_bytes"] + kernel["dynamic_shared_bytes"] for kernel in programs)
        spills = f"{spilled} bytes spilled" if spilled else "no spills"
        yield f"kernel {name}", f"{used} registers, {spills}, {shared:,} bytes of shared memory{many}"


def _by_name(kernels: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    """Programs of one kernel function; their names end in a number each."""
    found: dict[str, list[Mapping]] = {}
    for kernel in kernels:
        name = f"{re.sub(r'_[0-9]+$', '', kernel['name'])} ({kernel['architecture']})"
        found.setdefault(name, []).append(kernel)
    return dict(sorted(found.items()))


def _ways(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {way}" for way, count in counts.items())
