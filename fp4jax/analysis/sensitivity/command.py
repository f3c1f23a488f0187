"""`python -m fp4jax.analyze sensitivity`: which linear layers FP4 hurts most, and a policy that spares them."""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fp4jax.analysis.sensitivity import inputs, report
from fp4jax.analysis.sensitivity.ranking import (
    RankBy,
    RankedLayer,
    layer_scores,
    policy_file,
    quantized_mask,
    rank,
)
from fp4jax.analysis.sensitivity.scan import Choice, Meter, Scan, blocks, layers, scan, types
from fp4jax.cli import Parser, output_folder
from fp4jax.models.qwen3 import LINEARS, Qwen3
from fp4jax.policy import policy
from fp4jax.training.compilation import enable_compilation_cache

KEEP = 15.0
"""Percent; NVIDIA keeps about 15 % of the linear layers in high precision (arXiv 2509.25149)."""


def main(arguments: Sequence[str]) -> None:
    """Scans, prints its tables, writes sensitivity.json, sensitivity.png and policy.json.

    Raises:
      ValueError: an argument that cannot be used, no checkpoint, too little text.
      OSError: a folder that cannot be written.
    """
    options = _parse(arguments)
    enable_compilation_cache()
    start = time.perf_counter()
    subject = _subject(options)
    _check_seeds(subject, options.seeds)
    output_folder(options.out)
    rows, length = subject.batches[0]["tokens"].shape
    print(
        f"{subject.name}, recipe {subject.recipe.name}, one part at a time; held-out text: {len(subject.batches)} x "
        f"{rows} rows of {length} tokens; seeds: {options.seeds}",
        flush=True,
    )
    found, ranked = _measure(subject, options)
    command = " ".join(["python -m fp4jax.analyze sensitivity", *arguments])
    _print(found, ranked, options)
    record = {
        "command": command,
        "model": subject.name,
        "recipe": subject.recipe.name,
        "seeds": list(range(options.seeds)),
        "rank_by": options.rank_by.value,
        "keep_percent_of_parameters": options.keep,
        "ranking_measured": options.every_layer,
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "seconds": round(time.perf_counter() - start, 1),
    }
    provenance = {key: record[key] for key in ("command", "model", "recipe", "rank_by", "keep_percent_of_parameters")}
    path = options.out / "sensitivity.json"
    path.write_text(json.dumps(record | report.scan_json(found, ranked), indent=1) + "\n", encoding="utf-8")
    title = f"{subject.name}, {subject.recipe.name}: loss {found.loss:.4f} in high precision, {found.tokens:,} tokens"
    report.draw(found, ranked, options.rank_by, title, options.out / "sensitivity.png")
    file = options.out / "policy.json"
    policy_file(ranked, provenance).save(file)
    print(f"{path} and sensitivity.png written; train with --config.policy={file}")


