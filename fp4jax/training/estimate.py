"""How long a run will take: operations counted from the configuration, speed measured with one matrix product."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_collections

UTILIZATION = 0.3
"""Assumed share of a plain matrix product's speed that a training step reaches; measured steps replace the estimate."""

LONG_RUN_SECONDS = 3600


def flops_per_token(config: ml_collections.ConfigDict, parameters: int) -> float:
    """Returns the multiply-adds x 2 that training on one token takes, forward and backward.

    6 per parameter of a matrix (the head counts where it is tied to the embedding, the look-up does not), and
    6 x layers x heads x head_dim x seq_len for causal attention (Chinchilla, arXiv 2203.15556, appendix F).

    Args:
      config: the whole configuration.
      parameters: without embedding; of experts those that a token chooses.
    """
    model = config.model
    head = model.vocab_size * model.hidden_size if model.tie_embeddings else 0
    attention = model.num_layers * model.num_heads * model.head_dim * config.seq_len
    return 6.0 * (parameters + head + attention)


def measured_flops_per_second(dtype: str) -> float:
    """Returns the multiply-adds x 2 a second of a square matrix product on the first device; takes under a second."""
    size = 512 if jax.default_backend() == "cpu" else 8192
    operand = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(operand, operand).block_until_ready()
    start = time.perf_counter()
    for _ in range(3):
        result = product(operand, operand)
    result.block_until_ready()
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def estimated_step_seconds(config: ml_collections.ConfigDict, parameters: int, devices: int) -> float:
    """Returns a first guess of a step's seconds, before any was measured."""
    flops = flops_per_token(config, parameters) * config.batch_size * config.seq_len
    dtype = "float32" if jax.default_backend() == "cpu" else config.model.dtype
    return flops / (UTILIZATION * measured_flops_per_second(dtype) * devices)


@dataclass
class StepTimer:
    """Seconds per step from the steps that were measured; the first ones compile and do not count."""

    warm_up: int = 2
    _count: int = 0
    _start: float = 0.0
    _paused: float = 0.0

    def step_done(self) -> None:
        """Called once per step, when its result has arrived."""
        self._count += 1
        if self._count == self.warm_up:
            self._start = time.perf_counter()
            self._paused = 0.0

    def exclude(self, seconds: float) -> None:
        """Leaves out time that was spent on validation or on writing a checkpoint."""
        self._paused += seconds

    @property
    def seconds_per_step(self) -> float | None:
        """None until a step was measured."""
        measured = self._count - self.warm_up
        return (time.perf_counter() - self._start - self._paused) / measured if measured > 0 else None

    @property
    def measured_steps(self) -> int:
        return max(self._count - self.warm_up, 0)


def duration(seconds: float) -> str:
    """Returns "45 s", "3 min 20 s", "5 h 12 min" or "4.8 days"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 2 * 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86400:.1f} days"


def hint(config: ml_collections.ConfigDict, seconds: float) -> str | None:
    """Says what to change if the run takes over an hour."""
    if seconds <= LONG_RUN_SECONDS:
        return None
    steps = max(int(config.steps * LONG_RUN_SECONDS / seconds), 1)
    return (
        f"over an hour: --config.steps={steps} would take about one; a smaller batch_size, seq_len or model.num_layers "
        "and more devices (--config.mesh.data=-1) also help"
    )
