"""What a training step reads and writes, and how it comes into being: in its shards, nothing is replicated first."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float32, Int32, PyTree

from fp4jax import distributed, models
from fp4jax.layout import partition_spec
from fp4jax.training.initial_weights import pretrained_parameters
from fp4jax.training.mesh import replicated

Parameters = dict[str, Float32[Array, "..."]]
"""The model's parameters by dotted path ("layers.attention.query"): float32, the master weights."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: optimizer steps done; params: by dotted path; opt_state: optax's. The step donates it."""

    step: Int32[Array, ""]
    params: Parameters
    opt_state: PyTree


@dataclass(frozen=True)
class ModelTemplate:
    """A model without its numbers: everything that turns `Parameters` into a model again.

    names[i] is the parameter that fills leaf i of the NNX state; logical_axes gives each parameter's axis names.
    """

    graphdef: nnx.GraphDef
    treedef: jax.tree_util.PyTreeDef
    names: tuple[str, ...]
    logical_axes: dict[str, tuple[str | None, ...]]
    abstract: dict[str, jax.ShapeDtypeStruct]

    def merge(self, params: Parameters) -> nnx.Module:
        """Returns the model that holds these parameters."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, [params[name] for name in self.names]))

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each parameter lives, by the table of `fp4jax.layout`."""
        return {name: NamedSharding(mesh, partition_spec(axes)) for name, axes in self.logical_axes.items()}


def model_template(config: ml_collections.ConfigDict) -> ModelTemplate:
    """Traces the model's construction; nothing is allocated.

    Raises:
      ValueError: the model holds state that is not an nnx.Param, or a parameter that is not float32.
    """
    model = nnx.eval_shape(lambda: models.build(config, nnx.Rngs(jax.random.key(0))))
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        others = ", ".join(".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
        raise ValueError(f"the training step keeps parameters only; this model also holds {others}")
    logical_axes, abstract = {}, {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        abstract[name] = jax.tree.leaves(variable)[0]
        logical_axes[name] = tuple(variable.get_metadata().get("out_sharding") or (None,) * abstract[name].ndim)
        if abstract[name].dtype != jnp.float32:
            raise ValueError(f"parameter {name} is {abstract[name].dtype}; master weights are float32")
    return ModelTemplate(graphdef, jax.tree.structure(state), _leaf_names(state), logical_axes, abstract)


def _leaf_names(state: PyTree) -> tuple[str, ...]:
    """The dotted path of each leaf, in the order of the state's own flattening."""
    flat = nnx.to_flat_state(state)
    numbered = jax.tree.unflatten(jax.tree.structure(state), range(len(jax.tree.leaves(state))))
    position = {jax.tree.leaves(variable)[0]: path for path, variable in nnx.to_flat_state(numbered)}
    assert len(position) == len(flat), "a parameter is shared under two paths"
    return tuple(".".join(map(str, position[i])) for i in range(len(flat)))


def create_state(
    config: ml_collections.ConfigDict, template: ModelTemplate, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Initializes parameters and optimizer state, every array directly in its shards.

    Parameters are drawn from `config.seed`, or are those of `config.init_from`.

    Raises:
      ValueError: weights that cannot be read, or are not those of this model or tokenizer.
    """
    shardings = state_shardings(template, optimizer, mesh)
    if config.init_from:
        params = jax.device_put(pretrained_parameters(config), shardings.params)
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
        return TrainState(jax.device_put(np.int32(0), shardings.step), params, opt_state)

    def initialize(seed: Int32[Array, ""]) -> TrainState:
        model = models.build(config, nnx.Rngs(jax.random.key(seed)))
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        params = dict(zip(template.names, leaves, strict=True))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return distributed.together(jax.jit(initialize, out_shardings=shardings))(np.int32(config.seed))


def abstract_state(template: ModelTemplate, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state's shapes and dtypes."""
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, dict(template.abstract), jax.eval_shape(optimizer.init, template.abstract))


def state_shardings(template: ModelTemplate, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns a NamedSharding for every array of the state: moments live where their parameter does."""
    of_parameter = template.shardings(mesh)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        return of_parameter[name] if name in of_parameter and leaf.ndim else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state(template, optimizer))


def sharded_abstract_state(template: ModelTemplate, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings: what a checkpoint is restored into."""
    return jax.tree.map(_with_sharding, abstract_state(template, optimizer), state_shardings(template, optimizer, mesh))


def sharded_abstract_params(template: ModelTemplate, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the parameters' shapes, dtypes and shardings."""
    return jax.tree.map(_with_sharding, dict(template.abstract), template.shardings(mesh))


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Returns the function with `mesh` as the ambient mesh, which bare PartitionSpecs in the model refer to."""

    @functools.wraps(function)
    def call(*args: object) -> object:
        with jax.set_mesh(mesh):
            return function(*args)

    return call
