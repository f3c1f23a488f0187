"""Compiles one training step for one target and says what it needs: `python -m fp4jax.plan.step` is that process.

A process of its own for every target, because Mosaic keeps compiled kernels without regard to the target, and because
the environment must be set before JAX starts. `fp4jax.plan.__main__` starts it.
"""

import collections
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import ml_collections

from fp4jax import cli, models
from fp4jax.config import config_from
from fp4jax.config_checks import validate
from fp4jax.dot import implementation
from fp4jax.plan import kernels, targets
from fp4jax.plan.program import Executions
from fp4jax.reporting import Precision, Report, Row, of_program
from fp4jax.reporting.optimized_hlo import Program
from fp4jax.reporting.rows import CORRECTION
from fp4jax.training.mesh import make_mesh
from fp4jax.training.state import model_template
from fp4jax.training.step import abstract_train_step

ON_A_MACHINE = 8
"""GPUs of a machine: neighbours in the mesh's order are on one. All chips of a TPU are on one network."""


def plan(config: ml_collections.ConfigDict, target: targets.Target, dump: Path | None = None) -> dict:
    """What one step of `config` needs on `target`, as plain values for JSON; see docs/plan.md for every key.

    Args:
      dump: the folder that this process' kernels leave their reports in (`kernels.environment`), or None.

    Raises:
      ConfigError: a configuration that cannot run there.
      ValueError: the target's compiler is missing, or does not know it.
    """
    devices = target.devices()
    validate(config, len(devices))
    mesh = make_mesh(config.mesh, devices)
    step, state, batch = abstract_train_step(config, mesh)
    with jax.set_mesh(mesh):
        quantizer, execution = implementation(config.backend, config.gemm)
        traced = step.trace(state, batch)
        lowered = traced.lower()
    start = time.perf_counter()
    compiled = lowered.compile(target.compiler_options)
    seconds = time.perf_counter() - start
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(traced.args_info)[0]]
    optimized = compiled.as_text()
    report = of_program("train_step", traced.jaxpr, names, optimized, devices[0].platform)
    executions = Executions(Program(optimized))
    return {
        "target": target.name,
        "device": devices[0].device_kind,
        "devices": mesh.size,
        "idle_devices": len(devices) - mesh.size,
        "jax": jax.__version__,
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "recipe": config.recipe,
        "batch_size": config.batch_size,
        "microbatches": config.microbatches,
        "seq_len": config.seq_len,
        "remat": config.model.remat,
        "quantizer": quantizer.name,
        "products": str(execution),
        "compile_seconds": round(seconds, 1),
        "memory": _memory(compiled, target.is_gpu),
        "matrix_flops": report.flops,
        "bytes_accessed": executions.bytes_accessed(),
        "unknown_loops": executions.unknown_loops,
        "collectives": executions.collectives(),
        "between_machines": executions.between_machines(mesh.size, ON_A_MACHINE) if target.is_gpu else {},
        "gathers": executions.gathers(),
        "weight_gathers": weight_gathers(executions.gathers(), kernel_shapes(config), mesh.shape["tensor"]),
        "gemms": _gemms(report.rows),
        "corrections": _by_execution(row for row in report.apart if row.execution and row.reason == CORRECTION),
        "high_precision": sum(row.count for row in report.rows if row.precision is not Precision.FP4),
        "quantization": _quantization(report),
        "custom_calls": dict(executions.custom_calls()),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels.read(dump)] if dump else [],
    }


def kernel_shapes(config: ml_collections.ConfigDict) -> set[tuple[int, int]]:
    """(inputs, outputs) of every linear layer that policies give a recipe."""
    shapes = {name: leaf.shape for name, leaf in model_template(config).abstract.items()}
    linears = {path.split(".", 2)[2] for path in models.linear_recipes(config)}
    return {shapes[f"layers.{linear}.kernel"][-2:] for linear in linears}


def weight_gathers(gathers: Mapping[str, Mapping[str, int]], kernels: set[tuple[int, int]], tensor: int) -> int:
    """Bytes of the gathers that make such a kernel, or its part along `tensor`: in any dtype, packed, or its scales.

    Told by their shapes, as a compiled program knows no names.
    """
    parts = {(k // a, n // b) for k, n in kernels for a, b in ((1, 1), (tensor, 1), (1, tensor))}
    packed = {(k // a, n // b) for k, n in parts for a, b in ((1, 1), (2, 1), (1, 2), (16, 1), (1, 16))}
    total = 0
    for array, found in gathers.items():
        dtype, shape = array.removesuffix("]").split("[")
        pair = tuple(int(size) for size in shape.split(",") if size not in ("", "1"))[-2:]
        among = packed if dtype == "u8" else parts
        total += found["bytes"] if pair in among or pair[::-1] in among else 0
    return total


def _memory(compiled: jax.stages.Compiled, is_gpu: bool) -> dict[str, int]:
    """Bytes of one device. Arguments that become results (parameters, optimizer state) are in "aliased" too.

    Off GPUs the peak is the sum: what TPUs' compiler calls it was seen below the temporaries and above everything.
    """
    found = compiled.memory_analysis()
    sizes = {
        "arguments": found.argument_size_in_bytes, "results": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes, "temporaries": found.temp_size_in_bytes,
    }  # fmt: skip
    together = sizes["arguments"] + sizes["results"] - sizes["aliased"] + sizes["temporaries"]
    return sizes | {"peak": (is_gpu and found.peak_memory_in_bytes) or together}


def _gemms(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """{"fprop": {"native": 196}, ...}: executions of the products in FP4 of linear layers; again: by remat."""
    found: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row.precision is Precision.FP4:
            found[f"{row.gemm} again" if row.recomputed else row.gemm].append(row)
    return {gemm: _by_execution(of) for gemm, of in found.items()}


def _by_execution(rows) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for row in rows:
        counts["native" if row.execution.startswith("native") else row.execution] += row.count
    return dict(counts)


def _quantization(report: Report) -> dict:
    check = report.compiled
    return {
        "products": check.products, "operands": check.operands, "coded": check.coded, "folded": list(check.folded),
    } | {way: _kinds(report, way) for way in ("native", "fused", "emulated")}  # fmt: skip


def _kinds(report: Report, way: str) -> list[str]:
    """The kinds of products, "fprop NVFP4 x NVFP4", that the compiled program runs that way."""
    return sorted(
        f"{gemm} {' x '.join(formats)}"
        for (_, gemm, formats), ways in report.compiled.execution.items()
        if any(found.startswith(way) for found in ways)
    )


def main(arguments: Sequence[str]) -> None:
    """CONFIG.json TARGET OUT.json: writes the plan."""
    config, target, out = arguments
    values = json.loads(Path(config).read_text(encoding="utf-8"))
    dump = os.environ.get("MOSAIC_GPU_DUMP_TO")
    found = plan(config_from(values), targets.parse(target), Path(dump) if dump else None)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
