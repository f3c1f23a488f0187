"""Where a training step on eight devices first parts from the same step on one: the codes of X in every linear layer.

    PYTHONPATH=. python experiments/first_difference.py [--recipes=averis_centered,averis] [--ynnpack] [--out=FILE]

The model, state and batch of `experiments/layouts.py`, on one device and on eight along "data". Of each X that the
forward pass quantizes, in order: how many elements of it differ, and how many codes and block scales of its residual.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from experiments import layouts
from fp4jax import operands
from fp4jax.cli import Parser, check_output_file, run
from fp4jax.config import mesh_of
from fp4jax.operands import Part
from fp4jax.recipes import as_recipe

Prepared = tuple[np.ndarray, np.ndarray, np.ndarray]
"""X, and codes and block scales of its residual."""


def prepared_on(recipe: str, sizes: dict[str, int], ynnpack: bool) -> list[Prepared]:
    """Every X of the first step's forward pass, in the order in which the layers come."""
    config = layouts.config_of("qwen3", recipe)
    found: list[Prepared] = []
    original = operands._part  # every copy of every operand passes here

    def recorded(rows: operands.Rows, split: object, operand: object, slot: str, *rest: object) -> Part:
        part = original(rows, split, operand, slot, *rest)
        if slot == "fprop.x":
            keep = lambda *arrays: found.append(tuple(np.array(array) for array in arrays))  # noqa: E731
            jax.debug.callback(keep, rows.x, part.residual.codes, part.residual.scales)
        return part

    with mock.patch.object(operands, "_part", recorded):
        layouts.Layout(config, sizes, ynnpack=ynnpack).run(layouts.batches(config, 1))
    jax.effects_barrier()
    return found


def differences(recipe: str, ynnpack: bool) -> list[dict[str, float]]:
    """Of every X: its elements, how many of them, of its codes and of its block scales differ, and by how much."""
    one, eight = (prepared_on(recipe, sizes, ynnpack) for sizes in (mesh_of(), mesh_of(data=layouts.DEVICES)))
    found = []
    for a, b in zip(one, eight, strict=True):
        differ, codes, scales = (int(np.sum(left != right)) for left, right in zip(a, b, strict=True))
        relative = float(np.linalg.norm(a[0] - b[0]) / np.linalg.norm(a[0]))
        found.append({"elements": a[0].size, "differ": differ, "relative": relative, "codes": codes, "scales": scales})
    return found


def main(arguments: Sequence[str]) -> None:
    """Prints one line for each X, and writes FILE."""
    parser = Parser("experiments/first_difference.py", __doc__.splitlines()[0])
    parser.add_argument("--recipes", default="averis_centered,averis", help="separated by commas")
    parser.add_argument("--ynnpack", action="store_true", help="as in experiments/layouts.py")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    flags = parser.parse_args(arguments)
    if flags.out:
        check_output_file(flags.out, "--out")
    results = {as_recipe(name).name: [] for name in flags.recipes.split(",")}
    for name in results:
        if as_recipe(name).fprop.lhs.is_high_precision:
            raise ValueError(f"recipe {name!r} does not quantize X, so there are no codes to compare: leave it out")
    for recipe in results:
        results[recipe] = differences(recipe, flags.ynnpack)
        print(f"{recipe}: X of layer 1 (attention in, attention out, MLP in, MLP hidden), layer 2, ...")
        print("  X   elements   differ  relative  codes differ  scales differ")
        for number, row in enumerate(results[recipe], 1):
            print("{:3}{elements:11,}{differ:9,}{relative:10.1e}{codes:14}{scales:15}".format(number, **row))
    if flags.out:
        about = {"jax": jax.__version__, "devices": layouts.DEVICES, "ynnpack": flags.ynnpack}
        flags.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", layouts.DEVICES)
    sys.exit(run(main, sys.argv[1:]))
