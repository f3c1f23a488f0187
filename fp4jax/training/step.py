"""One optimizer step, compiled once: weights prepared once, gradients summed over microbatches in float32, one update.

Every draw is a function of (seed, step, microbatch) and of what the model folds in below that, so a resumed run repeats
the uninterrupted one bit for bit.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32, PyTree, UInt32

from fp4jax import distributed, models, scopes
from fp4jax.layout import BATCH
from fp4jax.statistics import Monitor
from fp4jax.training.divergence import finite_or_former
from fp4jax.training.mesh import replicated
from fp4jax.training.optimizer import learning_rate_schedule, make_optimizer
from fp4jax.training.state import (
    ModelTemplate,
    Parameters,
    TrainState,
    model_template,
    on_mesh,
    sharded_abstract_state,
    state_shardings,
)

Batch = dict[str, Array]
Metrics = dict[str, Array]
KeyData = UInt32[Array | np.ndarray, "..."]
"""The words of a random key."""


class Seeded:
    """A jitted function whose last argument, the words of the key of `seed`, is bound to it.

    As an argument of the program, where it could be a constant, the key lets runs with other seeds find the program of
    the first one in the compilation cache. The methods are those of what `jax.jit` returns.
    """

    def __init__(self, jitted: Callable, seed: int):
        functools.update_wrapper(self, jitted)
        self._jitted = jitted
        self._key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))

    def __call__(self, *args: object) -> object:
        return self._jitted(*args, self._key_data)

    def trace(self, *args: object) -> jax.stages.Traced:
        return self._jitted.trace(*args, self._key_data)

    def lower(self, *args: object) -> jax.stages.Lowered:
        return self._jitted.lower(*args, self._key_data)

    def _cache_size(self) -> int:
        return self._jitted._cache_size()


def split_batch(batch: Batch, microbatches: int, mesh: Mesh) -> Batch:
    """Returns [microbatches, B / microbatches, T]; microbatch m takes rows m, m + microbatches, ...

    With that stride every device's rows split evenly, so no row moves between devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *BATCH))

    def split(rows: Array) -> Array:
        parts = jnp.swapaxes(rows.reshape(-1, microbatches, *rows.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(parts, sharding)

    return jax.tree.map(split, batch)


def make_train_step(
    config: ml_collections.ConfigDict, template: ModelTemplate, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted (state, batch) -> (state, metrics); the given state is donated.

    batch: tokens, targets int32[B, T] and loss_mask[B, T]. metrics: loss (mean negative log-likelihood of the real
    tokens, nats), grad_norm (global, before clipping), learning_rate, tokens (real ones in this step); of a model with
    routers also load_balancing_loss (mean over microbatches, without its coefficient) and `models.routing_metrics`;
    with `on_nonfinite` "skip" also skipped, 1 where the update was not made because loss or grad_norm is not finite.
    """
    schedule = learning_rate_schedule(config)

    def train_step(state: TrainState, batch: Batch, key_data: KeyData) -> tuple[TrainState, Metrics]:
        key = training_key(key_data, state.step)
        loss, gradients, _, routing = loss_and_gradients(config.microbatches, template, mesh, state.params, batch, key)
        with scopes.of_step_part("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": jnp.sum(batch["loss_mask"], dtype=jnp.float32),
        }
        if routing:
            metrics["load_balancing_loss"] = routing["load_balancing_loss"] / config.microbatches
            metrics |= models.routing_metrics(routing)
        if config.on_nonfinite == "skip":
            (params, opt_state), metrics["skipped"] = finite_or_former(
                loss, metrics["grad_norm"], (params, opt_state), (state.params, state.opt_state)
            )
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = state_shardings(template, optimizer, mesh)
    jitted = jax.jit(
        train_step,
        in_shardings=(shardings, NamedSharding(mesh, BATCH), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    return on_mesh(Seeded(distributed.together(jitted), config.seed), mesh)


def abstract_train_step(
    config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[Callable, PyTree, dict[str, jax.ShapeDtypeStruct]]:
    """(jitted step, state, batch) with shapes and shardings for arrays, to be traced or compiled under `mesh`."""
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    shape, sharding = (config.batch_size, config.seq_len), NamedSharding(mesh, BATCH)
    names = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.float32}
    if config.data.document_mask:
        names |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in names.items()}
    step = make_train_step(config, template, optimizer, mesh).__wrapped__
    with jax.set_mesh(mesh):
        return step, sharded_abstract_state(template, optimizer, mesh), batch


def training_key(key_data: KeyData, step: Int32[Array, ""]) -> jax.Array:
    """The key of all draws of the step that follows `step` steps, in a run with this key."""
    return jax.random.fold_in(jax.random.wrap_key_data(key_data), step)


def loss_and_gradients(
    microbatches: int,
    template: ModelTemplate,
    mesh: Mesh,
    params: Parameters,
    batch: Batch,
    key: jax.Array,
    probes: PyTree = None,
) -> tuple[Float32[Array, ""], Parameters, PyTree, dict[str, Array]]:
    """Mean loss over the batch's real tokens, gradients in float32, statistics of the linear layers, routing sums.

    The gradient is that of the loss and, of a model with routers, of what `models.router_loss` adds to it: its mean
    over microbatches. The routing sums are of the same function, added up over microbatches.

    probes: the model's, for (forward, gradient) statistics as in `fp4jax.statistics.Monitor`; None: no statistics.
    """
    weights_key, batch_key = jax.random.split(key)
    weights = template.merge(params).prepare_weights(weights_key)
    # Dividing every microbatch by the whole batch's tokens makes their sum the mean, and gives the backward, which
    # quantizes, gradients of their final size.
    tokens = jnp.maximum(jnp.sum(batch["loss_mask"], dtype=jnp.float32), 1)

    def microbatch_loss(params: Parameters, probes: PyTree, microbatch: Batch, index: Int32[Array, ""]) -> tuple:
        microbatch_key = jax.random.fold_in(batch_key, index)
        model, monitor = template.merge(params), Monitor(probes or {})
        total, _ = models.loss(model, microbatch, key=microbatch_key, weights=weights, monitor=monitor)
        added, routing = models.router_loss(model, monitor)
        return total / tokens + added / microbatches, (total / tokens, monitor.forward, routing)

    value_and_gradients = jax.value_and_grad(microbatch_loss, argnums=(0, 1), has_aux=True)

    def one(microbatch: Batch, index: Int32[Array, ""]) -> tuple:
        (_, (loss, forward, routing)), (gradients, backward) = value_and_gradients(params, probes, microbatch, index)
        return loss, gradients, None if probes is None else (forward, backward), routing

    if microbatches == 1:
        # Without the scan there is no second set of float32 gradients in memory.
        return one(batch, jnp.int32(0))

    def accumulate(carry: tuple, microbatch_and_index: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, carry, one(*microbatch_and_index)), None

    parts = split_batch(batch, microbatches, mesh)
    first = jax.tree.map(lambda rows: rows[0], parts)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first, jnp.int32(0)))
    return jax.lax.scan(accumulate, zeros, (parts, jnp.arange(microbatches)))[0]


def make_loss_step(
    config: ml_collections.ConfigDict, template: ModelTemplate, mesh: Mesh
) -> Callable[[Parameters, Batch], tuple[Float32[Array, ""], Float32[Array, ""]]]:
    """Returns the jitted (params, batch) -> (sum of negative log-likelihoods in nats, tokens) of validation.

    A recipe whose forward rounds stochastically (`+sr_all`) draws from `config.seed`; the others draw nothing.
    """

    def loss_step(params: Parameters, batch: Batch, key_data: KeyData) -> tuple[Array, Array]:
        key = jax.random.wrap_key_data(key_data)
        total, count = models.loss(template.merge(params), batch, key=key, weights=None)
        return jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32)

    in_shardings = (template.shardings(mesh), NamedSharding(mesh, BATCH), replicated(mesh))
    jitted = jax.jit(loss_step, in_shardings=in_shardings, out_shardings=replicated(mesh))
    return on_mesh(Seeded(distributed.together(jitted), config.seed), mesh)
