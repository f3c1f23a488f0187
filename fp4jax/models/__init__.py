"""Models: built from a configuration or from pretrained weights, trained on one loss."""

import math

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float32, PyTree

from fp4jax.models.cross_entropy import cross_entropy
from fp4jax.models.llama import Llama, LlamaConfig
from fp4jax.models.pretrained import LoadedModel, load, load_parameters
from fp4jax.models.qwen3 import Qwen3, Qwen3Config
from fp4jax.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig, routing_metrics
from fp4jax.models.registry import MODELS
from fp4jax.policy import Policy, policy
from fp4jax.recipes import Recipe
from fp4jax.statistics import Monitor

__all__ = [
    "Llama",
    "LlamaConfig",
    "LoadedModel",
    "Qwen3",
    "Qwen3Config",
    "Qwen3MoE",
    "Qwen3MoEConfig",
    "active_parameters",
    "build",
    "linear_recipes",
    "load",
    "load_parameters",
    "loss",
    "parameter_counts",
    "router_loss",
    "routing_metrics",
]


def build(config: ml_collections.ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    """The model of a configuration, its parameters drawn from `rngs.params()`.

    Raises:
      ValueError: an unknown model, recipe or policy, or sizes that do not fit together.
    """
    model, sizes, chosen = _parts(config)
    return model(sizes, policy=chosen, rngs=rngs, backend=config.backend, gemm=config.gemm)


def linear_recipes(config: ml_collections.ConfigDict) -> dict[str, Recipe]:
    """The recipe of every linear layer by its path, as `config.policy` gives them out; nothing is built.

    Raises:
      ValueError: as `build`.
    """
    _, sizes, chosen = _parts(config)
    return chosen.assign(sizes.linear_paths)


def _parts(config: ml_collections.ConfigDict) -> tuple[type[nnx.Module], Qwen3Config, Policy]:
    if config.model.name not in MODELS:
        raise ValueError(f"unknown model {config.model.name!r}; known: {', '.join(MODELS)}")
    model, model_config = MODELS[config.model.name]
    sizes = model_config.from_config(config.model)
    return model, sizes, policy(config.policy, config.recipe, sizes.linear_paths)


def loss(
    model: nnx.Module, batch: dict[str, Array], *, key=None, weights: PyTree = None, monitor: Monitor | None = None
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of negative log-likelihoods (nats) of the real targets, and their number.

    Args:
      batch: tokens and targets int[B, T], loss_mask [B, T] (0: no target); segment_ids and positions int[B, T] where
        the data have them (`config.data.document_mask`).
      key, weights, monitor: as the model takes them.
    """
    documents = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
    hidden_BxTxD = model.hidden(batch["tokens"], key=key, weights=weights, monitor=monitor, **documents)
    mask = batch["loss_mask"].astype(jnp.float32)
    return cross_entropy(hidden_BxTxD, model.head, batch["targets"], mask), jnp.sum(mask)


def router_loss(
    model: nnx.Module, monitor: Monitor
) -> tuple[Float32[Array, ""] | float, dict[str, Float32[Array, "..."]]]:
    """What a model's routers add to the loss that is trained, after a call with `monitor`.

    Returns:
      (load-balancing loss x the model's coefficient, 0.0 without routers; sums to be added up over microbatches, for
      `routing_metrics`: those of the call, and "load_balancing_loss" itself; empty without routers).
    """
    if not isinstance(model, Qwen3MoE):
        return 0.0, {}
    balance = model.load_balancing_loss(monitor.routing)
    return model.config.router_loss_coefficient * balance, monitor.routing | {"load_balancing_loss": balance}


def parameter_counts(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(all parameters, without the embedding). An untied head counts in both."""
    model = nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return total, total - math.prod(model.embedding.shape)


def active_parameters(config: ml_collections.ConfigDict) -> int:
    """Parameters that a token meets, without the embedding: of the experts those that it chooses."""
    model = nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))
    _, total = parameter_counts(config)
    if not isinstance(model, Qwen3MoE):
        return total
    experts = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model.layers.mlp.experts)))
    return total - experts + experts * model.config.num_experts_per_token // model.config.num_experts
