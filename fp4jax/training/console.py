"""What a person sees: one table at the start, then a progress bar (a line now and then where there is no terminal)."""

import os
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fp4jax import distributed, hardware, models
from fp4jax.dot import implementation
from fp4jax.models.layers import attention_implementation
from fp4jax.policy import describe
from fp4jax.recipes import Recipe, recipe
from fp4jax.training.estimate import duration
from fp4jax.training.schedule import Phase

MAX_POLICY = 60
"""Characters of a policy that are shown; one from a file is here as its rules."""


def make_console() -> Console:
    """Returns the console of process 0; the other processes print nothing."""
    console = Console(highlight=False, quiet=not distributed.is_first())
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def _products(config: ml_collections.ConfigDict, recipes: Iterable[Recipe]) -> str:
    """What really multiplies."""
    quantizer, execution = implementation(config.backend, config.gemm)
    if all(recipe.is_high_precision for recipe in recipes):
        return f"{config.model.dtype}, accumulated in float32"
    return f"FP4 {execution}, accumulated in float32; quantizer: {quantizer.name}"


def _attention(config: ml_collections.ConfigDict) -> str:
    """What computes attention; an implementation that this device cannot run is refused here, before the first step."""
    model = config.model
    return attention_implementation(model.attention, jnp.dtype(model.dtype), model.head_dim, hardware.current())


def _policy(config: ml_collections.ConfigDict) -> str:
    """The policy and what it gives `config.recipe` to."""
    name = config.policy if len(config.policy) <= MAX_POLICY else f"{config.policy[: MAX_POLICY - 3]}..."
    return f"{name}: {describe(models.linear_recipes(config))}"


def start_table(
    config: ml_collections.ConfigDict,
    phases: tuple[Phase, ...],
    mesh: Mesh,
    parameters: tuple[int, int, int],
    state_bytes: int,
    first_step: int,
    step_seconds: float,
) -> Table:
    """Returns the table of what will run, where, and for how long.

    Args:
      phases: the recipes in the order in which they run.
      parameters: (total, without embedding, of these active for a token).
      state_bytes: parameters and optimizer state, over all devices.
      first_step: steps that were already done.
      step_seconds: estimated seconds for a step.
    """
    total, without_embedding, active = parameters
    of_a_token = "" if active == without_embedding else f", {active:,} of these active for a token"
    steps = config.steps - first_step
    microbatches = f", {config.microbatches} microbatches" if config.microbatches > 1 else ""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    size = f"{total:,} parameters, {without_embedding:,} without embedding{of_a_token}"
    table.add_row("model", f"{config.model.name}: {size}")
    if config.init_from:
        table.add_row("weights", f"continued from {config.init_from}")
    recipes = tuple(recipe(name) for name in dict.fromkeys(phase.recipe for phase in phases))
    table.add_row("recipe", "\n".join(map(str, recipes)))
    if config.schedule:
        table.add_row("schedule", "\n".join(map(str, phases)))
    table.add_row("policy", _policy(config))
    table.add_row("GEMM", _products(config, recipes))
    table.add_row("attention", _attention(config))
    table.add_row("mesh", describe_mesh(mesh))
    table.add_row("device", describe_devices(mesh))
    if hardware.current().is_cpu and hardware.huge_pages() is False:
        table.add_row("memory", f"in pages of 4 KiB: GLIBC_TUNABLES={hardware.HUGE_PAGES} makes steps faster")
    table.add_row("state", f"{state_bytes / 1e9:.2f} GB (float32 parameters and two moments)")
    tokens = f"{config.batch_size * config.seq_len:,} tokens a step"
    table.add_row("batch", f"{config.batch_size} sequences x {config.seq_len} tokens = {tokens}{microbatches}")
    table.add_row("steps", f"{steps:,} of {config.steps:,}" if first_step else f"{steps:,}")
    total_time = duration(step_seconds * steps)
    table.add_row("time", f"about {duration(step_seconds)} a step, {total_time} in all (a guess; measured soon)")
    return table


def describe_mesh(mesh: Mesh) -> str:
    """Returns "data=2, fsdp=1, tensor=4", and how many devices are left idle."""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    idle = jax.device_count() - mesh.size
    return f"{axes} ({idle} of {jax.device_count()} devices idle: set --config.mesh.data=-1)" if idle else axes


def describe_devices(mesh: Mesh) -> str:
    """Returns number, kind and memory of the mesh's devices; on a CPU the host's memory."""
    device = mesh.local_devices[0]
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        memory = f"{statistics['bytes_limit'] / 1e9:.1f} GB each"
    else:
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB of host memory"
    return f"{mesh.size} x {device.device_kind}, {memory}"


class ProgressBar:
    """The bar on a terminal, lines elsewhere; a context manager."""

    def __init__(self, console: Console, total: int, completed: int, bar: bool):
        self._console = console
        self._bar = bar and console.is_terminal
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"))
        self._progress = Progress(*columns, console=console, disable=not self._bar)
        self._task = self._progress.add_task("", total=total, completed=completed, status="compiling")
        self._total = total

    def update(self, step: int, loss: float, tokens_per_second: float | None, seconds_left: float | None) -> None:
        """Moves the bar to `step` steps done."""
        self._progress.update(self._task, completed=step, status=_status(loss, tokens_per_second, seconds_left))

    def line(self, step: int, loss: float, tokens_per_second: float | None, seconds_left: float | None) -> None:
        """Prints a line where there is no bar."""
        if not self._bar:
            status = _status(loss, tokens_per_second, seconds_left)
            self._console.print(f"step {step:,} of {self._total:,}: {status}")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def _status(loss: float, tokens_per_second: float | None, seconds_left: float | None) -> str:
    parts = [f"loss {loss:.4f}"]
    if tokens_per_second is not None and seconds_left is not None:
        parts += [f"{tokens_per_second:,.0f} tokens/s", f"{duration(seconds_left)} left"]
    return ", ".join(parts)
