"""Quantizes arrays with the NVFP4 reference of the transformer_engine wheel; run with .venv-peer's Python, by the test.

    python transformer_engine_process.py JOBS.json FOLDER

JOBS.json is a list of {"name", "data", "dtype", "axis", "options"}: FOLDER/DATA.npy (float32) is cast to `dtype`,
quantized with `NVFP4QuantizerRef(**options)` along its rows (axis -1) or its columns (axis -2), and saved as
FOLDER/NAME.npz with `codes` (packed, blocks along the last axis of x or of x's transpose), `scales` (bytes) and `amax`.

The wheel's packages import CUDA libraries when they are opened. The reference needs nothing of those: four stub modules
stand in for the two packages around it, for the GEMMs' module and for the base classes.
"""

import importlib
import importlib.metadata
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

REFERENCE = "transformer_engine.pytorch.custom_recipes.reference_nvfp4"


class _Quantizer:
    def __init__(self, *, rowwise, columnwise):
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


def load_reference():
    """The wheel's own reference_nvfp4 module, executed as it is."""
    root = Path(importlib.metadata.distribution("transformer_engine").locate_file("transformer_engine"))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    recipes = types.ModuleType("transformer_engine.pytorch.custom_recipes")
    recipes.__path__ = [str(root / "pytorch" / "custom_recipes")]
    recipes.gemm = types.ModuleType("transformer_engine.pytorch.custom_recipes.gemm")
    recipes.gemm.MMParams = object
    recipes.gemm.GEMMType = types.SimpleNamespace(FPROP=None, WGRAD=None)
    base = types.ModuleType("transformer_engine.pytorch.quantized_tensor")
    base.QuantizedTensorStorage, base.Quantizer = object, _Quantizer
    for module in (recipes, recipes.gemm, base):
        sys.modules[module.__name__] = module
    return importlib.import_module(REFERENCE)


def quantize(reference, x, axis, options):
    """(codes, scale bytes, amax) of one array."""
    tile = tuple(options.pop("quant_tile_shape"))
    quantizer = reference.NVFP4QuantizerRef(
        dtype=reference.reference_utils.Fp4Formats.E2M1,
        rowwise=axis == -1,
        columnwise=axis == -2,
        quant_tile_shape=tile,
        **options,
    )
    q = quantizer.quantize(x)
    codes, scales, amax = (
        (q.data, q.scale, q.global_amax_row) if axis == -1 else (q.data_t, q.scale_t, q.global_amax_col)
    )
    return codes.numpy(), scales.view(torch.uint8).numpy(), amax.numpy()


def main(jobs, folder):
    reference = load_reference()
    torch.set_num_threads(2)
    for job in json.loads(Path(jobs).read_text()):
        x = torch.from_numpy(np.load(Path(folder) / f"{job['data']}.npy")).to(getattr(torch, job["dtype"]))
        codes, scales, amax = quantize(reference, x, job["axis"], dict(job["options"]))
        np.savez(Path(folder) / f"{job['name']}.npz", codes=codes, scales=scales, amax=amax)


if __name__ == "__main__":
    main(*sys.argv[1:])
