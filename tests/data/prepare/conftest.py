"""Preparing the small corpora of tests/data in this process or in one of its own."""

import io
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from fp4jax.data.prepare.inputs import find_units
from fp4jax.data.prepare.options import Options
from fp4jax.data.prepare.report import Report
from fp4jax.data.prepare.run import prepare

OPTIONS = Options(
    tokenizer="embedded", text_key="text", validation_fraction=0.2, record_tokens=16, min_characters=1,
    max_characters=100_000, max_mojibake=0.01, language="any", min_language_share=0.65,
)  # fmt: skip


@pytest.fixture
def prepare_corpus(tmp_path) -> Callable[..., Report]:
    """Prepares tmp_path / "corpus" into a folder of tmp_path."""

    def run(name: str = "set", source: str | None = None, workers: int = 1, max_bad_fraction=0.01, **changes) -> Report:
        options = Options(**{**vars(OPTIONS), **changes})
        units = find_units(source or str(tmp_path / "corpus"), "train", None)
        return prepare(
            units, tmp_path / name, options, workers=workers, max_bad_fraction=max_bad_fraction,
            console=Console(file=io.StringIO()),
        )  # fmt: skip

    return run


@pytest.fixture
def corpus_of_three(write_shard, texts) -> list[str]:
    """Three shards with twenty documents each; returns the texts."""
    for index in range(3):
        write_shard(texts[20 * index : 20 * index + 20], f"corpus/{index}.jsonl.zst")
    return texts


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of a finished set but the report, which has times in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def index_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "index.json").read_bytes())


def command(source: object, output: object, *flags: str, before: str = "") -> subprocess.CompletedProcess:
    """Runs the command in a process; `before` is Python that it executes first."""
    arguments = [f"--source={source}", f"--output={output}", "--workers=1", "--language=any"]
    arguments += ["--validation_fraction=0.2", *flags]
    if not before:
        start = ["-m", "fp4jax.data.prepare"]
    else:
        call = "import sys; from fp4jax.data.prepare.command import main; from fp4jax.cli import run"
        start = ["-c", f"{before}\n{call}; sys.exit(run(main, sys.argv[1:]))"]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, check=False)
