"""`python -m fp4jax.analyze mean-bias | outliers | operators | figures`: arXiv 2603.10444's sections 2-4 and 7 on a
pretrained model or on every checkpoint of a run.
"""

import json
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fp4jax.analysis.mean_bias import figures, tables
from fp4jax.analysis.mean_bias.capture import SITES, capture
from fp4jax.analysis.mean_bias.measure import measure, whitened_ratios
from fp4jax.analysis.mean_bias.optimizer import second_moment_share
from fp4jax.analysis.mean_bias.subject import Subject, checkpoints, pretrained
from fp4jax.cli import Parser, output_folder
from fp4jax.training.compilation import enable_compilation_cache
from fp4jax.training.metrics import read_metrics


class _View(NamedTuple):
    """What a subcommand prints and draws; `mechanism` adds the passes of section 7."""

    tables: tuple[str, ...]
    figures: tuple[str, ...]
    outliers: bool = True
    mechanism: bool = False


_VIEWS = {
    "mean-bias": _View(("mean_bias",), ("fig1", "fig2", "mechanism"), mechanism=True),
    "outliers": _View(("outliers",), ("fig4",)),
    "operators": _View(("operators",), ("fig3",), outliers=False),
    "figures": _View(("mean_bias", "outliers", "operators"), tuple(figures.FIGURES), mechanism=True),
}


def mean_bias(arguments: Sequence[str]) -> None:
    """Signs, cosines, R, energies, where the mean comes from. Raises as `_run`."""
    _run("mean-bias", arguments)


def outliers(arguments: Sequence[str]) -> None:
    """What makes the largest entries. Raises as `_run`."""
    _run("outliers", arguments)


def operators(arguments: Sequence[str]) -> None:
    """The mean before and after attention and SwiGLU. Raises as `_run`."""
    _run("operators", arguments)


def draw_figures(arguments: Sequence[str]) -> None:
    """All of it, with the loss curves and the theorems. Raises as `_run`."""
    _run("figures", arguments)


def _run(name: str, arguments: Sequence[str]) -> None:
    """Measures, prints tables, writes NAME.json and PNGs.

    Raises:
      ValueError: an argument that cannot be used, a model or a text that cannot be read.
      OSError: a folder that cannot be written, a run without metrics.
    """
    options, view = _parse(name, arguments), _VIEWS[name]
    losses = _with_metrics(options.losses) if name == "figures" and options.losses else []
    enable_compilation_cache()
    start, cpu = time.perf_counter(), time.process_time()
    results = {}
    for subject in _subjects(options):
        output_folder(options.out)
        results[subject.name] = result = _measure(subject, view, options.skip)
        for table in view.tables:
            print(f"\n{subject.name}, {subject.chunks.size:,} tokens\n{getattr(tables, table)(result)}", flush=True)
    drawn = [figures.draw(figure, results, options.out).name for figure in view.figures]
    if name == "figures":
        figures.draw_theorems(options.out / "theorems.png")
        if losses:
            figures.draw_losses(losses, options.out / "fig5.png")
    record = {
        "command": " ".join([f"python -m fp4jax.analyze {name}", *arguments]),
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "results": results,
    }
    (options.out / f"{name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(f"\n{options.out / name}.json, {', '.join(drawn)} written; {record['seconds']:.0f} s, "
          f"{record['cpu_seconds']:.0f} s of CPU, peak {record['peak_gb']} GB")  # fmt: skip


def _parse(name: str, arguments: Sequence[str]) -> Any:
    parser = Parser(f"fp4jax.analyze {name}", "The mean of activations over tokens (arXiv 2603.10444).")
    parser.add_argument("--model", help="smollm2-135m or a .gguf file")
    parser.add_argument("--workdir", type=Path, help="of a run: every checkpoint that it kept is measured")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens, at least")
    parser.add_argument("--seq_len", type=int, help="tokens in a sequence; by default 512 or the run's")
    parser.add_argument("--skip", type=int, default=0, help="leading positions of every sequence left out")
    parser.add_argument("--out", type=Path, default=Path("runs/mean_bias"), help="folder for the JSON and the figures")
    if name == "figures":
        parser.add_argument("--losses", help="workdirs for the loss curves of fig. 5, with commas")
    options = parser.parse_args(list(arguments))
    if (options.model is None) == (options.workdir is None):
        parser.error("what is to be measured: give --model or --workdir, one of them")
    if options.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {options.tokens}")
    if options.seq_len is not None and options.seq_len < 2:
        parser.error(f"--seq_len must be at least 2, got {options.seq_len}")
    if not 0 <= options.skip < (options.seq_len or 2**31):
        parser.error(f"--skip must be at least 0 and below --seq_len, got {options.skip}")
    return options


def _with_metrics(workdirs: str) -> list[Path]:
    found = [Path(workdir) for workdir in workdirs.split(",")]
    for workdir in found:
        if not read_metrics(workdir):
            raise ValueError(f"--losses: {workdir} holds no metrics of a run; give workdirs of train.py, with commas")
    return found


def _subjects(options: Any) -> Iterator[Subject]:
    if options.model is not None:
        yield pretrained(options.model, options.tokens, options.seq_len or 512)
    else:
        yield from checkpoints(options.workdir, options.tokens, options.seq_len)


def _measure(subject: Subject, view: _View, skip: int) -> dict[str, Any]:
    if skip >= subject.chunks.shape[2]:
        raise ValueError(f"--skip={skip} leaves nothing of sequences of {subject.chunks.shape[2]} tokens")
    result = measure(subject.model, subject.chunks, skip=skip, outliers=view.outliers)
    if view.mechanism:
        result["whitened"] = whitened_ratios(subject.model, subject.chunks[:2], skip=skip)
        if subject.second_moments is not None:
            result["second_moments"] = _second_moments(subject, skip)
    return result


def _second_moments(subject: Subject, skip: int) -> dict[str, tuple[float, float]]:
    """Of the kernels that read a normalized stream, in the middle layer, with the mean of the first chunk's tokens."""
    _, record = capture(subject.model, jax.numpy.asarray(subject.chunks[0]), skip=skip)
    middle = subject.model.config.num_layers // 2
    readers = {"self_attn.q_proj": SITES[1], "self_attn.v_proj": SITES[1], "mlp.gate_proj": SITES[2]}
    shares = {}
    for linear, site in readers.items():
        mean = np.asarray(record["sites"][site][middle]).mean(axis=0)
        nu = np.asarray(subject.second_moments[f"layers.{linear}.kernel"])[middle]
        shares[f"layer {middle} {linear}"] = tuple(second_moment_share(nu, mean))
    return shares
