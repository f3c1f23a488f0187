"""The measurement: loss and gradients with some linear layers quantized, against the same model in high precision.

For gradients g (quantized) and g0 (high precision) of the mean loss of a batch, taken over some parameters:

    relative error  |g - g0| / |g0|        cosine  <g, g0> / (|g| |g0|)

Both are over all batches and seeds: sums of squares and of products are added up before they are divided.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from fp4jax import models
from fp4jax.analysis.sensitivity.switches import Switches, switched
from fp4jax.models.qwen3 import LINEARS, Qwen3

Batch = Mapping[str, Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Linear layers that are quantized together.

    Attributes:
      kind: "type", "block", "layer" or "policy".
      name: of the type, block, layer or policy.
      mask: bool [L, 7], in the order of LINEARS.
    """

    kind: str
    name: str
    mask: Bool[np.ndarray, "L linears"]


@dataclasses.dataclass(frozen=True)
class GradientError:
    """Of a part of the gradient; NaN where that part is zero in high precision, or empty."""

    relative: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Effect:
    """What quantizing the layers of a choice does.

    Attributes:
      loss: nats per token, with those layers quantized.
      loss_gap: loss minus that of high precision.
      own: error of the gradient of those layers' weights.
      total: error of the gradient of all parameters.
    """

    choice: Choice
    loss: float
    loss_gap: float
    own: GradientError
    total: GradientError


@dataclasses.dataclass(frozen=True)
class Scan:
    """Attributes:
    loss: of high precision, nats per token.
    effects: in the order of the choices.
    tokens: over which the loss is a mean.
    """

    loss: float
    effects: tuple[Effect, ...]
    tokens: int


def types(num_layers: int) -> list[Choice]:
    """Every type of linear layer, in all blocks."""
    masks = (np.arange(len(LINEARS)) == index for index in range(len(LINEARS)))
    return [
        Choice("type", name.split(".")[1], np.tile(mask, (num_layers, 1)))
        for name, mask in zip(LINEARS, masks, strict=True)
    ]


def blocks(num_layers: int) -> list[Choice]:
    """Every block, with all its linear layers."""
    masks = (np.arange(num_layers) == index for index in range(num_layers))
    return [Choice("block", str(index), np.tile(mask[:, None], (1, len(LINEARS)))) for index, mask in enumerate(masks)]


def layers(num_layers: int) -> list[Choice]:
    """Every linear layer by itself, block by block."""
    choices = []
    for block in range(num_layers):
        for index, name in enumerate(LINEARS):
            mask = np.zeros((num_layers, len(LINEARS)), bool)
            mask[block, index] = True
            choices.append(Choice("layer", f"layers.{block}.{name}", mask))
    return choices


