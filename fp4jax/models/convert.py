"""Weights in and out: `python -m fp4jax.models.convert SRC --to=DIR [--format=safetensors|nvfp4]`.

SRC is a Hugging Face folder, a .gguf file, "smollm2-135m" or the workdir of a run; DIR becomes a Hugging Face folder
that `transformers` loads. Exit codes: 0 done, 1 an error (one line on stderr, --debug shows the traceback; nothing is
written), 130 interrupted.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence

from absl import logging

from fp4jax import policy as policies
from fp4jax.cli import Parser, run
from fp4jax.data.errors import DataError
from fp4jax.models import hf_export, nvfp4_layout, saved_run
from fp4jax.models.pretrained import LoadedModel, load_parameters
from fp4jax.models.registry import name_of
from fp4jax.recipes import Recipe
from fp4jax.training.schedule import recipe_at

FORMATS = ("safetensors", "nvfp4")
DEFAULT_RECIPE, DEFAULT_POLICY = "nvfp4", "all_linear"


def convert(
    source: str,
    destination: str,
    *,
    format: str = "safetensors",
    dtype: str | None = None,
    recipe: str | None = None,
    policy: str | None = None,
) -> str:
    """Writes the weights of `source` to the folder `destination`; returns a line that says what was written.

    Args:
      source: what `fp4jax.models.load_parameters` reads.
      format: "safetensors": the weights themselves; "nvfp4": linear layers in the layout of `compressed-tensors`, the
        rest in bfloat16.
      dtype: of the weights, "float32", "bfloat16" or "float16"; None for that of the source. Not for "nvfp4".
      recipe, policy: for "nvfp4", how each layer's weight is quantized: as in the recipe's forward product. None for
        those of a run, and "nvfp4" in all linear layers for other sources.

    Raises:
      ValueError: an argument, a source or a destination that cannot be used.
      OSError: the destination cannot be written.
    """
    _check_arguments(format, dtype, recipe, policy)
    hf_export.check_destination(pathlib.Path(destination).expanduser().absolute())
    loaded = load_parameters(source)
    what = f"{source}, {name_of(loaded.config)} of {sum(p.size for p in loaded.params.values()):,} parameters"
    if format == "safetensors":
        stored = dtype or loaded.origin.dtype
        files = hf_export.model_files(loaded, stored)
        size = hf_export.write_folder(destination, hf_export.plain_tensors(loaded, stored), files)
        return f"{what}, written to {destination} in {stored}: {size / 1e6:,.1f} MB{_tokenizer_note(loaded)}"
    operands = hf_export.quantized_operands(loaded, _recipes(loaded, source, recipe, policy))
    quantization = nvfp4_layout.quantization_config(hf_export.high_precision_layers(loaded, operands))
    files = hf_export.model_files(loaded, hf_export.HIGH_PRECISION_BESIDE_NVFP4, quantization)
    error = hf_export.Error()
    size = hf_export.write_folder(destination, hf_export.nvfp4_tensors(loaded, operands, error), files)
    return (
        f"{what}, written to {destination}: {error.layers} linear layers ({error.weights:,} weights) in NVFP4, "
        f"relative error {error.relative:.2%}, the rest in {hf_export.HIGH_PRECISION_BESIDE_NVFP4}: "
        f"{size / 1e6:,.1f} MB{_tokenizer_note(loaded)}"
    )


def _check_arguments(format: str, dtype: str | None, recipe: str | None, policy: str | None) -> None:
    if format not in FORMATS:
        raise DataError(f"--format={format}: choose {' or '.join(FORMATS)}")
    if dtype is not None and dtype not in hf_export.DTYPES:
        raise DataError(f"--dtype={dtype}: choose {', '.join(hf_export.DTYPES)}")
    if format == "nvfp4" and dtype is not None:
        raise DataError(f"--dtype={dtype}: what is not NVFP4 is {hf_export.HIGH_PRECISION_BESIDE_NVFP4}; leave it out")
    given = {"recipe": recipe, "policy": policy}
    if format != "nvfp4" and any(given.values()):
        name = next(name for name, value in given.items() if value)
        raise DataError(f"--{name}={given[name]}: the weights of --format={format} are not quantized; leave it out")


def _recipes(loaded: LoadedModel, source: str, recipe: str | None, policy: str | None) -> Mapping[str, Recipe]:
    default = DEFAULT_RECIPE, DEFAULT_POLICY
    if saved_run.is_run(source):
        step, saved = saved_run.read_saved(source)
        default = recipe_at(saved, step), saved.policy
    paths = loaded.config.linear_paths
    return policies.policy(policy or default[1], recipe or default[0], paths).assign(paths)


def _tokenizer_note(loaded: LoadedModel) -> str:
    return "" if loaded.origin.files else "; no tokenizer.json, because the source has none"


def main(arguments: Sequence[str]) -> None:
    """The command.

    Raises:
      ValueError, OSError: as `convert`.
    """
    parser = Parser("fp4jax.models.convert", "Write pretrained or trained weights as a Hugging Face folder.")
    parser.add_argument("source", metavar="SRC", help="Hugging Face folder, .gguf file, smollm2-135m, or a workdir")
    parser.add_argument("--to", metavar="DIR", required=True, help="new folder", default=None)
    parser.add_argument("--format", default="safetensors", help=" or ".join(FORMATS))
    parser.add_argument("--dtype", default=None, help="of the weights; by default that of the source")
    parser.add_argument("--recipe", default=None, help="for nvfp4; by default the run's, or nvfp4")
    parser.add_argument("--policy", default=None, help="for nvfp4; by default the run's, or all_linear")
    options = parser.parse_args(list(arguments))
    logging.set_verbosity(logging.FATAL)  # Orbax warns that it will not write
    print(
        convert(
            options.source, options.to, format=options.format, dtype=options.dtype, recipe=options.recipe,
            policy=options.policy,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], interrupted="interrupted; nothing is written"))
