"""The paper's seven downstream tasks, as lm-eval defines them, on local files or from the Hugging Face hub.

A local file is `<task>.jsonl` with one document a line, in the schema of the data set that lm-eval names. RACE may also
have one question a line, as its first publishers have it: lines that share their article are put together.
"""

import contextlib
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fp4jax.data.json_files import parse_json

LM_EVAL = "lm-eval==0.4.13"
_RACE_QUESTION = ("article", "question", "options", "answer")


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """One of lm-eval's tasks.

    Attributes:
      file: its definition, below lm_eval/tasks.
      split: of the documents that are scored.
      fields: what each of them must have.
      documents: in the whole set.
    """

    file: str
    split: str
    fields: tuple[str, ...]
    documents: int


TASKS = {
    "arc_challenge": TaskSource("arc/arc_challenge.yaml", "test", ("question", "choices", "answerKey"), 1172),
    "arc_easy": TaskSource("arc/arc_easy.yaml", "test", ("question", "choices", "answerKey"), 2376),
    "boolq": TaskSource("super_glue/boolq/default.yaml", "validation", ("question", "passage", "label"), 3270),
    "hellaswag": TaskSource(
        "hellaswag/hellaswag.yaml", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), 10042
    ),
    "lambada_openai": TaskSource("lambada/lambada_openai.yaml", "test", ("text",), 5153),
    "piqa": TaskSource("piqa/piqa.yaml", "validation", ("goal", "sol1", "sol2", "label"), 1838),
    "race": TaskSource("race/race.yaml", "test", ("article", "problems"), 1045),
}


def check_tasks(names: Sequence[str]) -> None:
    """Raises ValueError for a task that is not known, or none."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"unknown task {', '.join(map(repr, unknown))}; accepted: {','.join(TASKS)}")


def check_files(names: Sequence[str], folder: Path) -> None:
    """Raises ValueError for the tasks that have no file in `folder`."""
    missing = [name for name in names if not (folder / f"{name}.jsonl").is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(f'{name}.jsonl' for name in missing)}: `make eval-data` writes all but race; "
            "leave these out of --tasks, or run them without --task_data to load them from the Hugging Face hub"
        )


@contextlib.contextmanager
def open_task(name: str, folder: Path | None) -> Iterator[Mapping[str, Any]]:
    """lm-eval's task of that name, as `lm_eval.evaluator.evaluate` takes it.

    Args:
      folder: with `<name>.jsonl`; None loads the data set from the hub.

    Raises:
      ValueError: the file, or the data set on the hub, cannot be read, or a document lacks a field.
    """
    import datasets  # on demand, both of them: they are not needed for anything else
    import lm_eval.tasks

    datasets.disable_progress_bars()
    source = TASKS[name]
    definition = Path(lm_eval.tasks.__file__).parent / source.file
    with tempfile.TemporaryDirectory(prefix="fp4jax_task_") as temporary:
        changes = {"task": name, "include": str(definition)}
        if folder is not None:
            path = Path(temporary) / "documents.jsonl"
            _write(path, read_documents(name, folder / f"{name}.jsonl"))
            # The whole set in one split; what lm-eval takes examples from, for prompts with some, is not there.
            changes |= {"dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None}
            changes |= {"test_split": None, f"{source.split}_split": source.split}
            changes |= {"dataset_kwargs": {"data_files": {source.split: str(path)}, "cache_dir": temporary}}
        task_file = Path(temporary) / f"{name}.yaml"
        task_file.write_text(yaml.safe_dump(changes), encoding="utf-8")
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        try:
            loaded = manager.load([str(task_file)])
        except Exception as error:  # whatever the libraries for data sets and hubs raise
            where = f"from {folder / f'{name}.jsonl'}" if folder else "from the Hugging Face hub"
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"task {name!r} could not be loaded {where} ({type(error).__name__}: {reason}); local files are given "
                "with --task_data=DIR"
            ) from error
        yield loaded


def read_documents(name: str, path: Path) -> list[dict]:
    """The documents of a local file.

    Raises:
      ValueError: it cannot be read, a line is not a JSON object, or a field is missing; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    documents = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        accepted = [TASKS[name].fields, *([_RACE_QUESTION] if name == "race" else [])]
        if not isinstance(document, dict) or not any(set(fields) <= set(document) for fields in accepted):
            found = ", ".join(document) if isinstance(document, dict) else f"a {type(document).__name__}"
            needed = " or ".join(", ".join(fields) for fields in accepted)
            raise ValueError(f"{path}, line {number} has {found}; a document of {name} has {needed}")
        documents.append(document)
    if not documents:
        raise ValueError(f"{path} holds no document")
    return _race_articles(documents) if name == "race" else documents


def _race_articles(documents: list[dict]) -> list[dict]:
    """Documents with "problems", the questions on one article as text that Python reads, which lm-eval expects."""
    articles = [document for document in documents if "problems" in document]
    questions = [document for document in documents if "problems" not in document]
    for article, group in itertools.groupby(questions, key=lambda document: document["article"]):
        problems = [{key: document[key] for key in _RACE_QUESTION[1:]} for document in group]
        articles.append({"article": article, "problems": repr(problems)})
    return articles


def _write(path: Path, documents: Sequence[Mapping]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