def _parse(arguments: Sequence[str]) -> Any:
    parser = Parser(
        "fp4jax.analyze sensitivity", "Loss and gradient error with one layer type or block in FP4 at a time."
    )
    parser.add_argument("--config", type=Path, help="config file of a run, which by default is in runs/<its name>")
    parser.add_argument("--workdir", "--checkpoint", type=Path, dest="workdir", help="folder that train.py wrote")
    parser.add_argument("--model", help="a pretrained model instead: smollm2-135m, or a .gguf file with a Llama")
    parser.add_argument("--recipe", help="what quantizes a layer; None: the run's, for a pretrained model averis")
    parser.add_argument("--keep", type=float, default=KEEP, help="%% of linear parameters that policy.json spares")
    parser.add_argument("--rank-by", type=RankBy, choices=list(RankBy), default=RankBy.GRADIENT, help="error of what")
    parser.add_argument("--every-layer", action="store_true", help="measure every linear layer alone: 7 x blocks more")
    parser.add_argument("--seeds", type=int, default=1, help="of stochastic rounding, averaged over")
    parser.add_argument("--batches", type=int, default=1, help="held-out batches")
    parser.add_argument("--rows", type=int, help="sequences in a batch; None: the run's, for a pretrained model 4")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence; None: the run's, for a pretrained model 512")
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"), help="folder for what is written")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.keep <= 100:
        parser.error(f"--keep must be a percentage in [0, 100], got {options.keep:g}")
    for name in ("seeds", "batches", "rows", "seq_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.model is None and options.config is None and options.workdir is None:
        parser.error(
            "what is to be measured? give --workdir=FOLDER of a run, its --config=FILE, or --model=smollm2-135m"
        )
    if options.model is not None and (options.config or options.workdir):
        parser.error("--model is a pretrained model and has no --config or --workdir: give one or the other")
    return options


def _subject(options: argparse.Namespace) -> inputs.Subject:
    amount = inputs.Amount(options.batches, options.rows, options.seq_len)
    if options.model is not None:
        return inputs.pretrained(options.model, options.recipe, amount)
    config = None if options.config is None else inputs.config_file(options.config)
    workdir = options.workdir or Path("runs") / options.config.stem
    return inputs.trained(workdir, config, options.recipe, amount)


def _check_seeds(subject: inputs.Subject, seeds: int) -> None:
    if seeds > 1 and not (subject.recipe.forward_draws or subject.recipe.gradient_draws):
        raise ValueError(f"recipe {subject.recipe.name} rounds to nearest: every seed is the same, leave --seeds out")


def _measure(subject: inputs.Subject, options: argparse.Namespace) -> tuple[Scan, list[RankedLayer]]:
    """The scan of all parts, followed by that of whole policies, the ranking's own among them."""
    model, num_layers = subject.model, subject.model.config.num_layers
    meter, seeds = Meter(model), range(options.seeds)
    choices = [*types(num_layers), *blocks(num_layers), *(layers(num_layers) if options.every_layer else [])]
    parts = scan(meter, subject.batches, choices, seeds=seeds, progress=_progress())
    sizes = {name: model.layers.kernel(name)[0].size for name in LINEARS}
    ranked = rank(layer_scores(parts.effects, options.rank_by, num_layers), sizes, options.keep)
    policies = [Choice("policy", "all_linear", np.ones((num_layers, len(LINEARS)), bool))]
    if num_layers > 1:
        policies.append(Choice("policy", "nvidia", _mask("nvidia", model, subject)))
    policies.append(Choice("policy", "policy.json", quantized_mask(ranked)))
    whole = scan(meter, subject.batches, policies, seeds=seeds)
    return dataclasses.replace(parts, effects=parts.effects + whole.effects), ranked


def _mask(name: str, model: Qwen3, subject: inputs.Subject) -> np.ndarray:
    """What a shipped policy quantizes."""
    paths = model.config.linear_paths
    assigned = policy(name, subject.recipe, paths).assign(paths)
    return np.array([not found.is_high_precision for found in assigned.values()]).reshape(-1, len(LINEARS))


def _print(found: Scan, ranked: list[RankedLayer], options: argparse.Namespace) -> None:
    print(f"loss in high precision: {found.loss:.4f} nats a token, {found.tokens:,} tokens")
    titles = {
        "type": "one type of linear layer quantized, in all blocks",
        "block": "one block quantized",
        "policy": "whole policies",
    }
    for kind, title in titles.items():
        effects = [effect for effect in found.effects if effect.choice.kind == kind]
        print("\n" + report.effects_table(title, effects, found.loss, options.rank_by))
    print("\n" + report.ranking_table(ranked, options.rank_by, options.every_layer), end="\n\n")


def _progress() -> Callable[[int, int], None]:
    """Says on stderr how long it will take, once it is known."""
    start = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal start
        if done == 0:
            start = time.perf_counter()
        elif done == 2 or done == total // 2:
            seconds = (time.perf_counter() - start) / done
            left = seconds * (total - done) / 60
            print(
                f"measured {done} of {total} on this batch, {seconds:.1f} s each; {left:.0f} min to go", file=sys.stderr
            )

    return tell
