"""The matrices that are quantized in training Qwen3-0.6B and Qwen3 7B-A1.5B: shared by the benchmarks and the tests.

Those of Qwen3-0.6B are the model's. Of the 7B-A1.5B the paper names no size: they are assumed, as in
`configs/averis_moe_7b_a1p5b.py`. A test holds both to the configurations.
"""

import dataclasses

from fp4jax.numerics import NVFP4

MODELS = {"0p6b": "Qwen3-0.6B", "7b_a1p5b": "Qwen3 7B-A1.5B, sizes assumed"}
TOKENS = (65536, 16384, 4096)  # the benchmark begins with the first
EXPERTS = 64
_SMALL, _LARGE = MODELS


@dataclasses.dataclass(frozen=True)
class Shape:
    """A matrix, or one for each expert, and which operands of the models' linear layers it is.

    Attributes:
      tokens: rows of each matrix: tokens, slots of an expert, or the inputs of a weight.
      models: those of MODELS that have it.
      batch: independent matrices.
    """

    tokens: int
    features: int
    operands: str
    models: tuple[str, ...] = ()
    batch: int = 1

    @property
    def array(self) -> tuple[int, ...]:
        """[tokens, features], or [batch, tokens, features]."""
        sizes = (self.tokens, self.features)
        return sizes if self.batch == 1 else (self.batch, *sizes)

    @property
    def name(self) -> str:
        return "x".join(map(str, self.array))


def slots(tokens: int) -> int:
    """Of an expert, for `tokens` tokens: capacity 1.25, 8 of 64 experts for each token, in whole blocks."""
    fair = -(-tokens * 8 * 5 // (EXPERTS * 4))
    return -(-fair // NVFP4.block) * NVFP4.block


_ACTIVATIONS = (
    (1024, "0.6B: x of q, k, v, gate, up, gradient of k, v, o, down; 7B-A1.5B: gradient of k, v", (_SMALL, _LARGE)),
    (2048, "0.6B: x of o, gradient of q; 7B-A1.5B: x of q, k, v, o, gradient of q, o", (_SMALL, _LARGE)),
    (3072, "0.6B: x of down, gradient of gate, up", (_SMALL,)),
)
_OF_EXPERTS = (
    (2048, "7B-A1.5B: x of the experts' gate, up, gradient of their down"),
    (1024, "7B-A1.5B: x of the experts' down, gradient of their gate, up"),
)
SHAPES = tuple(Shape(tokens, *rest) for tokens in TOKENS for rest in _ACTIVATIONS)
"""Activations and their gradients, tokens by features."""
EXPERT_SHAPES = tuple(
    Shape(slots(tokens), *rest, (_LARGE,), batch=EXPERTS) for tokens in TOKENS for rest in _OF_EXPERTS
)
"""Likewise of experts: the slots of each are a matrix, for as many tokens in all as in SHAPES."""
WEIGHT_SHAPES = (
    Shape(1024, 2048, "0.6B: q", (_SMALL,)),
    Shape(1024, 1024, "0.6B: k, v", (_SMALL,)),
    Shape(2048, 1024, "0.6B: o; 7B-A1.5B: k, v", (_SMALL, _LARGE)),
    Shape(1024, 3072, "0.6B: gate, up", (_SMALL,)),
    Shape(3072, 1024, "0.6B: down", (_SMALL,)),
    Shape(2048, 2048, "7B-A1.5B: q, o", (_LARGE,)),
    Shape(2048, 1024, "7B-A1.5B: gate, up of experts", (_LARGE,), batch=EXPERTS),
    Shape(1024, 2048, "7B-A1.5B: down of experts", (_LARGE,), batch=EXPERTS),
)
"""Inputs by outputs."""


def scaled_down(shape: Shape, factor: int) -> Shape:
    """The same with all sizes divided by `factor`, for tests in the interpreter."""
    return dataclasses.replace(
        shape,
        tokens=max(1, shape.tokens // factor),
        features=max(16, shape.features // factor),
        batch=max(1, shape.batch // factor),
    )
