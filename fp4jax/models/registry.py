"""The models by their name, `config.model.name`."""

from flax import nnx

from fp4jax.models.llama import Llama, LlamaConfig
from fp4jax.models.qwen3 import Qwen3, Qwen3Config
from fp4jax.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig

MODELS = {
    "qwen3": (Qwen3, Qwen3Config),
    "llama": (Llama, LlamaConfig),
    "qwen3_moe": (Qwen3MoE, Qwen3MoEConfig),
}
"""Name → (model, its hyperparameters)."""


def name_of(config: Qwen3Config) -> str:
    """What `config.model.name` calls the model of these hyperparameters."""
    return next(name for name, (_, kind) in MODELS.items() if type(config) is kind)


def model_class(config: Qwen3Config) -> type[nnx.Module]:
    """The model of these hyperparameters."""
    return MODELS[name_of(config)][0]
