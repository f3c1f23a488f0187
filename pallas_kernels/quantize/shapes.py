"""The matrices that are quantized row by row in training Qwen3-0.6B: shared by the benchmark and the tests."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A matrix of tokens by features, and which operands of the model's linear layers it is."""

    tokens: int
    features: int
    operands: str


TOKENS = (4096, 16384, 65536)
# Features of Qwen3-0.6B: hidden 1024, queries 16 x 128, keys and values 8 x 128, MLP 3072.
FEATURES = {
    1024: "x of q, k, v, gate, up; gradient of k, v, o, down",
    2048: "x of o; gradient of q",
    3072: "x of down; gradient of gate, up",
}
SHAPES = tuple(Shape(tokens, features, operands) for tokens in TOKENS for features, operands in FEATURES.items())


def scaled_down(shape: Shape, factor: int) -> Shape:
    """The same matrix with both axes divided by `factor`, for tests in the interpreter."""
    return Shape(max(1, shape.tokens // factor), max(16, shape.features // factor), shape.operands)
