"""`python -m fp4jax.analyze report`: which matrix products of a configuration's training step run in FP4."""

from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections

from fp4jax.analysis.sensitivity.inputs import config_file
from fp4jax.cli import Parser, check_output_file
from fp4jax.config import ConfigError, check_overrides, flatten
from fp4jax.config_checks import validate
from fp4jax.reporting import Report, report
from fp4jax.training.compilation import enable_compilation_cache
from fp4jax.training.mesh import make_mesh
from fp4jax.training.schedule import config_of, phases, settle
from fp4jax.training.step import abstract_train_step

_OVERRIDE = "--config."


def main(arguments: Sequence[str]) -> None:
    """Prints the report of every phase of the run; nothing is trained.

    Raises:
      ValueError: an argument that cannot be used, a configuration that cannot run on these devices.
      OSError: a file that cannot be written.
    """
    check_overrides(arguments)
    parser = Parser(
        "fp4jax.analyze report", "Which matrix products of a configuration's training step run in FP4, and why not."
    )
    parser.add_argument("--config", type=Path, required=True, help="config file; --config.key=value overrides it")
    parser.add_argument("--trace-only", action="store_true", help="do not compile: seconds instead of minutes")
    parser.add_argument("--json", type=Path, help="file for everything, layer by layer; one for each phase")
    overrides = [argument for argument in arguments if argument.startswith(_OVERRIDE)]
    options = parser.parse_args([argument for argument in arguments if argument not in overrides])
    if options.json is not None:
        check_output_file(options.json, "--json")
    config = _overridden(config_file(options.config), overrides)
    validate(config, jax.device_count())
    if not options.trace_only:
        enable_compilation_cache()
    settled, found = settle(config), phases(config)
    for phase in found:
        of_phase = training_step_report(config_of(settled, phase), compile_program=not options.trace_only)
        print(f"{phase}\n{of_phase}", end="\n\n" if phase is not found[-1] else "\n", flush=True)
        if options.json is not None:
            path = options.json
            path = path if len(found) == 1 else path.with_stem(f"{path.stem}_{phase.number}")
            path.write_text(of_phase.to_json() + "\n", encoding="utf-8")


def training_step_report(config: ml_collections.ConfigDict, *, compile_program: bool = True) -> Report:
    """The report of one optimizer step, from shapes alone; of a schedule's phases take `config_of` one.

    Raises:
      ValueError: a configuration that cannot run on these devices.
    """
    mesh = make_mesh(config.mesh)
    step, state, batch = abstract_train_step(config, mesh)
    with jax.set_mesh(mesh):
        return report(step, state, batch, compile_program=compile_program)


def _overridden(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The configuration with `--config.key=value` put in."""
    for override in overrides:
        key, _, text = override.removeprefix(_OVERRIDE).partition("=")
        old = flatten(config)[key]
        try:
            value = {"true": True, "false": False}[text.lower()] if isinstance(old, bool) else type(old)(text)
        except (KeyError, ValueError):
            raise ConfigError(f"{override}: {key} must be {type(old).__name__}, got {text!r}") from None
        config.update_from_flattened_dict({key: value})
    return config
