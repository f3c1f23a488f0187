"""A model whose parameters no longer change: its kernels are prepared once, for every evaluation after that."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import PyTree

from fp4jax.operands import Prepared


class FrozenModel:
    """A model and its kernels as their recipes quantize them.

        frozen = FrozenModel(model)

        @jax.jit
        def logits(arrays, tokens_BxT):
            model, weights = frozen.bind(arrays)
            return model(tokens_BxT, weights=weights)

        logits(frozen.arrays, tokens_BxT)

    Attributes:
      config: the model's.
      arrays: parameters and prepared kernels, to be passed through jit.
      key: of all that its recipes draw in the forward (`+sr_all`; most draw nothing there).
    """

    def __init__(self, model: nnx.Module, seed: int = 0):
        """Quantizes the kernels, for the forward product alone."""
        self.config = model.config
        self.key = jax.random.key(seed)
        self._graphdef, state = nnx.split(model)

        def prepare(state):
            prepared = nnx.merge(self._graphdef, state).prepare_weights(self.key)
            return jax.tree.map(_without_backward, prepared, is_leaf=lambda node: isinstance(node, Prepared))

        self.arrays = (state, jax.jit(prepare)(state))

    def bind(self, arrays: PyTree) -> tuple[nnx.Module, PyTree]:
        """(the model, its `weights` argument) that hold these arrays; for use inside a traced function."""
        state, weights = arrays
        return nnx.merge(self._graphdef, state), weights


def _without_backward(prepared: Prepared) -> Prepared:
    return dataclasses.replace(prepared, backward=None)
