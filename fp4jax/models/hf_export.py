"""Writing a model as a Hugging Face folder: the whole folder or nothing.

Everything is written to a folder beside the destination, which is renamed when it is complete.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from fp4jax.checkpoint import StorageError
from fp4jax.data.errors import DataError
from fp4jax.models import nvfp4_layout
from fp4jax.models.hf_folder import CONFIG, TOKENIZER
from fp4jax.models.hugging_face import config_json, is_kernel, stored_tensors
from fp4jax.models.pretrained import LoadedModel
from fp4jax.models.problems import raise_problems
from fp4jax.models.safetensors_files import INDEX, SINGLE_FILE
from fp4jax.recipes import Operand, Recipe, as_recipe, list_recipes

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 5 * 10**9
"""A larger model is written in several files of at most so many bytes (more where one tensor is larger)."""

HIGH_PRECISION_BESIDE_NVFP4 = "bfloat16"
"""`compressed-tensors` dequantizes to bfloat16, and PyTorch multiplies no two dtypes."""

_TOKENIZER_CONFIG = "tokenizer_config.json"

Tensors = Iterable[tuple[str, Shaped[np.ndarray, "..."]]]


def plain_tensors(loaded: LoadedModel, dtype: str, without: Collection[str] = ()) -> Iterator:
    """(name, array) of every tensor of a model but those of the modules in `without`.

    Raises:
      DataError: a value that `dtype` cannot hold.
    """
    for parameter, value in loaded.params.items():
        host = np.asarray(value)
        for index, name, _ in stored_tensors(parameter, value.shape):
            if name.removesuffix(".weight") in without:
                continue
            weight = host[index].T if is_kernel(parameter) else host[index]
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(weight, DTYPES[dtype])
            if not np.array_equal(np.isfinite(stored.astype(np.float32)), np.isfinite(weight)):
                raise DataError(f"tensor {name!r} holds values beyond the range of {dtype}; use --dtype=bfloat16")
            yield name, stored


def quantized_operands(loaded: LoadedModel, recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Operand]]:
    """Module → its linear layers by full name → how their weights are quantized; layers in high precision are left out.

    Args:
      recipes: of every linear layer by our path.

    Raises:
      DataError: a recipe that the layout cannot hold, a layer that has no whole blocks, or nothing to quantize.
    """
    operands: dict[str, dict[str, Operand]] = {}
    problems: dict[str, None] = {}
    for path, name, kernel in _linear_layers(loaded):
        recipe = recipes.get(path)
        if recipe is None or recipe.fprop.rhs.is_high_precision:
            continue
        operand = recipe.fprop.rhs
        if not nvfp4_layout.can_store(operand):
            problems[f"weights under recipe {recipe.name!r} are {operand}; these can be: {_storable()}"] = None
        elif kernel[0] % nvfp4_layout.BLOCK:
            problems[f"{path} has {kernel[0]} inputs, no multiple of {nvfp4_layout.BLOCK}"] = None
        else:
            operands.setdefault(name.rpartition(".")[0], {})[name] = operand
    if not operands and not problems:
        problems["the recipe quantizes no linear layer: choose one with --recipe=nvfp4"] = None
    raise_problems("the model", f"cannot be written as {nvfp4_layout.FORMAT}", list(problems))
    return operands


def _storable() -> str:
    """The recipes whose weights the layout can hold."""
    return ", ".join(name for name in list_recipes() if nvfp4_layout.can_store(as_recipe(name).fprop.rhs))


def _linear_layers(loaded: LoadedModel) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(our path, full name there, (inputs, outputs)) of every kernel."""
    for parameter, value in loaded.params.items():
        if not is_kernel(parameter):
            continue
        for index, name, shape in stored_tensors(parameter, value.shape):
            path = parameter.removesuffix(".kernel").replace("layers.", f"layers.{index[0]}.", 1)
            yield path, name.removesuffix(".weight"), shape[::-1]


