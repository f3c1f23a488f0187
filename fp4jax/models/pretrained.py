"""Pretrained models: one set of parameters, built into a model under any policy.

    loaded = load_parameters("smollm2-135m")
    baseline, quantized = loaded.model("bf16"), loaded.model("averis")  # share their parameters
    forward = nnx.jit(lambda model, tokens: model(tokens))
    logits_BxTxV = forward(quantized, tokens_BxT)

Under jit a call compiles once for each policy and shape; without it, every call compiles its scan anew.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from fp4jax import policy as policies
from fp4jax.data.errors import DataError
from fp4jax.data.gguf import SMOLLM2, GGUFFile, find_gguf
from fp4jax.data.tokenizers import Tokenizer, gguf_tokenizer, load_tokenizer
from fp4jax.models import gguf, hf_folder, saved_run
from fp4jax.models.qwen3 import Qwen3, Qwen3Config
from fp4jax.models.registry import model_class
from fp4jax.policy import Policy
from fp4jax.recipes import Recipe

Parameters = dict[str, Float32[Array, "..."]]
"""Parameters by dotted path, stacked over layers: "layers.mlp.up_proj.kernel" is [L, inputs, outputs]."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What came with the parameters that a model of ours has no use for, and an export has.

    Attributes:
      config_json: keys of a Hugging Face `config.json`, of which ours take the place.
      files: of the tokenizer, by name; may be empty.
      dtype: the smallest type that holds every parameter as it came: "float32", "bfloat16" or "float16".
    """

    config_json: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"


class MissingTokenizer(Tokenizer):
    """In the place of a tokenizer that a folder does not have: whatever is asked of it is a DataError."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self._raise()

    def decode(self, ids: Sequence[int]) -> str:
        self._raise()

    def encode_array(self, text: str) -> np.ndarray:
        self._raise()

    def __getattr__(self, name: str):
        self._raise()

    def _raise(self) -> NoReturn:
        raise DataError(f"{self.__dict__['_folder']} holds no {hf_folder.TOKENIZER}; put the model's own there")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A pretrained model before it has a policy.

    Attributes:
      config: the architecture, with the dtype of activations.
      params: float32, by dotted path; every model made of it holds these arrays, not copies.
      tokenizer: the model's own.
      origin: what else came with them.
    """

    config: Qwen3Config
    params: Parameters
    tokenizer: Tokenizer
    origin: Origin = Origin()

    def model(
        self,
        recipe: str | Recipe = "bf16",
        policy: str | Policy = "all_linear",
        *,
        backend: str = "auto",
        gemm: str = "auto",
    ) -> Qwen3:
        """The model under a recipe; takes no memory of its own.

        Args:
          recipe: what the policy of that name gives to its layers.
          policy: a name, rules or a file (`fp4jax.policy.policy`), or a `Policy`, which has its own recipes: `recipe`
            is not used.
          backend, gemm: as in `fp4jax.dot_general`.

        Raises:
          ValueError: an unknown recipe or policy, or a rule that matches no layer.
        """
        chosen = policy if isinstance(policy, Policy) else policies.policy(policy, recipe, self.config.linear_paths)
        graphdef, state = nnx.split(_abstract(self.config, chosen, backend, gemm))
        filled = [(path, variable.replace(self.params[_dotted(path)])) for path, variable in nnx.to_flat_state(state)]
        return nnx.merge(graphdef, nnx.from_flat_state(filled))


def load(
    path: str | os.PathLike,
    *,
    recipe: str | Recipe = "bf16",
    policy: str | Policy = "all_linear",
    dtype: str = "float32",
    backend: str = "auto",
    gemm: str = "auto",
) -> Qwen3:
    """A pretrained model, ready to call: `model(tokens_BxT)` gives float32 logits [B, T, V].

    Args:
      path: what `load_parameters` reads.
      dtype: of activations and of high-precision products, "float32" or "bfloat16".
      recipe, policy, backend, gemm: as in `LoadedModel.model`.

    Raises:
      ValueError: what `load_parameters` and `LoadedModel.model` raise.
    """
    return load_parameters(path, dtype=dtype).model(recipe, policy, backend=backend, gemm=gemm)


def load_parameters(path: str | os.PathLike, *, dtype: str = "float32") -> LoadedModel:
    """Reads a pretrained model to be built under several policies.

    Args:
      path: a Hugging Face folder (`config.json` and safetensors: Qwen3 or a Llama, plain or as `convert` quantizes),
        a .gguf file with a Llama, "smollm2-135m", or the workdir of a run, of which the newest checkpoint is taken.
      dtype: of activations, "float32" or "bfloat16"; parameters are float32.

    Raises:
      ValueError: a package to install; a file that is missing, truncated, pickled or of another format; a model that is
        not supported, with all that is wrong; a tokenizer that is not supported.
    """
    if saved_run.is_run(path):
        return _from_run(path, dtype)
    if str(path) == SMOLLM2 or pathlib.Path(path).suffix == ".gguf":
        return _from_gguf(path, dtype)
    return _from_folder(path, dtype)


def parameter_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by its dotted path."""
    state = nnx.state(_abstract(config, Policy.of(), "auto", "auto"))
    return {_dotted(name): jax.tree.leaves(variable)[0].shape for name, variable in nnx.to_flat_state(state)}


def _from_gguf(path: str | os.PathLike, dtype: str) -> LoadedModel:
    file = GGUFFile(find_gguf(path))
    config = gguf.read_config(file, dtype)
    params = gguf.read_parameters(file, config, parameter_shapes(config))
    tokenizer = gguf_tokenizer(str(path), file)
    return LoadedModel(config, params, tokenizer, Origin(gguf.read_rest(file), _tokenizer_files(tokenizer)))


def _from_folder(path: str | os.PathLike, dtype: str) -> LoadedModel:
    folder = hf_folder.open_folder(path, dtype)
    params = hf_folder.read_parameters(folder, parameter_shapes(folder.config))
    has_tokenizer = (folder.path / hf_folder.TOKENIZER).is_file()
    tokenizer = load_tokenizer(folder.path) if has_tokenizer else MissingTokenizer(folder.path)
    rest = {key: value for key, value in folder.content.items() if key != "quantization_config"}
    return LoadedModel(folder.config, params, tokenizer, Origin(rest, folder.tokenizer_files(), folder.dtype))


def _from_run(path: str | os.PathLike, dtype: str) -> LoadedModel:
    step, run = saved_run.read_saved(path)
    config = saved_run.model_config(run, dtype)
    params = saved_run.read_parameters(path, parameter_shapes(config))
    tokenizer = saved_run.run_tokenizer(path, step, run.data.tokenizer)
    rest = {"max_position_embeddings": run.seq_len, "eos_token_id": tokenizer.end_of_text}
    return LoadedModel(config, params, tokenizer, Origin(rest, _tokenizer_files(tokenizer)))


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    content = tokenizer.tokenizer_json
    return {} if content is None else {hf_folder.TOKENIZER: content}


def _abstract(config: Qwen3Config, policy: Policy, backend: str, gemm: str) -> Qwen3:
    model = model_class(config)
    return nnx.eval_shape(lambda: model(config, policy=policy, rngs=nnx.Rngs(0), backend=backend, gemm=gemm))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
