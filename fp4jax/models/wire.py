"""How prepared operands travel to the devices that multiply with them: quantized, as codes and scales.

Under `fsdp` (and, for what is not an expert's, `expert`) every device keeps a part of each kernel in float32. It
quantizes that part, and what is gathered is the result: 4.5 bits an element where bfloat16 takes 16. A recipe with 1x16
blocks has two packings of a kernel, one for each product, which both travel.

Under `tensor`, if asked for, devices share the sequences of the residual stream (Megatron's sequence parallelism, arXiv
2205.05198): norms, sums and the quantization of what comes out of them are done once, not by every device, and the sum
over the parts of a product is scattered. What is gathered in its place, the input of q, k, v, gate and up and the
output gradient of o and down, travels as kernels do; `dot_general` does that, which is told by names.
"""

from jaxtyping import Array, Float

from fp4jax import layout
from fp4jax.dot import Prepared
from fp4jax.layout import Names, place

GATHERS = ("auto", "step", "layer")
"""Choices of `gather_weights`."""

_BLOCK = 16
_STREAM = "embed"
"""The features of the residual stream; of a kernel, the axis that is gathered."""


def whole_blocks(kernel: Float[Array, "..."], axes: tuple[str | None, ...]) -> Float[Array, "..."]:
    """A kernel [*batch, inputs, outputs] as its master copy is split, but whole where that would cut a block."""
    return place(kernel, axes, [1] * (kernel.ndim - 2) + [_BLOCK] * 2)


def split(prepared: Prepared, axes: tuple[str | None, ...]) -> Prepared:
    """What was prepared from a kernel, split over the devices as the kernel is."""
    return layout.place_all(prepared, axes)


def gathered(prepared: Prepared, axes: tuple[str | None, ...]) -> Prepared:
    """What was prepared from a kernel, on every device that multiplies with it; split along `tensor` and by experts."""
    # Split first: the compiler then gathers exactly here, the bytes, and not the wider integers they are packed from.
    return whole(split(prepared, axes), axes)


def whole(prepared: Prepared, axes: tuple[str | None, ...]) -> Prepared:
    """The same of what is split already, or held whole: that is not gathered again."""
    return layout.place_all(prepared, layout.whole_along(axes, _STREAM))


def activations(asked: bool, length: int, features: str | None = _STREAM) -> Names | None:
    """Names of the axes of activations [B, T, features] where devices are to share sequences; None: as XLA likes.

    The stream is split along its sequences, anything else along its features.

    Args:
      asked: `Qwen3Config.sequence_sharding`.
      length: T, in tokens. A sequence that the devices cannot share in whole blocks of 16 is not split.
      features: the name of that axis, None for features that are whole, beside whole sequences.
    """
    devices = layout.sequence_shards()
    if not asked or devices == 1 or length % (_BLOCK * devices):
        return None
    return ("batch", "sequence", None) if features == _STREAM else ("batch", None, features)


def shared(axes: Names | None) -> Names | None:
    """The same for activations whose sequences the devices share; None for others."""
    return axes if axes is not None and "sequence" in axes else None


def placed(x: Float[Array, "..."], axes: Names | None) -> Float[Array, "..."]:
    """`x` where `activations` says, and its gradient."""
    return x if axes is None else place(x, axes)


def once_a_step(choice: str, high_precision: bool) -> bool:
    """Whether kernels are gathered when they are prepared, and held whole for the step, not layer by layer.

    "auto" does so with what is quantized: both packings are 9 bits an element, and neither microbatches nor
    rematerialization gather them again. What stays in high precision is gathered where a layer needs it (ZeRO-3).
    """
    return choice == "step" or (choice == "auto" and not high_precision)