def nvfp4_tensors(loaded: LoadedModel, operands: Mapping[str, Mapping[str, Operand]], error: "Error") -> Iterator:
    """(name, array) of every tensor, the layers of `operands` in NVFP4; `error` sums up what that does to them."""
    quantized = {name for layers in operands.values() for name in layers}
    places = {
        name.removesuffix(".weight"): (parameter, index)
        for parameter, value in loaded.params.items()
        for index, name, _ in stored_tensors(parameter, value.shape)
    }
    host = {parameter: np.asarray(value) for parameter, value in loaded.params.items()}
    for layers in operands.values():
        kernels = {name: host[places[name][0]][places[name][1]] for name in layers}
        tensors = nvfp4_layout.quantize_weights(kernels, layers)
        for name, kernel in kernels.items():
            error.add(kernel.T, nvfp4_layout.dequantize_named(tensors, name))
        yield from tensors.items()
    yield from plain_tensors(loaded, HIGH_PRECISION_BESIDE_NVFP4, without=quantized)


def high_precision_layers(loaded: LoadedModel, operands: Mapping[str, Mapping[str, Operand]]) -> list[str]:
    """The linear layers, the head among them, that are not in `operands`, by their full names."""
    quantized = {name for layers in operands.values() for name in layers}
    return [*(name for _, name, _ in _linear_layers(loaded) if name not in quantized), "lm_head"]


class Error:
    """The relative error of quantized weights: ‖W - Q(W)‖ / ‖W‖ over all of them."""

    def __init__(self):
        self.weights = self.layers = 0
        self._difference = self._norm = 0.0

    def add(self, weight: Shaped[np.ndarray, "..."], quantized: Shaped[np.ndarray, "..."]) -> None:
        """Takes one more layer into account."""
        self.layers += 1
        self.weights += weight.size
        self._difference += float(np.sum(np.square(quantized - weight), dtype=np.float64))
        self._norm += float(np.sum(np.square(weight), dtype=np.float64))

    @property
    def relative(self) -> float:
        return (self._difference / self._norm) ** 0.5 if self._norm else 0.0


def model_files(loaded: LoadedModel, dtype: str, quantization: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The files beside the weights: `config.json`, and the tokenizer's where there is one."""
    content = {**loaded.origin.config_json, **config_json(loaded.config), "dtype": dtype, "torch_dtype": dtype}
    content.pop("rope_scaling", None)
    if quantization is not None:
        content["quantization_config"] = quantization
    files = dict(loaded.origin.files)
    if TOKENIZER in files and _TOKENIZER_CONFIG not in files:
        name = loaded.tokenizer.decode([loaded.tokenizer.end_of_text])
        files[_TOKENIZER_CONFIG] = _json({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name})
    return {CONFIG: _json(content), **files}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def check_destination(destination: pathlib.Path) -> None:
    """Raises DataError for a destination that holds something."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise DataError(f"{destination} exists; give --to=DIR a new folder")


def write_folder(
    destination: str | os.PathLike, tensors: Tensors, files: Mapping[str, bytes], shard_bytes: int = SHARD_BYTES
) -> int:
    """Writes a folder whole or not at all; returns the bytes of its weights.

    Raises:
      DataError: the destination exists and is not an empty folder.
      StorageError: it cannot be written.
    """
    destination = pathlib.Path(destination).expanduser().absolute()
    check_destination(destination)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    with _storage_errors(destination):
        temporary.mkdir(parents=True)
    try:
        with _storage_errors(destination):
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            size = _write_weights(temporary, tensors, shard_bytes)
            temporary.rename(destination)
        return size
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(folder: pathlib.Path, tensors: Tensors, shard_bytes: int) -> int:
    names: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, shard_bytes)):
        safetensors.numpy.save_file(shard, folder / f"{number}", metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / f"{number}")  # the library lets nobody else read it
        names.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(names) == 1:
        (folder / "0").rename(folder / SINGLE_FILE)
        return total
    weight_map = {}
    for number, in_shard in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number}").rename(folder / file)
        weight_map |= dict.fromkeys(in_shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_bytes(_json(index))
    return total


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[dict[str, Shaped[np.ndarray, "..."]]]:
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


@contextmanager
def _storage_errors(destination: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{destination} cannot be written: {reason}") from error
