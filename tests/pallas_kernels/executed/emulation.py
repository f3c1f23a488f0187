"""Kernels by their compiled programs: what Mosaic made of them for a GPU, executed by `tests.ptx` on a CPU."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.ptx import machine, program


@contextlib.contextmanager
def by_compiled_program(folder: Path, choices: machine.Choices) -> Iterator[list[str]]:
    """Within, calls of kernels are those of the program whose files are in `folder`, and JAX runs eagerly.

    Gives the names of the kernels that were called.
    """
    compiled, launch = program.read(folder)
    called: list[str] = []

    def kernel(body, *, out_type, kernel_name, **options):
        del body, options
        if not compiled.name.startswith(kernel_name + "_mosaic_gpu"):
            raise AssertionError(f"compiled was {compiled.name}, called is {kernel_name}")

        def run(*operands):
            called.append(kernel_name)
            leaves, structure = jax.tree.flatten(out_type)
            inputs = [np.asarray(operand) for operand in operands]
            results = [(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves]
            made = machine.run(compiled, launch, inputs, results, choices)
            return jax.tree.unflatten(structure, map(jnp.asarray, made))

        return run

    original = plgpu.kernel
    plgpu.kernel = kernel
    try:
        with jax.disable_jit():
            yield called
    finally:
        plgpu.kernel = original
