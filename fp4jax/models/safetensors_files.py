"""The safetensors files of a folder: what they hold, without reading it.

The library `safetensors` opens and so checks every file: header, names, and that the tensors cover the file, so a
truncated one is found before anything is read. The tensors are then mapped into memory by their place in it, because
the library gives NumPy no float8.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Shaped

from fp4jax.data.json_files import parse_json

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_LONGEST_NAME = 100
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""How files end that are read by running them as a program; none of them is opened."""


class StoredTensor(NamedTuple):
    """A tensor in a file: its safetensors dtype ("BF16"), shape and place."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def array(self) -> Shaped[np.ndarray, "..."]:
        """Its values, mapped from the file."""
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape or (1,)).reshape(self.shape)


def find_tensors(folder: pathlib.Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Every tensor of a folder by its name, and what is wrong with the files."""
    names, problems = _file_names(folder)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        try:
            found = _open(folder / name)
        except (safetensors.SafetensorError, OSError) as error:
            problems.append(f"{name} is not a whole safetensors file ({' '.join(str(error).split())})")
            continue
        problems += [f"tensor {tensor!r} is in two files" for tensor in found if tensor in tensors]
        tensors |= found
    return tensors, problems


def _file_names(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if isinstance(index, str):
            return [], [index]
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            return [], [f"{INDEX} has no weight_map from tensors to files"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if pathlib.PurePath(name).name != name or len(name) > _LONGEST_NAME]
        missing = [name for name in names if name not in outside and not (folder / name).is_file()]
        problems = [
            f"{INDEX} names {name[:_LONGEST_NAME]!r}, which is no file of the folder" for name in [*outside, *missing]
        ]
        return [name for name in names if name not in (*outside, *missing)], problems
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE], []
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return [], [
            f"its weights are pickled ({', '.join(pickled[:3])}), which runs code when it is read: only safetensors "
            "is (transformers' save_pretrained writes it)"
        ]
    return [], [f"no {SINGLE_FILE} and no {INDEX}"]


def _open(path: pathlib.Path) -> dict[str, StoredTensor]:
    with safetensors.safe_open(path, "numpy"):
        pass
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: Mapping = json.loads(file.read(size))
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_json(path: pathlib.Path) -> dict | str:
    """The object in a JSON file, or what is wrong with the file."""
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{path.name} is not JSON ({error})"
    return content if isinstance(content, dict) else f"{path.name} holds no JSON object"