def scan(
    meter: "Meter",
    batches: Iterable[Batch],
    choices: Sequence[Choice],
    *,
    seeds: Sequence[int] = (0,),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Measures every choice on every batch.

    A batch is one quantization: its tokens share means and scales as they would in training.

    Args:
      meter: of the model.
      batches: tokens and targets int [B, T], loss_mask [B, T].
      choices: layers that are quantized together.
      seeds: of stochastic rounding; errors are over all of them, the losses averaged.
      progress: is told the number of measurements done on a batch, and of all of them.

    Raises:
      ValueError: no batch, no seed, or no token.
    """
    sums = [_Sums() for _ in choices]
    reference_loss, tokens, total = 0.0, 0, len(choices) * len(seeds)
    for batch in batches:
        off = np.zeros((meter.num_layers, len(LINEARS)), bool)
        loss, count, reference = meter.loss_and_gradients(off, batch, 0)
        reference_loss, tokens = reference_loss + loss, tokens + count
        progress(0, total)
        for index, choice in enumerate(choices):
            for number, seed in enumerate(seeds, 1):
                loss, _, gradients = meter.loss_and_gradients(choice.mask, batch, seed)
                sums[index].add(loss, meter.compare(gradients, reference))
                progress(index * len(seeds) + number, total)
    if not tokens or not seeds:
        raise ValueError("a scan needs at least one batch with a token in it, and one seed")
    reference_loss /= tokens
    effects = (
        one.effect(choice, reference_loss, tokens * len(seeds)) for choice, one in zip(choices, sums, strict=True)
    )
    return Scan(reference_loss, tuple(effects), tokens)


class Meter:
    """Loss and gradients of one model under any switches; compiled once for each shape of batch.

    The model's policy says what quantizes a layer that is switched on.
    """

    def __init__(self, model: Qwen3):
        self.num_layers = model.config.num_layers
        graphdef, self._params, self._switches = nnx.split(switched(model), nnx.Param, Switches)

        def mean_loss(params, switches, batch, key):
            state = jax.tree.map(lambda _: switches, self._switches)
            total, tokens = models.loss(nnx.merge(graphdef, params, state), batch, key=key)
            # The mean, as in training: the backward, which quantizes, sees gradients of that size.
            return total / jnp.maximum(tokens, 1), tokens

        self._loss_and_gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
        self.compare = jax.jit(_compare)

    def loss_and_gradients(
        self, mask: Bool[np.ndarray, "L linears"], batch: Batch, seed: int
    ) -> tuple[float, int, PyTree]:
        """(sum of negative log-likelihoods in nats, tokens, gradient of their mean)."""
        arrays = jnp.asarray(mask), jax.tree.map(jnp.asarray, dict(batch)), jax.random.key(seed)
        (loss, tokens), gradients = self._loss_and_gradients(self._params, *arrays)
        return float(loss) * int(tokens), int(tokens), gradients

    @property
    def programs(self) -> int:
        """How many programs were compiled for `loss_and_gradients`."""
        return self._loss_and_gradients._cache_size()


def _compare(quantized: PyTree, reference: PyTree) -> tuple[Float[Array, "4 L linears"], Float[Array, " 4"]]:
    """(|g - g0|², <g, g0>, |g|², |g0|²) of every linear layer, and of all other parameters together."""

    def products(g, g0, axes):
        pairs = ((g - g0, g - g0), (g, g0), (g, g), (g0, g0))
        return jnp.stack([jnp.sum(a * b, axis=axes) for a, b in pairs])

    linear, rest = {}, jnp.zeros(4, jnp.float32)
    flat = zip(nnx.to_flat_state(quantized), nnx.to_flat_state(reference), strict=True)
    for (path, g), (_, g0) in flat:
        g, g0 = g[...], g0[...]
        name = ".".join(map(str, path[1:-1]))
        if name in LINEARS:
            linear[name] = products(g, g0, (1, 2))
        else:
            rest += products(g, g0, None)
    return jnp.stack([linear[name] for name in LINEARS], axis=-1), rest


class _Sums:
    """What adds up over batches and seeds, in float64."""

    def __init__(self):
        self.loss, self.linear, self.rest = 0.0, 0.0, 0.0

    def add(self, loss: float, compared: tuple) -> None:
        linear, rest = (np.asarray(part, np.float64) for part in compared)
        self.loss, self.linear, self.rest = self.loss + loss, self.linear + linear, self.rest + rest

    def effect(self, choice: Choice, reference_loss: float, tokens: int) -> Effect:
        loss = self.loss / tokens
        own = _error(self.linear[:, choice.mask].sum(-1))
        total = _error(self.linear.sum((1, 2)) + self.rest)
        return Effect(choice, loss, loss - reference_loss, own, total)


def _error(sums: Float[np.ndarray, " 4"]) -> GradientError:
    error, product, quantized, reference = map(float, sums)
    if not reference:
        return GradientError(math.nan, math.nan)
    cosine = product / math.sqrt(quantized * reference) if quantized else math.nan
    return GradientError(math.sqrt(error / reference), cosine)
