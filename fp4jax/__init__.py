"""fp4jax: training language models with 4-bit (W4A4G4) matrix multiplies in JAX.

The table of contents. A name is loaded when it is first used, so `import fp4jax` costs nothing and a kernel may import
`fp4jax.numerics` without a circle. Code inside fp4jax imports from the module that defines a name, never from here.
"""

import importlib

__version__ = "0.1.0.dev0"

# Public name → the module that defines it.
_DEFINED_IN = {
    # The quantized matrix multiply: three GEMMs with a custom VJP, and its operands prepared once for several uses.
    "dot_general": "fp4jax.dot",
    "prepare": "fp4jax.dot",
    "Prepared": "fp4jax.dot",
    "einsum": "fp4jax.equation",
    "ragged_dot": "fp4jax.ragged",
    "LINEAR_INPUTS": "fp4jax.dot",  # the name of prepared activations for jax.checkpoint's policies
    "GRADIENT_STATISTICS": "fp4jax.statistics",  # what the cotangent of `probe` holds
    # Quantized arrays and their formats: the specification of every bit.
    "quantize": "fp4jax.numerics",
    "QTensor": "fp4jax.numerics",
    "Format": "fp4jax.numerics",
    **dict.fromkeys(
        (
            *("NVFP4", "NVFP4_256", "NVFP4_EDEN", "NVFP4_OUTER128", "NVFP4_VECTOR", "MXFP4", "MXFP8"),
            *("FP8_E4M3", "FP8_E5M2", "INT8", "TERNARY", "SIGN"),
        ),
        "fp4jax.numerics",
    ),
    # What happens to each operand of each GEMM, and which layer gets which recipe.
    "recipe": "fp4jax.recipes",
    "list_recipes": "fp4jax.recipes",
    "list_variants": "fp4jax.recipes",
    "Recipe": "fp4jax.recipes",
    "Policy": "fp4jax.policy",
    "PolicyFile": "fp4jax.policy",
    # Is FP4 really on? Every matrix product of a function and how it runs.
    "report": "fp4jax.reporting",
}

# Public modules, from the ground up.
_MODULES = (
    "config",  # every option of a run with its default
    "data",  # documents → tokens → packed rows → batches that resume
    "numerics",  # formats, rounding, block scaling, Hadamard, splits, random bits
    "recipes",  # the recipes by name
    "linen",  # flax.linen: the slot dot_general_cls; quantize for a whole model
    "nnx",  # flax.nnx: the slot DotGeneral; quantize for a whole model
    "equinox",  # Equinox: quantize for a whole model; needs the package equinox
    "policy",  # rules from layer path to recipe
    "models",  # Qwen3, Llama, pretrained weights
    "generation",  # text from a model: prefill and decode with a cache
    "training",  # the training loop
    "testing",  # is a quantizer NVFP4? laws and golden vectors for any callable
    "evaluation",  # the scores of a checkpoint
)

__all__ = ["__version__", *_DEFINED_IN, *_MODULES]


def __getattr__(name: str):
    if name in _DEFINED_IN:
        value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"fp4jax.{name}")
    raise AttributeError(f"module 'fp4jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
