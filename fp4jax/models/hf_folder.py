"""A model in a Hugging Face folder: `config.json` beside safetensors, as hyperparameters and parameters of ours.

Weights are float32, float16, bfloat16, or NVFP4 as `fp4jax.models.nvfp4_layout` has it, which is dequantized. Whatever
is wrong with a folder is one error that lists it, raised before a tensor is read.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Shaped

from fp4jax.data.errors import DataError
from fp4jax.models import nvfp4_layout
from fp4jax.models.hugging_face import ARCHITECTURES, is_kernel, stored_tensors
from fp4jax.models.problems import raise_problems
from fp4jax.models.qwen3 import Qwen3Config
from fp4jax.models.safetensors_files import DTYPES, PICKLED, StoredTensor, find_tensors, read_json

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""What goes along with the weights, unread."""

_CLAIM = "is not a model that fp4jax can run"
_PLAIN = ("F32", "F16", "BF16")
# Tensors without which the model is whole: a table of old files, and the scales of activations, which are the recipe's.
_IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|(input|output)_(global_)?scale)$")
_NO_DTYPE = "float32"


@dataclasses.dataclass(frozen=True)
class Folder:
    """An opened folder.

    Attributes:
      path: of the folder.
      config: the hyperparameters.
      content: everything in `config.json`.
      tensors: of all files, by name.
    """

    path: pathlib.Path
    config: Qwen3Config
    content: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def quantized(self) -> bool:
        return "quantization_config" in self.content

    @property
    def dtype(self) -> str:
        """The smallest type that holds every weight as it is: "bfloat16", "float16" or "float32"."""
        found = {tensor.dtype for tensor in self.tensors.values() if tensor.dtype in _PLAIN}
        only = found.pop() if len(found) == 1 and not self.quantized else None
        return DTYPES[only].name if only else _NO_DTYPE

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of TOKENIZER_FILES that there are."""
        paths = [self.path / name for name in TOKENIZER_FILES]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def open_folder(path: str | os.PathLike, dtype: str) -> Folder:
    """Reads `config.json` and what the safetensors files hold, for activations of `dtype`.

    Raises:
      DataError: no folder, no or pickled weights, a file that is truncated or no JSON, another architecture; all of it
        is listed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"{path} {_no_folder(path)}")
    content = read_json(path / CONFIG)
    tensors, problems = find_tensors(path)
    config = None
    if isinstance(content, str):
        problems.insert(0, content)
    elif not isinstance(content.get("model_type"), str) or content["model_type"] not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        problems.insert(0, f"model_type {content.get('model_type')!r} in {CONFIG}, supported: {known}")
    else:
        config, found = ARCHITECTURES[content["model_type"]].read(content, dtype)
        if config is not None and tensors and config.num_layers > len(tensors):
            found.append(f"{config.num_layers:,} layers in {len(tensors):,} tensors")
        problems = found + problems
        if "quantization_config" in content:
            problems += nvfp4_layout.config_problems(content["quantization_config"])
    raise_problems(path, _CLAIM, problems)
    return Folder(path, config, content, tensors)


def _no_folder(path: pathlib.Path) -> str:
    if not path.exists():
        return "does not exist; give a Hugging Face folder, a .gguf file, a run's workdir or a package's name"
    if path.suffix in PICKLED:
        return "is pickled, which runs code when it is read; only safetensors in a folder with config.json is"
    return f"is not a folder; give the folder that holds it and its {CONFIG}, or a .gguf file"


def read_parameters(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float32[Array, "..."]]:
    """Every parameter by its dotted path, in float32.

    Args:
      shapes: the model's parameters and their shapes.

    Raises:
      DataError: tensors that are missing, of another shape or type, or not known; they are listed.
    """
    raise_problems(folder.path, _CLAIM, _tensor_problems(folder, shapes))
    return {name: jnp.asarray(_parameter(folder, name, shape)) for name, shape in shapes.items()}


def _tensor_problems(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems, known = [], set()
    for parameter, shape in shapes.items():
        for _, name, expected in stored_tensors(parameter, shape):
            parts = {name: (expected, None)}
            if _is_packed(folder, name, parameter):
                parts = _packed_parts(name, expected)
            known |= set(parts)
            for part, (part_shape, part_dtype) in parts.items():
                problems += _problems_of_one(folder.tensors.get(part), part, part_shape, part_dtype)
    extra = [name for name in folder.tensors if name not in known and not _IGNORED.search(name)]
    if folder.config.tie_embeddings and "lm_head.weight" in extra and _head_is_embedding(folder):
        extra.remove("lm_head.weight")
    return problems + [f"tensor {name!r} is not part of a {folder.content['model_type']} model" for name in extra]


def _problems_of_one(tensor: StoredTensor | None, name: str, shape: tuple[int, ...], dtype: str | None) -> list[str]:
    if tensor is None:
        return [f"no tensor {name!r}"]
    problems = []
    if tensor.shape != shape:
        problems.append(f"tensor {name!r} is {list(tensor.shape)}, expected {list(shape)}")
    accepted = _PLAIN if dtype is None else (dtype,)
    if tensor.dtype not in accepted:
        problems.append(f"tensor {name!r} is {tensor.dtype}, expected {' or '.join(accepted)}")
    return problems


def _is_packed(folder: Folder, name: str, parameter: str) -> bool:
    return folder.quantized and is_kernel(parameter) and name not in folder.tensors


def _packed_parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    prefix = name.removesuffix("weight")
    return {prefix + suffix: expected for suffix, expected in nvfp4_layout.shapes(shape).items()}


def _head_is_embedding(folder: Folder) -> bool:
    """Some files of models with one matrix for both hold it twice."""
    head, embedding = (folder.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    return embedding is not None and head.shape == embedding.shape and np.array_equal(head.array(), embedding.array())


def _parameter(folder: Folder, parameter: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    result = np.empty(shape, np.float32)
    for index, name, _ in stored_tensors(parameter, shape):
        weight = _weight(folder, name, parameter)
        result[index] = weight.T if is_kernel(parameter) else weight
    return result


def _weight(folder: Folder, name: str, parameter: str) -> Shaped[np.ndarray, "..."]:
    if not _is_packed(folder, name, parameter):
        return folder.tensors[name].array()
    layer = name.removesuffix(".weight")
    stored = {f"{layer}.{part}": folder.tensors[f"{layer}.{part}"].array() for part in nvfp4_layout.PARTS}
    return nvfp4_layout.dequantize_named(stored, layer)
