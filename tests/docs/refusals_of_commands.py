"""The rows of docs/errors.md about compare, convert, evaluation tasks, sample, processes and files of results."""

import json
import pathlib
from functools import partial

from fp4jax import distributed
from fp4jax.analysis.health.numbers import load_health
from fp4jax.comparison import report
from fp4jax.comparison.plan import Comparison
from fp4jax.config import default_config
from fp4jax.data import tokenizer
from fp4jax.evaluation.subject import open_subject
from fp4jax.evaluation.task_data import check_files, check_tasks, read_documents
from fp4jax.evaluation.tasks import _open
from fp4jax.generation import Sampling
from fp4jax.models.convert import convert
from fp4jax.policy import policy
from fp4jax.training.metrics import read_metrics
from fp4jax.training.schedule import phases
from tests.docs.refusals import CASES, Call, Place, refused


def comparison(place: Place, **changes) -> Comparison:
    values = {
        "config": default_config(), "recipes": ("bf16", "averis"), "seeds": (0,), "baseline": "bf16", "primary": None,
        "workdir": place.out,
    }  # fmt: skip
    return Comparison(**values | changes)


def with_schedule(text: str):
    config = default_config()
    config.schedule = text
    return config


def write(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    return str(path)


CASES |= {
    # Recipes by layer and by step
    "an unknown policy": lambda place: partial(policy, "all_layers", "averis", []),
    "a policy file that is no JSON": lambda place: partial(
        policy, write(place.folder / "scan.json", "{"), "averis", []
    ),
    "a schedule that ends too early": lambda place: partial(phases, with_schedule("bf16:1%,run:80%")),
    "a phase without an end": lambda place: partial(phases, with_schedule("bf16,run:100%")),
    # Comparing
    "a comparison of one recipe": lambda place: partial(comparison, place, recipes=("bf16",)),
    "a recipe named twice": lambda place: partial(comparison, place, recipes=("bf16", "bf16")),
    "a baseline that is not compared": lambda place: partial(comparison, place, baseline="nvfp4"),
    "a declared pair that is not compared": lambda place: partial(comparison, place, primary=("averis", "mxfp4")),
    "a report without a comparison": lambda place: partial(report.redraw, place.folder),
    # Converting
    "a format that there is not": lambda place: partial(convert, "smollm2-135m", str(place.out), format="onnx"),
    "a recipe where nothing is quantized": lambda place: partial(
        convert, "smollm2-135m", str(place.out), recipe="averis"
    ),
    "a destination that exists": lambda place: partial(convert, "smollm2-135m", write(place.folder / "full", "")),
    "weights that there are not": lambda place: partial(convert, str(place.folder / "none"), str(place.out)),
    # Downstream tasks
    "an unknown task": lambda place: partial(check_tasks, ["mmlu"]),
    "a task without its file": lambda place: partial(check_files, ["piqa"], place.folder),
    "a task's line that is no JSON": lambda place: partial(
        read_documents, "piqa", pathlib.Path(write(place.folder / "piqa.jsonl", "{"))
    ),
    "a task's document without its fields": lambda place: partial(
        read_documents, "piqa", pathlib.Path(write(place.folder / "piqa.jsonl", '{"goal": ""}'))
    ),
    "scores of other settings": lambda place: partial(
        _open,
        pathlib.Path(write(place.folder / "tasks.json", '{"settings": {"limit": 20}, "about": {}, "tasks": {}}')),
        {"limit": None},
    ),
    # Several processes
    "flags of a process that are half given": lambda place: partial(distributed.start, "10.0.0.1:9876", 2, None),
    "a coordinator without a port": lambda place: partial(distributed.start, "10.0.0.1", 2, 0),
    "a process that is none of them": lambda place: partial(distributed.start, "10.0.0.1:9876", 2, 2),
    "a run of no process": lambda place: partial(distributed.start, "10.0.0.1:9876", 0, 0),
    # Sampling
    "both or neither of a run and a model": lambda place: open_subject,
    "a probability that is none": lambda place: partial(Sampling, top_p=2.0),
    # Tokenizers of one's own
    "a vocabulary that is too small": lambda place: partial(
        tokenizer.main, ["train", "--source=embedded", f"--output={place.folder}", "--vocab_size=100"]
    ),
    "a tokenizer that is there already": lambda place: partial(
        tokenizer.main,
        ["train", "--source=embedded", f"--output={write(place.folder / 'a.json', '')}", "--vocab_size=300"],
    ),
    "a flag that there is not": lambda place: partial(
        tokenizer.main, ["train", "--source=embedded", "--output=a", "--vocab_size=300", "--colour=blue"]
    ),
}


@refused("a folder of another comparison")
def _(place: Place) -> Call:
    workdir = place.folder / "comparison"
    comparison(place, workdir=workdir).declare()
    return comparison(place, workdir=workdir, baseline="averis").declare


@refused("a folder that is no comparison")
def _(place: Place) -> Call:
    write(place.folder / "letter.txt", "")
    return comparison(place, workdir=place.folder).declare


@refused("numbers of a comparison that are damaged")
def _(place: Place) -> Call:
    write(place.folder / "comparison.json", json.dumps({"command": ""}))
    return partial(report.redraw, place.folder)


@refused("metrics that are damaged")
def _(place: Place) -> Call:
    write(place.folder / "metrics.jsonl", '{"step": 1}\n{"step": \n{"step": 3}\n')
    return partial(read_metrics, place.folder)


@refused("health that was not measured")
def _(place: Place) -> Call:
    return partial(load_health, place.folder)
