"""Measurements on arrays and trained models, one subcommand each.

    python -m fp4jax.analyze SUBCOMMAND [--flags] [--debug]

Without a subcommand it lists them; every one has --help. Exit codes: 0 done, 1 an error (one line on stderr, --debug
shows the traceback), 130 interrupted.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from fp4jax import cli


class Subcommand(NamedTuple):
    """A function that takes the arguments after the subcommand's name; its module is imported when it is asked for.

    It parses them with `fp4jax.cli.Parser`, prints and writes what it found, and raises ValueError or
    OSError for what a user can cause.
    """

    summary: str
    module: str
    function: str


# Name → what it is. A new subcommand is one row.
SUBCOMMANDS: dict[str, Subcommand] = {
    "geometry": Subcommand(
        "sign and magnitude perturbations (arXiv 2605.18933): theory, simulation, a real model",
        "fp4jax.analysis.geometry.command",
        "main",
    ),
    "report": Subcommand(
        "is FP4 really on? which matrix products of a training step run in it, and why not the others",
        "fp4jax.analysis.report.command",
        "main",
    ),
    "ptq": Subcommand(
        "loss and weight gradients of a pretrained model under every recipe",
        "fp4jax.analysis.ptq.command",
        "main",
    ),
    "health": Subcommand(
        "noise, underflow, bias and exact gradient of a run, by layer and step",
        "fp4jax.analysis.health.command",
        "run",
    ),
    "sensitivity": Subcommand(
        "which linear layers FP4 hurts most, and a policy file that spares them",
        "fp4jax.analysis.sensitivity.command",
        "main",
    ),
    "mean-bias": Subcommand(
        "the mean of activations: signs, energies, where it comes from (arXiv 2603.10444)",
        "fp4jax.analysis.mean_bias.command",
        "mean_bias",
    ),
    "outliers": Subcommand(
        "what makes the largest activations: mean, spike or tail",
        "fp4jax.analysis.mean_bias.command",
        "outliers",
    ),
    "operators": Subcommand(
        "the mean before and after attention and SwiGLU",
        "fp4jax.analysis.mean_bias.command",
        "operators",
    ),
    "figures": Subcommand(
        "the figures of arXiv 2603.10444 on a model or a run's checkpoints",
        "fp4jax.analysis.mean_bias.command",
        "draw_figures",
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Runs the subcommand that `arguments` name; returns the exit code."""
    return cli.run(_main, arguments)


def _main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_usage())
        return
    if arguments[0] not in SUBCOMMANDS:
        raise ValueError(f"unknown subcommand {arguments[0]!r}; there are: {', '.join(SUBCOMMANDS)}")
    subcommand = SUBCOMMANDS[arguments[0]]
    getattr(importlib.import_module(subcommand.module), subcommand.function)(arguments[1:])


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS), default=0)
    lines = [f"  {name:{width}}  {subcommand.summary}" for name, subcommand in SUBCOMMANDS.items()]
    return "\n".join(["usage: python -m fp4jax.analyze SUBCOMMAND [--flags] [--debug]", "", *lines])


if __name__ == "__main__":
    if cli.DEBUG not in sys.argv:
        logging.set_verbosity(logging.FATAL)  # Orbax warns that it will not write
    sys.exit(main(sys.argv[1:]))
