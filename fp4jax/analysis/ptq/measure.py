"""Loss and weight gradients of a pretrained model under a recipe, against the same model in high precision.

Post-training quantization: the weights were not trained for it. So this ranks what recipes do to the numbers of one
model, at no cost of training; it does not say how well a model trains under them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32, PyTree

from fp4jax.models.pretrained import LoadedModel
from fp4jax.recipes import Recipe, as_recipe


@dataclasses.dataclass(frozen=True)
class Sample:
    """One batch under one seed.

    Attributes:
      loss, exact_loss: mean negative log-likelihood in nats a token, under the recipe and in high precision.
      divergence: mean Kullback-Leibler divergence of the recipe's predictions from the exact ones, nats a token.
      gradient_error: |G - G_exact| / |G_exact| over the weights of all linear layers of the blocks, or None.
      cosine: of the same two gradients, or None.
    """

    loss: float
    exact_loss: float
    divergence: float
    gradient_error: float | None
    cosine: float | None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The samples of one recipe."""

    recipe: str
    samples: tuple[Sample, ...]

    @property
    def loss_gap(self) -> float:
        """(loss - exact loss) / exact loss, over all tokens."""
        loss, exact = (np.mean([getattr(s, name) for s in self.samples]) for name in ("loss", "exact_loss"))
        return float(loss / exact - 1)

    @property
    def loss_gap_error(self) -> float:
        """Standard error of `loss_gap` over the samples, which share no text; nan for a single one."""
        gaps = [s.loss - s.exact_loss for s in self.samples]
        if len(gaps) < 2:
            return float("nan")
        return float(np.std(gaps, ddof=1) / len(gaps) ** 0.5 / np.mean([s.exact_loss for s in self.samples]))

    def mean(self, field: str) -> float | None:
        """Mean of a field over the samples, or None where it was not measured."""
        values = [getattr(sample, field) for sample in self.samples]
        return None if None in values else float(np.mean(values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exact:
    """A batch in high precision: log-probabilities of every next token, loss, gradients of the linear layers."""

    log_probabilities: Float32[Array, "B T V"]
    loss: Float32[Array, ""]
    gradients: PyTree | None


def measure(
    loaded: LoadedModel,
    batches: Int32[np.ndarray, "batch B T1"],
    recipes: Sequence[str | Recipe],
    seeds: Sequence[int],
    with_gradients: bool = True,
) -> Iterator[Measurement]:
    """Every recipe on every batch, one after the other.

    Batches are dealt to the seeds in turn: batch i draws its noise from seed i mod len(seeds), so that the mean over
    samples is over text and noise at once. The reference of every batch is computed once and kept.

    Args:
      batches: token ids; the last T of each row are predicted.
      with_gradients: also compare weight gradients; takes about three times as long, and keeps one gradient in float32
        for each batch.

    Raises:
      ValueError: an unknown recipe, no recipes, seeds or batches.
    """
    if not (len(batches) and len(recipes) and len(seeds)):
        raise ValueError(
            f"got {len(batches)} batches, {len(recipes)} recipes, {len(seeds)} seeds: one of each is needed"
        )
    recipes = [as_recipe(recipe) for recipe in recipes]
    exact = functools.cache(lambda i: _exact(loaded, batches[i], with_gradients))
    for recipe in recipes:
        program, samples = _comparison(loaded, recipe, with_gradients), []
        for i, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seeds[i % len(seeds)]), i)
            samples.append(_sample(program(jnp.asarray(batch), key, exact(i)), exact(i), with_gradients))
        yield Measurement(recipe.name, tuple(samples))


def _exact(loaded: LoadedModel, batch, with_gradients: bool) -> Exact:
    evaluate, arrays = _evaluation(loaded, as_recipe("bf16"), with_gradients)
    return jax.block_until_ready(jax.jit(evaluate)(arrays, jnp.asarray(batch), None))


def _comparison(loaded: LoadedModel, recipe: Recipe, with_gradients: bool):
    """Compiled (tokens, key, exact) → loss, divergence, and the inner products of the two gradients."""
    evaluate, arrays = _evaluation(loaded, recipe, with_gradients)

    @jax.jit
    def compare(arrays, tokens, key, exact: Exact):
        got = evaluate(arrays, tokens, key)
        p, q = exact.log_probabilities, got.log_probabilities
        divergence = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
        difference = jax.tree.map(jnp.subtract, got.gradients, exact.gradients)
        pairs = ((difference, difference), (got.gradients, got.gradients), (got.gradients, exact.gradients))
        return got.loss, divergence, [optax.tree.vdot(a, b) for a, b in (*pairs, (exact.gradients, exact.gradients))]

    return functools.partial(compare, arrays)


def _evaluation(loaded: LoadedModel, recipe: Recipe, with_gradients: bool):
    """((kernels, others), tokens, key) → Exact under `recipe`, and those two groups of parameters."""
    graphdef, kernels, others = nnx.split(loaded.model(recipe), nnx.PathContains("kernel"), ...)

    def loss(kernels, others, tokens, key):
        model = nnx.merge(graphdef, kernels, others)
        log_probabilities = jax.nn.log_softmax(model(tokens[:, :-1], key=key), axis=-1)
        chosen = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen), log_probabilities

    def evaluate(arrays, tokens, key) -> Exact:
        kernels, others = arrays
        if not with_gradients:
            value, log_probabilities = loss(kernels, others, tokens, key)
            return Exact(log_probabilities, value, None)
        (value, log_probabilities), gradients = jax.value_and_grad(loss, has_aux=True)(kernels, others, tokens, key)
        return Exact(log_probabilities, value, gradients)

    return evaluate, (kernels, others)


def _sample(result, exact: Exact, with_gradients: bool) -> Sample:
    loss, divergence, (error, norm, product, exact_norm) = jax.tree.map(float, jax.device_get(result))
    if not with_gradients:
        return Sample(loss, float(exact.loss), divergence, None, None)
    cosine = product / (norm * exact_norm) ** 0.5
    return Sample(loss, float(exact.loss), divergence, (error / exact_norm) ** 0.5, cosine)
