"""`python -m fp4jax.analyze ptq`: every recipe on one pretrained model, against high precision."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from fp4jax.analysis.ptq.figures import draw
from fp4jax.analysis.ptq.measure import Measurement, Sample, measure
from fp4jax.analysis.ptq.table import render
from fp4jax.cli import Parser, output_folder
from fp4jax.config import default_config
from fp4jax.data.held_out import held_out_text
from fp4jax.data.json_files import check_fields, from_fields, one_line, parse_json
from fp4jax.models.pretrained import LoadedModel, load_parameters
from fp4jax.recipes import list_recipes, recipe
from fp4jax.training.compilation import enable_compilation_cache

# What is quantized → how a recipe's name says so.
MODES = {"weights and activations": "{}", "activations": "{}+w_bf16"}
FILE = "ptq.json"


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table for each mode, writes ptq.json and ptq.png.

    What ptq.json holds already, from the same model and text, is not measured again.

    Raises:
      ValueError: an argument that cannot be used, or results of other measurements in the folder.
      OSError: a folder that cannot be written.
    """
    options = _parse(arguments)
    enable_compilation_cache()
    loaded = load_parameters(options.model, dtype="float32")
    batches = _batches(loaded, options)
    record = _open(options.out / FILE, _settings(options, batches))
    names = [p.format(name) for mode, p in MODES.items() for name in options.recipes if _has_quantized(name, mode)]
    missing = [name for name in names if not _is_measured(record, name)]
    for found in measure(loaded, batches, missing, options.seeds, not options.no_gradients) if missing else ():
        samples = [dataclasses.asdict(sample) for sample in found.samples]
        record["measurements"][found.recipe] = {"recipe": str(recipe(found.recipe)), "samples": samples}
        (options.out / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(render("measured", [found]).splitlines()[-1], flush=True)
    groups = {mode: _read(record, pattern, options.recipes) for mode, pattern in MODES.items()}
    for mode, measurements in groups.items():
        print("\n" + render(f"{options.model}, {mode} quantized in all linear layers of the blocks", measurements))
    draw(groups, options.out / "ptq.png")
    print(f"\n{batches[..., 1:].size:,} tokens, seeds {options.seeds}; {options.out / FILE} and ptq.png written")


def _parse(arguments: Sequence[str]) -> Any:
    parser = Parser("fp4jax.analyze ptq", "Loss and weight gradients of a pretrained model under every recipe.")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a .gguf file")
    parser.add_argument("--recipes", default=",".join(n for n in list_recipes() if n != "bf16"), help="with commas")
    parser.add_argument("--tokens", type=int, default=9216, help="held-out tokens, at least")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--batch_size", type=int, default=3, help="sequences in a batch: they share means and scales")
    parser.add_argument("--seeds", default="0,1,2", help="of the noise; batches are dealt to them in turn")
    parser.add_argument("--no_gradients", action="store_true", help="losses only, in a third of the time")
    parser.add_argument("--out", type=Path, default=Path("runs/ptq"), help="folder for ptq.json and ptq.png")
    options = parser.parse_args(list(arguments))
    for name in ("tokens", "seq_len", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    options.recipes = options.recipes.split(",")
    for name in options.recipes:
        recipe(name)
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds must be whole numbers with commas between them, got {options.seeds!r}")
    output_folder(options.out)
    return options


def _has_quantized(name: str, mode: str) -> bool:
    """Whether a recipe has something to measure in this mode; without quantized weights both modes are one."""
    try:
        recipe(MODES[mode].format(name))
    except ValueError:
        return False
    return True


def _batches(loaded: LoadedModel, options: Any) -> Int32[np.ndarray, "batch B T1"]:
    count = -(-options.tokens // (options.seq_len * options.batch_size))
    text = held_out_text(
        default_config().data, loaded.tokenizer, seq_len=options.seq_len + 1, rows=count * options.batch_size
    )
    return text.tokens.reshape(count, options.batch_size, options.seq_len + 1)


def _settings(options: Any, batches: np.ndarray) -> dict:
    return {
        "model": options.model,
        "batches": list(batches[..., 1:].shape),
        "seeds": options.seeds,
        "gradients": not options.no_gradients,
        "text": "validation split of the embedded corpus",
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "jax": jax.__version__,
    }


def _open(path: Path, settings: dict) -> dict:
    """The record at `path` to go on with, or a new one."""
    if path.exists():
        try:
            record = check_fields(parse_json(path.read_bytes()), {"settings": Any, "measurements": dict[str, Any]})
            for measurement in record["measurements"].values():
                check_fields(measurement, {"recipe": str, "samples": list[Any]})
                for sample in measurement["samples"]:
                    from_fields(Sample, sample)
        except ValueError as error:
            raise ValueError(f"{path} is no record of measurements ({one_line(error)}): use another --out") from None
        if record["settings"] != settings:
            raise ValueError(
                f"{path} holds measurements with {record['settings']}, asked for {settings}: use another --out"
            )
        return record
    return {"settings": settings, "measurements": {}}


def _is_measured(record: Mapping, name: str) -> bool:
    """Whether the record has this recipe as it is now."""
    return record["measurements"].get(name, {}).get("recipe") == str(recipe(name))


def _read(record: Mapping, pattern: str, recipes: Sequence[str]) -> list[Measurement]:
    found = record["measurements"]
    return [
        Measurement(name, tuple(Sample(**sample) for sample in found[pattern.format(name)]["samples"]))
        for name in recipes
        if pattern.format(name) in found
    ]
