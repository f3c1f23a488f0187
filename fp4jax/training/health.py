"""The health of FP4 training, every `config.health.every` steps: a second compiled step beside the training step.

On that step's state, batch and random keys it makes the training step's gradient once more, now with the statistics of
every operand (`fp4jax.statistics`), and the gradient of the same model in high precision. It changes nothing, and the
training step knows nothing of it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float32, Int32

from fp4jax import distributed
from fp4jax.layout import BATCH
from fp4jax.statistics import FORWARD_STATISTICS, GRADIENT_STATISTICS
from fp4jax.training.mesh import replicated
from fp4jax.training.state import ModelTemplate, Parameters, TrainState, model_template, on_mesh
from fp4jax.training.step import Batch, KeyData, Seeded, loss_and_gradients, training_key

OPERANDS = ("fprop.x", "dgrad.g", "wgrad.x", "fprop.w", "dgrad.w", "wgrad.g")  # the left ones, then the right ones
WGRAD = "wgrad"
COMPARISON = ("product", "energy", "exact_energy", "noise")
"""Sums over a gradient and the exact one: of their products, of both squares, of the squared difference."""

# Ratio → whether a small one is the bad one.
OPERAND_RATIOS = {
    "sqnr_db": True,  # 10 log10(energy / energy of the quantization error)
    "underflow": False,  # of the elements that are not zero, the share that becomes it
    "saturated": False,  # of the same, the share with the largest code
    "zero_scales": False,  # of the blocks that are not zero, the share whose scale is
    "largest_scales": False,  # of the same, the share with the largest scale
    "mean_bias": False,  # R = |mu| / sqrt(|X|_F^2 / l), arXiv 2603.10444, equation 1; R^2: the mean's share of energy
    "residual_energy": False,  # of the energy, the share that the split leaves
}
WGRAD_RATIOS = {
    "split_energy": False,  # energy of all that the split adds to the residuals' product, by that of the gradient
    "cross_energy": False,  # the same of the terms with the residuals' column sums
    "cosine": True,  # of the gradient to the exact one
    "gradient_to_noise": True,  # |exact gradient| / |difference|
}
STOP_RATIO = 3**0.5
"""FP4 training no longer helps where |gradient| < sqrt(3) |noise| (arXiv 2505.19115)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HealthSums:
    """What a health step gives, with L layers.

    forward, gradient: linear layer → [L, FORWARD_STATISTICS], [L, GRADIENT_STATISTICS].
    comparison: linear layer → [L, COMPARISON]. all_parameters: COMPARISON over everything trained.
    loss, exact_loss: of the batch, under the recipe and in high precision.
    """

    forward: dict[str, Float32[Array, "L f"]]
    gradient: dict[str, Float32[Array, "L g"]]
    comparison: dict[str, Float32[Array, "L c"]]
    all_parameters: Float32[Array, " c"]
    loss: Float32[Array, ""]
    exact_loss: Float32[Array, ""]


def make_health_step(
    config: ml_collections.ConfigDict, template: ModelTemplate, mesh: Mesh
) -> Callable[[Parameters, Int32[Array, ""], Batch], HealthSums]:
    """Returns the jitted (params, steps done, batch) -> HealthSums."""
    exact_template = model_template(_in_high_precision(config))

    def health_step(params: Parameters, step: Int32[Array, ""], batch: Batch, key_data: KeyData) -> HealthSums:
        key = training_key(key_data, step)
        probes = template.merge(params).probes()
        loss, gradients, (forward, backward), _ = loss_and_gradients(
            config.microbatches, template, mesh, params, batch, key, probes
        )
        exact_loss, exact, *_ = loss_and_gradients(config.microbatches, exact_template, mesh, params, batch, key)
        comparison = {
            linear: _compare(gradients[_kernel(linear)], exact[_kernel(linear)], first_axis=1) for linear in probes
        }
        everything = sum(_compare(gradients[name], exact[name]) for name in sorted(gradients))
        return HealthSums(forward, backward, comparison, everything, loss, exact_loss)

    in_shardings = (template.shardings(mesh), replicated(mesh), NamedSharding(mesh, BATCH), replicated(mesh))
    jitted = jax.jit(health_step, in_shardings=in_shardings, out_shardings=replicated(mesh))
    return on_mesh(Seeded(distributed.together(jitted), config.seed), mesh)


