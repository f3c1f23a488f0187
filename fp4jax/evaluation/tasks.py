"""`eval.py --tasks`: downstream tasks under a recipe, one after the other, resumable, beside the paper's table 1."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fp4jax.data.json_files import check_fields, one_line, parse_json
from fp4jax.evaluation.subject import Subject
from fp4jax.evaluation.task_data import LM_EVAL, TASKS, check_files, check_tasks, open_task

# Accuracies of table 1 (arXiv 2603.10444, version 1): Qwen3-0.6B after 10B tokens of DCLM.
PAPER_COLUMNS = ("BF16", "Averis")
PAPER = {
    "arc_challenge": (0.2534, 0.2491),
    "arc_easy": (0.5126, 0.5072),
    "boolq": (0.5309, 0.5746),
    "hellaswag": (0.3768, 0.3751),
    "lambada_openai": (0.3602, 0.3862),
    "piqa": (0.6730, 0.6670),
    "race": (0.4882, 0.5036),
}

_OBJECT = dict[str, Any]
_RECORD = {"settings": _OBJECT, "about": _OBJECT, "tasks": _OBJECT}
_TASK = {"metrics": dict[str, _OBJECT], "documents": int, "documents_in_set": int}
_ROWS = "one for each context"  # of the batches: another way of making them gives other numbers under a recipe
_BOOTSTRAPS = 1000  # for the standard error of LAMBADA's perplexity; those of accuracies have a formula
_VERSIONS = ("jax", "flax", "lm-eval", "datasets", "tokenizers")


def run_tasks(
    open_model: Callable[[], Subject],
    names: Sequence[str],
    path: Path,
    *,
    settings: Mapping[str, object],
    folder: Path | None = None,
    limit: int | None = None,
    command: str = "",
    show: Callable[[str], None] = print,
) -> dict:
    """Scores the tasks that the record at `path` does not have yet, writing it after each; returns the record.

    Args:
      open_model: called if there is a task to do; its `about` goes into the record.
      settings: what was asked for: the record of other settings is not continued.
      folder: with the tasks' files; None loads them from the hub.
      limit: documents of each task, its first ones; None for all.
      command: recorded with every task that it scored.
      show: told what has been done, a line each.

    Raises:
      ValueError: an unknown task, a missing package, file or document, or a record of other settings.
      OSError: the record cannot be written.
    """
    check_tasks(names)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1 document of each task; leave it out for all")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"tasks need a package that is not installed: make eval-data, or pip install {LM_EVAL}")
    if folder is not None:
        check_files(names, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = _open(path, dict(settings) | {"limit": limit, "rows": _ROWS})
    missing = [name for name in names if name not in record["tasks"]]
    if missing:
        subject = open_model()
        record["about"] = subject.about
        for name, found in _score(subject, missing, folder, limit):
            record["tasks"][name] = found | {"command": command}
            _write(path, record)
            show(f"{name}: {found['documents']:,} documents in {found['seconds']:.0f} s; {path} written")
    return record


def _score(subject: Subject, names: Sequence[str], folder: Path | None, limit: int | None):
    """(name, its results) of one task after the other."""
    # Its pool of processes would fork this one, which has JAX's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    from lm_eval.evaluator import evaluate  # on demand: only tasks need it

    from fp4jax.evaluation.harness import HarnessModel

    model = HarnessModel(subject)
    for name in names:
        start, cpu_start = time.perf_counter(), time.process_time()
        with open_task(name, folder) as task:
            found = evaluate(model, task, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
        yield (
            name,
            {
                "metrics": _metrics(found["results"][name]),
                "documents": found["n-samples"][name]["effective"],
                "documents_in_set": TASKS[name].documents,
                "version": found["versions"][name],
                "data": "hub" if folder is None else "local file",
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu_start, 1),
                "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
                "versions": {package: importlib.metadata.version(package) for package in _VERSIONS},
            },
        )


def _metrics(results: Mapping) -> dict[str, dict[str, float]]:
    """lm-eval's "acc,none" and "acc_stderr,none" as {"acc": {"value": ..., "stderr": ...}}."""
    values = {key.split(",")[0]: value for key, value in results.items() if "," in key}
    return {
        key: {"value": value, "stderr": values[f"{key}_stderr"]}
        for key, value in values.items()
        if not key.endswith("_stderr")
    }


def render(record: Mapping) -> str:
    """The paper's table 1 with ours beside it: accuracies and standard errors in percent."""
    about = record["about"]
    lines = [
        f"{about.get('model', about.get('workdir'))}, recipe {about['recipe']}",
        f"{'':15}{'paper (Qwen3-0.6B)':>18}   ours",
        f"{'task':15}{PAPER_COLUMNS[0]:>9}{PAPER_COLUMNS[1]:>9}   {'acc':>14}{'acc_norm':>14}{'documents':>16}",
    ]
    done = [name for name in TASKS if name in record["tasks"]]
    for name in done:
        task = record["tasks"][name]
        paper = "".join(f"{100 * value:9.2f}" for value in PAPER[name])
        ours = "".join(f"{_percent(task['metrics'].get(metric)):>14}" for metric in ("acc", "acc_norm"))
        documents = f"{task['documents']:,} of {task['documents_in_set']:,}"
        lines.append(f"{name:15}{paper}   {ours}{documents:>16}")
    if len(done) == len(TASKS):
        means = [sum(PAPER[name][column] for name in done) / len(done) for column in range(len(PAPER_COLUMNS))]
        accuracies = [record["tasks"][name]["metrics"]["acc"] for name in done]
        error = sum(accuracy["stderr"] ** 2 for accuracy in accuracies) ** 0.5 / len(done)
        mean = {"value": sum(accuracy["value"] for accuracy in accuracies) / len(done), "stderr": error}
        lines.append(f"{'mean':15}" + "".join(f"{100 * value:9.2f}" for value in means) + f"   {_percent(mean):>14}")
    return "\n".join(lines)


def _percent(metric: Mapping | None) -> str:
    if metric is None:
        return ""
    error = metric["stderr"]
    return f"{100 * metric['value']:.2f}" + (f" ± {100 * error:.2f}" if isinstance(error, float) else "")


def _open(path: Path, settings: dict) -> dict:
    """The record at `path` to go on with, or a new one."""
    if not path.exists():
        return {"settings": settings, "about": {}, "tasks": {}}
    try:
        record = check_fields(parse_json(path.read_bytes()), _RECORD)
        for task in record["tasks"].values():
            check_fields(record["about"], {"recipe": str})
            check_fields(task, _TASK)
            check_fields(task["metrics"], {"acc": _OBJECT})
            for metric in task["metrics"].values():
                check_fields(metric, {"value": float, "stderr": float | str})
        before = record["settings"]
    except ValueError as error:
        raise ValueError(f"{path} is no record of an evaluation ({one_line(error)}): give another --out") from None
    if before != settings:
        changed = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
        shown = ", ".join(f"{key} {before.get(key)} → {settings.get(key)}" for key in changed)
        raise ValueError(f"{path} holds an evaluation with other settings ({shown}): give another --out")
    return record


def _write(path: Path, record: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)  # a run that is cut short leaves the record as it was
