"""What helps the forward of a pretrained model: operands for X, one change at a time, weights in high precision.

    make models
    .venv/bin/python -m experiments.recipe_search --out=results/ptq/search.json

Loss gap and divergence of SmolLM2-135M on 2,048 held-out tokens; every number is of the forward alone. What is measured
already is not measured again. `averis_best` follows from it; docs/recipes.md says what did not help.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from fp4jax.analysis.ptq.measure import Measurement, Sample, measure
from fp4jax.analysis.ptq.table import render
from fp4jax.config import default_config
from fp4jax.data.held_out import held_out_text
from fp4jax.models.pretrained import load_parameters
from fp4jax.numerics import NVFP4, NVFP4_256, NVFP4_OUTER128, NVFP4_VECTOR, Extent
from fp4jax.recipes import Center, Gemm, LowRankSplit, MeanAxes, MeanSplit, Operand, Recipe

ROWS, LENGTH, BATCH = 4, 512, 2
SIX_OR_FOUR, FINER = (6.0, 4.0), (6.0, 5.5, 5.0, 4.5, 4.0)
VECTOR_256 = dataclasses.replace(NVFP4_256, name="NVFP4-256/vector", outer=Extent.VECTOR)
PLAIN, CHOSEN = Operand(NVFP4), Operand(NVFP4_256, candidates=SIX_OR_FOUR)


def mean(operand: Operand, part: Operand, center=Center.QUANTIZED_MEAN, axes=MeanAxes.BATCH) -> Operand:
    """`operand` for residuals against a mean that is quantized like `part`."""
    return dataclasses.replace(operand, split=MeanSplit(center, part, axes))


def low_rank(operand: Operand, fraction: float, centered: bool = True) -> Operand:
    """`operand` for residuals against a low-rank part whose factors are quantized like it."""
    return dataclasses.replace(operand, split=LowRankSplit(fraction, operand, centered=centered))


CANDIDATES = {
    "no split": PLAIN,
    "no split, a float32 scale for each token": Operand(NVFP4_VECTOR),
    "no split, a float32 scale for 128 elements": Operand(NVFP4_OUTER128),
    "no split, four-over-six": CHOSEN,
    "no split, five scales to choose from": Operand(NVFP4_256, candidates=FINER),
    "mean, quantized on its own (averis)": mean(PLAIN, PLAIN, Center.MEAN),
    "quantized mean (averis_centered)": mean(PLAIN, PLAIN),
    "quantized mean, for each sequence": mean(PLAIN, PLAIN, axes=MeanAxes.SEQUENCE),
    "quantized mean, a float32 scale for each token": mean(Operand(NVFP4_VECTOR), PLAIN),
    "quantized mean, four-over-six": mean(CHOSEN, CHOSEN),
    "quantized mean for each sequence, four-over-six": mean(CHOSEN, CHOSEN, axes=MeanAxes.SEQUENCE),
    "quantized mean, four-over-six, a float32 scale for each token": mean(
        Operand(VECTOR_256, candidates=SIX_OR_FOUR), CHOSEN
    ),
    "low rank 1.5 %, quantized on its own (metis)": low_rank(PLAIN, 0.015, centered=False),
    "quantized low rank, one direction": low_rank(CHOSEN, 0.001),
    "quantized low rank 1.5 %": low_rank(PLAIN, 0.015),
    "quantized low rank 1.5 %, four-over-six (averis_best)": low_rank(CHOSEN, 0.015),
    "quantized low rank 3 %, four-over-six": low_rank(CHOSEN, 0.03),
    "quantized low rank 5 %, four-over-six": low_rank(CHOSEN, 0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/search.json"))
    out = parser.parse_args().out
    found = json.loads(out.read_text()) if out.exists() else {}
    loaded = load_parameters("smollm2-135m")
    text = held_out_text(default_config().data, loaded.tokenizer, seq_len=LENGTH + 1, rows=ROWS)
    batches = text.tokens.reshape(-1, BATCH, LENGTH + 1)
    missing = [Recipe(name, fprop=Gemm(x)) for name, x in CANDIDATES.items() if name not in found]
    for measurement in measure(loaded, batches, missing, [0], with_gradients=False) if missing else ():
        found[measurement.recipe] = [dataclasses.asdict(sample) for sample in measurement.samples]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(render("", [measurement]).splitlines()[-1], flush=True)
    measurements = [Measurement(name, tuple(Sample(**sample) for sample in found[name])) for name in CANDIDATES]
    print("\n" + render("X alone quantized, SmolLM2-135M", measurements))


if __name__ == "__main__":
    main()
