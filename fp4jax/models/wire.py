"""How prepared kernels travel to the devices that multiply with them: quantized, as codes and scales.

Under `fsdp` (and, for what is not an expert's, `expert`) every device keeps a part of each kernel in float32. It
quantizes that part, and what is gathered is the result: 4.5 bits an element where bfloat16 takes 16. A recipe with 1x16
blocks has two packings of a kernel, one for each product, which both travel.
"""

import jax
from jaxtyping import Array, Float, PyTree

from fp4jax.dot import Prepared
from fp4jax.layout import place

GATHERS = ("auto", "step", "layer")
"""Choices of `gather_weights`."""

_BLOCK = 16
_GATHERED = "embed"


def whole_blocks(kernel: Float[Array, "..."], axes: tuple[str | None, ...]) -> Float[Array, "..."]:
    """A kernel [*batch, inputs, outputs] as its master copy is split, but whole where that would cut a block."""
    return place(kernel, axes, [1] * (kernel.ndim - 2) + [_BLOCK] * 2)


def split(prepared: Prepared, axes: tuple[str | None, ...]) -> Prepared:
    """What was prepared from a kernel, split over the devices as the kernel is."""
    return _placed(prepared, axes)


def gathered(prepared: Prepared, axes: tuple[str | None, ...]) -> Prepared:
    """What was prepared from a kernel, on every device that multiplies with it; split along `tensor` and by experts."""
    # Split first: the compiler then gathers exactly here, the bytes, and not the wider integers they are packed from.
    return _placed(split(prepared, axes), tuple(None if axis == _GATHERED else axis for axis in axes))


def once_a_step(choice: str, high_precision: bool) -> bool:
    """Whether kernels are gathered when they are prepared, and held whole for the step, not layer by layer.

    "auto" does so with what is quantized: both packings are 9 bits an element, and neither microbatches nor
    rematerialization gather them again. What stays in high precision is gathered where a layer needs it (ZeRO-3).
    """
    return choice == "step" or (choice == "auto" and not high_precision)


def _placed(prepared: PyTree, axes: tuple[str | None, ...]) -> PyTree:
    """Every array of it has the kernel's axes, packed or not; one there twice is placed once."""
    placed: dict[int, Array] = {}
    for leaf in jax.tree.leaves(prepared):
        if id(leaf) not in placed:
            placed[id(leaf)] = place(leaf, axes)
    return jax.tree.map(lambda leaf: placed[id(leaf)], prepared)
