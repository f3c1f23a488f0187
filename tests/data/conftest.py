"""Small corpora on disk. Every test has a token cache of its own."""

import json
import pathlib
from collections.abc import Callable, Iterable

import ml_collections
import numpy as np
import pytest
import zstandard

WORDS = ("union", "congress", "treaty", "commerce", "liberty", "the", "of", "a", "people", "great", "é", "—")


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FP4JAX_CACHE", str(folder))
    return folder


@pytest.fixture
def write_shard(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes lines, or documents as DCLM's lines, to a zstd shard below tmp_path."""

    def write(
        documents: Iterable[str | bytes], name: str = "corpus/shard_00000000_processed.jsonl.zst"
    ) -> pathlib.Path:
        lines = [line if isinstance(line, bytes) else dclm_line(line) for line in documents]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.ZstdCompressor().compress(b"".join(line + b"\n" for line in lines)))
        return path

    return write


@pytest.fixture
def texts() -> list[str]:
    """Sixty documents of 1 to 60 random words: no two rows of 16 tokens are alike."""
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, length)) for length in random.integers(1, 61, 60)]


def dclm_line(text: str) -> bytes:
    record = {
        "text": text,
        "url": "https://example.com/",
        "metadata": {"Content-Type": "application/http"},
        "language_id_whole_page_fasttext": {"en": 0.97},
    }
    return json.dumps(record, ensure_ascii=False).encode("utf-8")


@pytest.fixture
def data_config(tmp_path: pathlib.Path) -> Callable[..., ml_collections.ConfigDict]:
    def make(**changes) -> ml_collections.ConfigDict:
        values = {
            "source": str(tmp_path / "corpus"),
            "tokenizer": "embedded",
            "validation_fraction": 0.2,
            "text_key": "text",
            "max_bad_fraction": 0.01,
            "prefetch": 2,
            "document_mask": False,
        }
        return ml_collections.ConfigDict(values | changes)

    return make
