"""Pretrained models: one set of parameters, built into a model under any policy.

    loaded = load_parameters("smollm2-135m")
    baseline, quantized = loaded.model("bf16"), loaded.model("averis")  # share their parameters
    forward = nnx.jit(lambda model, tokens: model(tokens))
    logits_BxTxV = forward(quantized, tokens_BxT)

Under jit a call compiles once for each policy and shape; without it, every call compiles its scan anew.
"""

import dataclasses
import os

import jax
from flax import nnx
from jaxtyping import Array, Float32

from fp4jax import policy as policies
from fp4jax.data.gguf import GGUFFile, find_gguf
from fp4jax.data.tokenizers import Tokenizer, gguf_tokenizer
from fp4jax.models.gguf import read_config, read_parameters
from fp4jax.models.llama import Llama, LlamaConfig
from fp4jax.policy import Policy
from fp4jax.recipes import Recipe

Parameters = dict[str, Float32[Array, "..."]]
"""Parameters by dotted path, stacked over layers: "layers.mlp.up_proj.kernel" is [L, inputs, outputs]."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A pretrained model before it has a policy.

    Attributes:
      config: the architecture, with the dtype of activations.
      params: float32, by dotted path; every model made of it holds these arrays, not copies.
      tokenizer: the model's own.
    """

    config: LlamaConfig
    params: Parameters
    tokenizer: Tokenizer

    def model(
        self,
        recipe: str | Recipe = "bf16",
        policy: str | Policy = "all_linear",
        *,
        backend: str = "auto",
        gemm: str = "auto",
    ) -> Llama:
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
) -> Llama:
    """A pretrained model, ready to call: `model(tokens_BxT)` gives float32 logits [B, T, V].

    Args:
      path: a .gguf file with a Llama, or "smollm2-135m".
      dtype: of activations and of high-precision products, "float32" or "bfloat16".
      recipe, policy, backend, gemm: as in `LoadedModel.model`.

    Raises:
      ValueError: what `load_parameters` and `LoadedModel.model` raise.
    """
    return load_parameters(path, dtype=dtype).model(recipe, policy, backend=backend, gemm=gemm)


def load_parameters(path: str | os.PathLike, *, dtype: str = "float32") -> LoadedModel:
    """Reads a .gguf file, or "smollm2-135m", to be built under several policies.

    Raises:
      ValueError: a package to install; a file that is missing, truncated or no GGUF; a model that is not a Llama, with
        all that is wrong; a tokenizer that is not supported.
    """
    file = GGUFFile(find_gguf(path))
    config = read_config(file, dtype)
    state = nnx.state(_abstract(config, Policy.of(), "auto", "auto"))
    shapes = {_dotted(name): jax.tree.leaves(variable)[0].shape for name, variable in nnx.to_flat_state(state)}
    return LoadedModel(config, read_parameters(file, config, shapes), gguf_tokenizer(str(path), file))


def _abstract(config: LlamaConfig, policy: Policy, backend: str, gemm: str) -> Llama:
    return nnx.eval_shape(lambda: Llama(config, policy=policy, rngs=nnx.Rngs(0), backend=backend, gemm=gemm))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