def _in_high_precision(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    exact = ml_collections.ConfigDict(config)
    exact.update({"recipe": "bf16", "policy": "all_linear"})
    return exact


def _kernel(linear: str) -> str:
    """The parameter of a linear layer, stacked over layers."""
    return f"layers.{linear}.kernel"


def _compare(gradient, exact, first_axis: int = 0) -> Float32[Array, "..."]:
    """COMPARISON over the axes from `first_axis` on."""
    axes = tuple(range(first_axis, gradient.ndim))
    products = (gradient * exact, gradient * gradient, exact * exact, jnp.square(gradient - exact))
    return jnp.stack([jnp.sum(product, axis=axes) for product in products], axis=-1)


class HealthMonitor:
    """Runs the health step when it is due; `write` takes what it finds as `MetricsWriter.write_health` does."""

    def __init__(self, config: ml_collections.ConfigDict, template: ModelTemplate, mesh: Mesh, write: Callable | None):
        self._every = config.health.every
        self._step = make_health_step(config, template, mesh) if self._every else None
        self._write = write

    def due(self, step: int) -> bool:
        """Whether `step` (counted from 1) is one of `config.health.every`."""
        return self._every > 0 and step % self._every == 0

    def measure(self, step: int, state: TrainState, batch: Batch) -> float:
        """Writes the health of `step`, which is about to be done from `state`; returns the seconds it took."""
        start = time.perf_counter()
        sums = jax.device_get(self._step(state.params, state.step, batch))
        if self._write:
            self._write(step, health_table(sums), health_summary(sums))
        return time.perf_counter() - start


def health_table(sums: HealthSums) -> dict[str, list[float | None]]:
    """Every ratio by "ratio/operand/linear layer", with one value a layer; None where it is not defined.

    Operands are slots of a recipe ("fprop.x"), and "wgrad" for the weight gradient.
    """
    table = {}
    for linear in sums.forward:
        columns = dict(zip(FORWARD_STATISTICS, np.asarray(sums.forward[linear], np.float64).T, strict=True))
        columns |= dict(zip(GRADIENT_STATISTICS, np.asarray(sums.gradient[linear], np.float64).T, strict=True))
        for operand in OPERANDS:
            own = {name.removeprefix(f"{operand}."): v for name, v in columns.items() if name.startswith(f"{operand}.")}
            table |= {f"{name}/{operand}/{linear}": v for name, v in operand_ratios(own).items()}
        table |= {
            f"{name}/{WGRAD}/{linear}": _ratio(columns[f"{WGRAD}.{name}"], columns[f"{WGRAD}.energy"])
            for name in ("split_energy", "cross_energy")
        }
        compared = comparison_ratios(np.asarray(sums.comparison[linear], np.float64))
        table |= {f"{name}/{WGRAD}/{linear}": value for name, value in compared.items()}
    return {name: [_rounded(value) for value in values] for name, values in sorted(table.items())}


def health_summary(sums: HealthSums) -> dict[str, float | None]:
    """The numbers of the whole model: `comparison_ratios` over all parameters, and the loss minus the exact one."""
    compared = comparison_ratios(np.asarray(sums.all_parameters, np.float64))
    ratio = compared["gradient_to_noise"]
    return {
        "gradient_cosine": _rounded(compared["cosine"]),
        "gradient_to_noise": _rounded(ratio),
        "below_stop_ratio": None if np.isnan(ratio) else float(ratio < STOP_RATIO),
        "loss_gap": _rounded(float(sums.loss) - float(sums.exact_loss)),
    }


def operand_ratios(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """OPERAND_RATIOS of OPERAND_STATISTICS; NaN where one is not defined: no noise, nothing quantized."""
    return {
        "sqnr_db": 10 * np.log10(_ratio(sums["energy"], sums["noise"])),
        "underflow": _ratio(sums["underflows"], sums["elements"]),
        "saturated": _ratio(sums["saturated"], sums["elements"]),
        "zero_scales": _ratio(sums["zero_scales"], sums["blocks"]),
        "largest_scales": _ratio(sums["largest_scales"], sums["blocks"]),
        "mean_bias": np.sqrt(_ratio(sums["mean_energy"], sums["energy"])),
        "residual_energy": _ratio(sums["residual_energy"], sums["energy"]),
    }


def comparison_ratios(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Cosine and |gradient| / |noise| of COMPARISON along the last axis; NaN where one is not defined."""
    product, energy, exact_energy, noise = np.moveaxis(sums, -1, 0)
    return {
        "cosine": _ratio(product, np.sqrt(energy * exact_energy)),
        "gradient_to_noise": np.sqrt(_ratio(exact_energy, noise)),
    }


def _ratio(numerator, denominator):
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _rounded(value) -> float | None:
    """Six digits, as float32 gave them; None for what JSON has no number for."""
    return float(f"{float(value):.6g}") if np.isfinite(value) else None
