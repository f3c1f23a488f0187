"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) with linear warm-up, cosine decay and clipping of the global norm."""

from collections.abc import Mapping

import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float32, Int32


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Returns step -> learning rate: linear from 0 over `warmup_steps`, then a cosine to
    `end_learning_rate_fraction` of the peak at `config.steps`.

    The first update (step 0) already moves: its rate is peak / warmup_steps. A run that is shorter than its warm-up
    only warms up.
    """
    optimizer = config.optimizer
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps

    def ramp(step: int | Int32[Array, ""]) -> Float32[Array, ""]:
        return peak * jnp.minimum((jnp.asarray(step, jnp.float32) + 1) / max(warmup, 1), 1)

    if config.steps <= warmup:
        return ramp
    decay = optax.cosine_decay_schedule(peak, config.steps - warmup, alpha=optimizer.end_learning_rate_fraction)
    return optax.join_schedules([ramp, decay], [warmup])


def decayed(logical_axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, bool]:
    """Says which parameters weight decay acts on: matrices, not vectors (norms); a stack of layers counts as one."""
    return {name: sum(axis != "layers" for axis in axes) >= 2 for name, axes in logical_axes.items()}


def make_optimizer(
    config: ml_collections.ConfigDict, logical_axes: Mapping[str, tuple[str | None, ...]]
) -> optax.GradientTransformation:
    """Returns clipping, Adam, decay and the learning rate as one transformation of float32 gradients."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed(logical_axes)),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
