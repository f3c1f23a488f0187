"""Operands, GEMMs and recipes that contradict themselves cannot be built, and say why in one line."""

import pytest

from fp4jax.numerics import FP8_E4M3, MXFP4, NVFP4, NVFP4_OUTER128, Rounding, ScaleRounding
from fp4jax.recipe_types import Center, Gemm, LowRankSplit, MeanSplit, Operand, Recipe, Source

COPY = Operand(source=Source.QUANTIZED)
MEAN_SPLIT = Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand(NVFP4)))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Operand(NVFP4, hadamard=32), "hadamard must be None, 16 or 128, got 32"),
        (lambda: Operand(NVFP4, block=(8, 8)), r"block must be None .* or \(16, 16\), got \(8, 8\)"),
        (lambda: Operand(block=(16, 16)), "neither blocks nor rounding"),
        (lambda: Operand(candidates=(6.0, 4.0)), "neither blocks nor rounding"),
        (lambda: Operand(NVFP4, fresh_signs=True), "fresh signs are those of a Hadamard transform"),
        (lambda: Operand(NVFP4, hadamard=16, split=LowRankSplit(0.1, Operand())), "cannot be had together"),
        (lambda: Operand(FP8_E4M3, block=(16, 16)), "FP8 E4M3 has no blocks"),
        (lambda: Operand(NVFP4_OUTER128, block=(16, 16)), "square blocks need one float32 scale"),
        (lambda: Operand(NVFP4, candidates=(8.0, 4.0)), r"candidates must be in \(0, 6.0\]"),
        (lambda: Operand(MXFP4, candidates=(6.0, 4.0)), "candidates need E4M3 block scales"),
        (lambda: Operand(MXFP4, scale_rounding=ScaleRounding.NEAREST), "E8M0 scales cannot be rounded nearest"),
        (lambda: Operand(MXFP4, correction=128), "E8M0 scales are too coarse"),
        (lambda: Operand(NVFP4, scale_rounding=ScaleRounding.UP), "E4M3 scales cannot be rounded up"),
        (lambda: Operand(NVFP4, scale_rounding=ScaleRounding.STOCHASTIC), "after a correction only"),
        (lambda: Operand(NVFP4, correction=24), "correction must be a multiple of the block, 16"),
        (lambda: LowRankSplit(0.0, Operand()), r"rank_fraction must be in \(0, 1\], got 0.0"),
        (lambda: LowRankSplit(0.5, Operand(hadamard=16)), "neither a split, a transform nor square blocks"),
        (lambda: Gemm(Operand(hadamard=16), Operand(hadamard=128)), "cancels only if both operands"),
        (
            lambda: Recipe("mine", fprop=Gemm(*[Operand(hadamard=16, fresh_signs=True)] * 2)),
            "fresh signs are for dgrad",
        ),
        (
            lambda: Recipe("mine", dgrad=Gemm(Operand(source=Source.QUANTIZED))),
            "recipe mine: dgrad.g has no earlier copy",
        ),
        (
            lambda: Recipe(
                "mine",
                wgrad=Gemm(
                    Operand(split=MeanSplit(Center.MEAN, Operand())), Operand(split=LowRankSplit(0.1, Operand()))
                ),
            ),
            "must both be mean-split in wgrad, or both of low rank",
        ),
        (lambda: Operand(rounding=Rounding.STOCHASTIC), "neither blocks nor rounding"),
        (lambda: Operand(scale_rounding=ScaleRounding.STOCHASTIC), "no block scales to round"),
        (lambda: Operand(NVFP4, correction=128), "under a Hadamard transform of its width"),
        (lambda: Operand(NVFP4, correction=128, hadamard=16), "under a Hadamard transform of its width"),
        (lambda: LowRankSplit(0.5, Operand(), iterations=0), "iterations must be 1 or 2, got 0"),
        (lambda: MeanSplit(Center.MEAN, Operand(NVFP4, hadamard=16)), "a mean has neither a split, a transform"),
        (lambda: MeanSplit(Center.QUANTIZED_MEAN, Operand()), "a quantized mean as centre needs a format"),
        (
            lambda: Recipe("mine", Gemm(MEAN_SPLIT, Operand()), wgrad=Gemm(COPY)),
            "recipe mine: wgrad needs a mean-split X in blocks of its own",
        ),
        (
            lambda: Recipe("mine", Gemm(*[Operand(NVFP4, hadamard=16)] * 2), wgrad=Gemm(COPY)),
            "recipe mine: the forward's copy is transformed",
        ),
        (
            lambda: Recipe("mine", Gemm(MEAN_SPLIT, Operand()), wgrad=Gemm(Operand(NVFP4, source=Source.QUANTIZED))),
            "has the forward's split",
        ),
        (
            lambda: Recipe("mine", Gemm(Operand(hadamard=16, split=MEAN_SPLIT.split), Operand(hadamard=16))),
            "recipe mine: fprop cannot have a transform, its mean row is not transformed",
        ),
        (lambda: Gemm(Operand(hadamard=16), Operand()), "cancels only if both operands"),
        (
            lambda: Recipe("mine", fprop=Gemm(Operand(), Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand())))),
            "recipe mine: weights cannot be mean-split",
        ),
        (
            lambda: Recipe(
                "mine",
                fprop=Gemm(Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand()))),
                wgrad=Gemm(Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand(NVFP4)))),
            ),
            "recipe mine: both copies of X must be split alike",
        ),
        (
            lambda: Recipe(
                "mine",
                dgrad=Gemm(Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand()))),
                wgrad=Gemm(Operand(), Operand(NVFP4, split=MeanSplit(Center.QUANTIZED_MEAN, Operand(NVFP4)))),
            ),
            "both copies of D must be split alike",
        ),
    ],
)
def test_contradictions_in_operands(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_one_copy_of_an_operand_may_go_unsplit():
    split = MeanSplit(Center.MEAN, Operand(NVFP4))
    assert Recipe("mine", fprop=Gemm(Operand(NVFP4, split=split), Operand(NVFP4)), wgrad=Gemm(Operand(NVFP4)))
